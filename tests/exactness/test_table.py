"""Every entry of the table, cut in several ways, against its steps in one micro-batch.

A few entries run with the other tests; all of them, at more cuts, by ``make exactness-long``.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from harness import (
    Run,
    config,
    paired_rows,
    random_model,
    train,
    unpaired_rows,
    word_tokenizer,
    write_rows,
)
from table import TABLE, TEMPLATE, Entry

from aot_plugin.host import steps

pytestmark = pytest.mark.slow

ROWS, STEPS = 8, 3
TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("common")


class Runs:
    """Trains one entry under several cuts of a step of eight rows."""

    def __init__(self, entry: Entry, tmp_path: Path, common: Path) -> None:
        """``common`` holds what entries share: tokenizer, rows, and the rows as prepared by the
        host, which takes longer than to train on them."""
        self.entry, self.tmp_path, self.common = entry, tmp_path, common
        roles = ["<|user|>", "<|assistant|>"]
        tokenizer = word_tokenizer(TEMPLATE, [], roles, bos_token="<s>", eos_token="</s>")
        tokenizer.save_pretrained(common / "tokenizer")
        sizes = {"max_position_embeddings": 512, **entry.sizes}
        self.model = tmp_path / "model"
        random_model(tokenizer, entry.kind, scale=2.0, **sizes).save_pretrained(self.model)
        # Prompts of two lengths and responses of one: couplings differ (see DESIGN), and rows too.
        more = " apple river stone cloud green happy"
        if entry.mode == "paired":
            data = paired_rows(ROWS * STEPS, seed=1)
            for row in data[::2]:
                row["messages"][0]["content"] += more
        else:
            data = unpaired_rows(ROWS * STEPS, seed=1)
            for row in data[::2]:
                row["prompt"] += more
        self.data = common / f"{entry.mode}.jsonl"
        if not self.data.exists():
            write_rows(self.data, data)

    def run(self, micro: int, accumulation: int, **keys: Any) -> Run:
        name = f"{micro}x{accumulation}-{len(list(self.tmp_path.iterdir()))}"
        settings = {
            "aot_mode": self.entry.mode,
            "micro_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "max_steps": STEPS,
            # Adam's first steps are of one size whatever the gradient's: at a larger rate, or with
            # its usual epsilon, rounding grows from step to step.
            "learning_rate": 1e-3,
            "adam_epsilon": 1e-3,
            "sequence_len": 128,
            "dataset_num_proc": 0,
            "dataset_prepared_path": str(self.common / "prepared"),
            "tokenizer_config": str(self.common / "tokenizer"),
            **self.entry.keys,
            **keys,
        }
        return train(config(self.model, self.data, self.tmp_path / name, **settings))


def differences(run: Run, expected: Run) -> list[float]:
    """Of losses and gradient norms, relative, per step; and of all parameters together."""
    found = []
    for key in ("loss", "grad_norm"):
        a, b = run.logged(key), expected.logged(key)
        assert len(a) == len(b) == STEPS
        found += [abs(x - y) / max(abs(x), abs(y), 1e-30) for x, y in zip(a, b, strict=True)]
    squares = [
        ((run.parameters[name].double() - p.double()).square().sum(), p.double().square().sum())
        for name, p in expected.parameters.items()
    ]
    total, size = map(sum, zip(*squares, strict=True))
    return [*found, float(total / size) ** 0.5]


def check(entry: Entry, tmp_path: Path, common: Path, cuts: list[tuple[int, int]]) -> None:
    runs = Runs(entry, tmp_path, common)
    if entry.refused is not None:
        with pytest.raises(ValueError, match=entry.refused):
            runs.run(*cuts[0])
        return
    said: list[str] = []
    with mock.patch.object(steps.LOG, "info", lambda text, *args: said.append(text % args)):
        whole = runs.run(ROWS, 1)
    said = [line for line in said if line.startswith("speed: ")]
    assert len(said) == 1, said
    assert ("shared prompts on" in said[0]) is entry.shared, said[0]
    for cut in cuts:
        found = differences(runs.run(*cut), whole)
        assert max(found) < TOLERANCE, (entry.name, cut, found)
    control = differences(runs.run(2, ROWS // 2, aot_batch="micro_batch"), whole)[:STEPS]
    assert max(control) > 10 * TOLERANCE, f"the losses of the negative control agree: {control}"
    assert max(whole.logged("aot/recoupled_fraction") or [1.0]) > 0 or entry.mode == "unpaired"


@pytest.mark.parametrize("entry", [e for e in TABLE if e.short], ids=lambda entry: entry.name)
def test_the_step_may_be_cut(entry: Entry, tmp_path: Path, common: Path) -> None:
    check(entry, tmp_path, common, [(2, 4)])


@pytest.mark.exactness_long
@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_the_step_may_be_cut_anyhow(entry: Entry, tmp_path: Path, common: Path) -> None:
    check(entry, tmp_path, common, [(2, 4), (1, 8), (4, 2)])
