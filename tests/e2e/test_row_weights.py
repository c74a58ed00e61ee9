"""Rows with whole weights train as the same rows repeated as often; through the host's own command.

A step holds all rows, so that both data sets are one transport problem; and without weights, or
with each micro-batch sorted alone, the run is another one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from cuts import assert_differs, assert_same
from harness import Run, config, paired_rows, train, unpaired_rows, write_rows

from aot_plugin.report.scores import Scores, load_run

pytestmark = pytest.mark.slow

WEIGHTS = [1, 3, 1, 2, 1, 4, 2, 2]
TOTAL = sum(WEIGHTS)
OWN = {"rl_beta": 0.1, "learning_rate": 0.0005, "adam_epsilon": 1e-4}


def rows(kind: str) -> list[dict[str, Any]]:
    """Eight rows, as the type of this kind reads them."""
    if kind.startswith("unpaired"):
        return unpaired_rows(8, positive_every=2)
    found = paired_rows(8)
    if kind == "paired-ours":
        return found
    return [
        {
            "prompt": row["messages"][0]["content"],
            **{name: row[name]["content"] for name in ("chosen", "rejected")},
        }
        for row in found
    ]


TYPES: dict[str, Any] = {
    "paired-ours": "chat_template.default",
    "paired-host": "chatml.default",
    "unpaired-ours": "chat_template.default",
    "unpaired-host": "chatml.ultra",
}


class Bench:
    def __init__(self, work: Path, model: Path, kind: str) -> None:
        self.work, self.model, self.kind = work, model, kind
        weighted = [row | {"trust": w} for row, w in zip(rows(kind), WEIGHTS, strict=True)]
        nothing = weighted[0] | {"trust": 0}
        copies = [row for row in weighted for _ in range(row["trust"])]
        self.few = write_rows(work / "few.jsonl", [nothing, *weighted])
        self.many = write_rows(work / "many.jsonl", copies)

    def run(self, name: str, micro: int, accumulation: int, **keys: Any) -> Run:
        weigh, data = keys.pop("weigh", True), keys.pop("data", self.few)
        mode = self.kind.split("-")[0]
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        cfg = config(self.model, data, self.work / name, aot_mode=mode, **cut, **OWN, **keys)
        entry = cfg["datasets"][0] | {"type": TYPES[self.kind]}
        if weigh:
            entry["field_weight"] = "trust"
        elif data == self.few:
            rest = write_rows(self.work / "rest.jsonl", _read(self.few)[1:])
            entry["path"] = str(rest)
        cfg |= {"datasets": [entry], "num_epochs": 9}
        if self.kind.endswith("host"):  # the host drops the weights of `test_datasets`
            return train(cfg)
        cfg["test_datasets"] = [entry]
        cfg |= {"eval_strategy": "steps", "eval_steps": 5, "eval_batch_size": 3}
        return train(cfg)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", TYPES)
def test_whole_weights_are_rows_repeated_as_often(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, tiny_model, kind)
    repeated = bench.run("repeated", TOTAL, 1, data=bench.many, weigh=False)
    whole = bench.run("whole", 8, 1)
    assert_same(whole, repeated)
    assert_same(bench.run("cut", 2, 4), repeated)
    assert_differs(bench.run("apart", 2, 4, aot_batch="micro_batch"), repeated)
    assert_differs(bench.run("alike", 8, 1, weigh=False), repeated)
    if kind.endswith("host"):
        return
    assert_same_statistics(whole, repeated)
    of_few, of_many = (_scores(tmp_path / name) for name in ("whole", "repeated"))
    assert sorted(of_few.columns["weight"]) == sorted(map(float, WEIGHTS))
    assert "weight" not in of_many.columns


def assert_same_statistics(run: Run, repeated: Run) -> None:
    """What is logged in training and evaluation, apart from counts, bootstraps and the clock."""
    parts, uncompared = (
        ("logps/", "rewards/", "aot/", "loss", "entropy", "mean_token_accuracy"),
        ("sorted_", "_low", "_high", "recoupled", "tokens_per_second"),
    )
    compared = {
        key
        for entry in repeated.history
        for key in entry
        if any(part in key for part in parts) and not any(part in key for part in uncompared)
    }
    assert {"eval_loss", "eval_aot/w1", "aot/gap_q50", "rewards/margins"} <= compared
    assert {"entropy", "eval_entropy", "mean_token_accuracy"} <= compared
    for key in compared:
        expected = pytest.approx(repeated.logged(key), rel=1e-3, abs=2e-4)
        assert run.logged(key) == expected, key


def _scores(output_dir: Path) -> Scores:
    return load_run(output_dir)[-1]


def test_a_cached_reference_and_two_micro_batches(tiny_model: Path, tmp_path: Path) -> None:
    """Its columns are made before, and without, the weights."""
    bench = Bench(tmp_path, tiny_model, "paired-ours")
    lora = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
    keys = lora | {"precompute_ref_log_probs": True, "remove_unused_columns": True}
    cached = bench.run("cached", 4, 2, **keys)
    assert_same(cached, bench.run("plain", 8, 1, **lora))
    assert_differs(bench.run("alike", 8, 1, **lora, weigh=False), cached)
