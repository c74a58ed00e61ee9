"""Two ranks (DDP) train as one process does at the same effective batch.

All runs on two ranks come out of one torchrun (``launch.py``); the runs of one process are trained
here. As in ``e2e/test_exact_step.py`` a negative control, sorting inside micro-batches, must miss.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Run, config, paired_rows, train, unpaired_rows, write_rows
from ranks_helpers import (
    TOLERANCE,
    assert_every_rank_raised,
    assert_same,
    assert_same_evaluation,
    in_file_order,
    job,
    log,
    relative,
    torchrun,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MODES = ("paired", "unpaired")
STEP = 16
ROWS = 40
"""Rows of the training set: two steps of 16 and one of 8 in an epoch.

Accelerate gives every rank the same number of full micro-batches and repeats rows from the start
of the epoch where they run out (``even_batches``), so a last window holds the rows that one process
sees wherever micro-batch x ranks divides the number of rows: 40 is divided by 4 x 2 and 1 x 2. It
is not divided by 8 x 2; the runs so cut read the rows in the order of the file, and the one process
that they are compared to reads a file in which the repeated rows stand at the end.
"""
EVAL_ROWS = 21
"""Divided by none of ranks x eval_batch_size below."""

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
LORA |= {"learning_rate": 0.01}


class Bench:
    """The configs of this file, by name: on two ranks and in one process."""

    def __init__(self, work: Path, model: Path) -> None:
        self.work, self.model = work, model
        self.data: dict[str, Path] = {}
        for mode in MODES:
            rows = (paired_rows if mode == "paired" else unpaired_rows)(ROWS + EVAL_ROWS)
            train_rows, eval_rows = rows[:ROWS], rows[ROWS:]
            repeated = train_rows + train_rows[: -ROWS % STEP]
            for name, some in (("", train_rows), ("-repeated", repeated), ("-eval", eval_rows)):
                self.data[mode + name] = write_rows(work / f"{mode}{name}.jsonl", some)
        self.singles: dict[str, Run] = {}

    def config(
        self, where: str, name: str, mode: str, micro: int, accumulation: int, **keys: Any
    ) -> dict[str, Any]:
        data = self.data[keys.pop("data", mode)]
        cfg = config(
            self.model,
            data,
            self.work / where / name,
            aot_mode=mode,
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            dataset_num_proc=0,  # in this process: to start another one takes longer
            **{"max_steps": 6, "num_epochs": 2, "learning_rate": 0.001, **keys},
        )
        if "eval_batch_size" in keys:
            cfg["test_datasets"] = [{**cfg["datasets"][0], "path": str(self.data[f"{mode}-eval"])}]
            cfg["eval_steps"] = 3
        return cfg

    def unshuffled(self) -> dict[str, Any]:
        # The host's cache of prepared rows does not ask whether they were shuffled.
        return {
            "shuffle_merged_datasets": False,
            "dataset_prepared_path": str(self.work / "unshuffled"),
        }

    def on_ranks(self) -> dict[str, dict[str, Any]]:
        """Every run on two ranks, as config by name."""

        def make(name: str, mode: str, *cut: int, **keys: Any) -> None:
            configs[name] = self.config("ranks", name, mode, *cut, **keys)

        configs: dict[str, dict[str, Any]] = {}
        for mode in MODES:
            make(f"{mode}-4x2", mode, 4, 2, eval_batch_size=4)
            make(f"{mode}-1x8", mode, 1, 8, eval_batch_size=5)
            make(f"{mode}-8x1", mode, 8, 1, **self.unshuffled())
            make(f"{mode}-micro_batch", mode, 4, 2, aot_batch="micro_batch")
            make(f"{mode}-not_finite", mode, *((4, 2) if mode == "paired" else (8, 1)))
        make("paired-lora", "paired", 4, 2, **LORA)
        make("paired-precompute", "paired", 4, 2, precompute_ref_log_probs=True)
        make("unpaired-lora-precompute", "unpaired", 4, 2, precompute_ref_log_probs=True, **LORA)
        return configs

    def single(self, mode: str, name: str = "", **keys: Any) -> Run:
        """A run of one process with one micro-batch a step, trained once."""
        if mode + name not in self.singles:
            cfg = self.config("one", mode + name, mode, STEP, 1, **keys)
            self.singles[mode + name] = train(cfg)
        return self.singles[mode + name]

    def run(self, name: str) -> Run:
        return Run.last(self.work / "ranks" / name)

    def problems(self, name: str) -> list[list[list[int]]]:
        """[rank][step] -> micro-batches, positives, sequences (see ``launch.py``)."""
        files = (self.work / "ranks" / f"{name}.rank{rank}.json" for rank in range(2))
        return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def bench(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("ranks"), tiny_model)
    jobs = []
    for name, cfg in bench.on_ranks().items():
        keys = {"fault": "not_finite"} if name.endswith("not_finite") else {}
        if name.endswith("8x1"):
            keys["order"] = "file"
        jobs.append(job(cfg, **keys))
    code = torchrun(jobs, bench.work / "log", timeout=1200)
    assert code == 0, f"torchrun failed with {code}:\n{log(bench.work / 'log')[-8000:]}"
    return bench


@pytest.fixture
def whole(bench: Bench) -> Callable[[str], Run]:
    return lambda mode: bench.single(mode, eval_batch_size=STEP)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", ["4x2", "1x8"])
def test_two_ranks_train_as_one_process(
    mode: str, cut: str, bench: Bench, whole: Callable[[str], Run]
) -> None:
    assert_same(bench.run(f"{mode}-{cut}"), whole(mode))
    # The last step of an epoch was the shorter one.
    accumulation = int(cut.split("x")[1])
    problems = bench.problems(f"{mode}-{cut}")[0]
    per_row = 2 if mode == "paired" else 1
    assert [(parts, rows // per_row) for parts, _, rows in problems] == 2 * [
        (accumulation, 8),
        (accumulation, 8),
        (accumulation // 2, 4),
    ]


@pytest.mark.parametrize("mode", MODES)
def test_repeated_rows_count_as_often_as_they_are_read(mode: str, bench: Bench) -> None:
    with in_file_order():
        whole = bench.single(mode, "-repeated", data=f"{mode}-repeated", **bench.unshuffled())
    assert_same(bench.run(f"{mode}-8x1"), whole)


@pytest.mark.parametrize("mode", MODES)
def test_sorting_inside_micro_batches_is_another_run(
    mode: str, bench: Bench, whole: Callable[[str], Run]
) -> None:
    losses = bench.run(f"{mode}-micro_batch").logged("loss"), whole(mode).logged("loss")
    misses = [relative(a, b) for a, b in zip(*losses, strict=True)]
    assert max(misses) > 10 * TOLERANCE, f"the negative control agrees: {misses}"


@pytest.mark.parametrize("cut", ["4x2", "1x8", "8x1"])
def test_ranks_held_labels_in_uneven_numbers(cut: str, bench: Bench) -> None:
    ranks = bench.problems(f"unpaired-{cut}")
    assert len(ranks[0]) == len(ranks[1]) == 6
    assert any(a[1] != b[1] for a, b in zip(*ranks, strict=True)), ranks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", ["4x2", "1x8"])
def test_evaluation_knows_neither_batches_nor_ranks(
    mode: str, cut: str, bench: Bench, whole: Callable[[str], Run]
) -> None:
    assert_same_evaluation(bench.run(f"{mode}-{cut}"), whole(mode))


def test_lora(bench: Bench) -> None:
    assert_same(bench.run("paired-lora"), bench.single("paired", "-lora", **LORA))


def test_precomputed_reference(bench: Bench, whole: Callable[[str], Run]) -> None:
    assert_same(bench.run("paired-precompute"), whole("paired"))


def test_lora_and_precomputed_reference(bench: Bench) -> None:
    # One process takes the reference by disabling the adapter in every step.
    assert_same(bench.run("unpaired-lora-precompute"), bench.single("unpaired", "-lora", **LORA))


@pytest.mark.parametrize("mode", MODES)
def test_every_rank_raises_where_one_is_not_finite(mode: str, bench: Bench) -> None:
    sequences = 16 if mode == "paired" else 8  # those of the last rank
    assert_every_rank_raised(bench.work / "ranks" / f"{mode}-not_finite", sequences, 2 * sequences)


def test_the_run_ends_when_a_rank_dies(bench: Bench, tmp_path: Path, tiny_model: Path) -> None:
    cfg = bench.config("dead", "die", "paired", 4, 2)
    code = torchrun([job(cfg, fault="die")], tmp_path, timeout=400)
    assert code == 1
    text = log(tmp_path)
    assert "Starting trainer" in text and "exitcode: 1" in text
    assert "done" not in text
