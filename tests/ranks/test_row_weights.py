"""Rows of unequal weights on two ranks (DDP): one problem, in which repeated rows have no mass.

Unpaired rows are graded, too: a problem for each two neighbouring levels.

As in ``test_ranks.py`` a run in one process is the reference, and a run that takes all weights for
equal must miss, as must one in which repeated rows count.
"""

import random
from pathlib import Path
from typing import Any

import pytest
from harness import Run, config, paired_rows, train, unpaired_rows, write_rows
from ranks_helpers import assert_same, assert_same_evaluation, job, log, on_ranks, relative

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MODES = ("paired", "unpaired")
ROWS, EVAL_ROWS = 37, 21
"""Two steps of 16 and one of 5 in an epoch, so that rows are repeated on each rank."""


def rows(mode: str) -> list[dict[str, Any]]:
    made = (paired_rows if mode == "paired" else unpaired_rows)(ROWS + EVAL_ROWS)
    rng = random.Random(0)
    return [
        row | {"trust": round(rng.choice((0.2, 1.0, 5.0)) * rng.random(), 3), "stars": i * 7 % 5}
        for i, row in enumerate(made)
    ]


class Bench:
    def __init__(self, work: Path, model: Path) -> None:
        self.work, self.model = work, model

    def config(self, name: str, mode: str, micro: int, accumulation: int, **keys: Any) -> Any:
        weigh = {} if keys.pop("alike", False) else {"field_weight": "trust"}
        parts = {"train": rows(mode)[:ROWS], "eval": rows(mode)[ROWS:]}
        data = {}
        for part, some in parts.items():
            data[part] = write_rows(self.work / f"{mode}-{part}.jsonl", some)
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        keys = {"max_steps": 6, "num_epochs": 2, "learning_rate": 0.0003, "eval_steps": 3, **keys}
        cfg = config(self.model, data["train"], self.work / name, aot_mode=mode, **cut, **keys)
        entry = cfg["datasets"][0] | weigh | {"type": "chat_template.default"}
        if mode == "unpaired":
            entry |= {"field_label": "stars", "grades": [1, 2, 4]}
        cfg["datasets"], cfg["test_datasets"] = [entry], [entry | {"path": str(data["eval"])}]
        return cfg

    def run(self, name: str) -> Run:
        return Run.last(self.work / name)


@pytest.fixture(scope="module")
def bench(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("weights"), tiny_model)
    jobs = []
    for mode in MODES:
        jobs.append(job(bench.config(f"{mode}-4x2", mode, 4, 2, eval_batch_size=4)))
        jobs.append(job(bench.config(f"{mode}-1x8", mode, 1, 8, eval_batch_size=5)))
        jobs.append(job(bench.config(f"{mode}-8x1", mode, 8, 1, eval_batch_size=4)))
        counted = bench.config(f"{mode}-repeats-count", mode, 8, 1, eval_batch_size=4)
        jobs.append(job(counted, repeats="count"))
    assert on_ranks(jobs, bench.work / "log", timeout=900) == 0, log(bench.work / "log")[-6000:]
    return bench


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_as_one_process(mode: str, bench: Bench) -> None:
    whole = train(bench.config(f"{mode}-whole", mode, 16, 1, eval_batch_size=16))
    alike = train(bench.config(f"{mode}-alike", mode, 16, 1, eval_batch_size=16, alike=True))
    for cut in ("4x2", "1x8", "8x1"):
        run = bench.run(f"{mode}-{cut}")
        assert_same(run, whole, tolerance=1e-5)
        assert_same_evaluation(run, whole)
    for other in (alike, bench.run(f"{mode}-repeats-count")):
        pairs = zip(other.logged("loss"), whole.logged("loss"), strict=True)
        assert max(relative(*both) for both in pairs) > 1e-3
