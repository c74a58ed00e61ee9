"""Several ranks (DDP) train as one process does at the same effective batch.

All runs on two ranks come out of the same two processes (``launch.py``), those on three out of
three others; the runs of one process are trained here. As in ``e2e/test_exact_step.py`` a negative
control, sorting inside micro-batches, must miss; and so must one in which repeated rows count.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Run, config, paired_rows, save_adapter, train, unpaired_rows, write_rows
from ranks_helpers import (
    TOLERANCE,
    assert_every_rank_raised,
    assert_same,
    assert_same_evaluation,
    job,
    log,
    on_ranks,
    relative,
    torchrun,
)
from vision import image_pairs
from vision import save_model as save_vlm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MODES = ("paired", "unpaired")
STEP = 16
ROUNDING = 1e-5
"""What is left of a difference where the learning rate does not magnify it."""
ROWS = 37
"""Rows of the training set: two steps of 16 and one of 5 in an epoch, so that every cut leaves rows
to be repeated. In the last micro-batches of two ranks, 4 and 1 rows are not, 1 and 0, or 5 and 0.
"""
FEW_ROWS = (21, 3)
"""Training sets of three ranks: 21 rows are a step of 12 and one of 9; 3 rows are half a step of 6,
and leave a rank with repeated rows only."""
EVAL_ROWS = 21
"""Divided by none of ranks x eval_batch_size below."""

CUTS = {
    "4x2": ((2, 8), [(1, 4), (1, 1)]),
    "1x8": ((8, 8), [(3, 3), (3, 2)]),
    "8x1": ((1, 8), [(1, 5), (1, 0)]),
}
"""(micro-batches, rows) of a rank in a full step, and of both ranks in the last one."""

RESUMED = (2, 4)
"""In the middle of the first and of the second epoch, which have three steps."""

BALANCED = {"aot_draw": "balanced", "data": "unpaired-21"}
"""7 positives and 14 negatives: an epoch of 28 rows, a step of 16 and one of 12."""

REFUSED = ("even_batches", "dispatch_batches")
"""Keys of `accelerator_config` under which a step can't be whole on several ranks."""

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
LORA |= {"learning_rate": 0.003}

MEMORY: dict[str, tuple[str, dict[str, int]]] = {
    "scoring": ("paired", {"scoring": 70}),
    "graph": ("unpaired", {"graphs": 60}),
    "backward": ("unpaired", {"backward": 30}),
    "everywhere": ("paired", {"graphs": 70, "scoring": 60, "backward": 60}),
}
"""Where the last of two ranks runs out of memory: tokens that it has room for. A micro-batch of two
pairs takes 94, one of two labelled rows 42."""

CHECKPOINTING = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


class Bench:
    """The configs of this file, by name: on two ranks and in one process."""

    def __init__(self, work: Path, model: Path) -> None:
        self.work, self.model = work, model
        self.data: dict[str, Path] = {}
        for mode in MODES:
            rows = (paired_rows if mode == "paired" else unpaired_rows)(ROWS + EVAL_ROWS)
            train_rows, eval_rows = rows[:ROWS], rows[ROWS:]
            parts = {f"-{few}": train_rows[:few] for few in FEW_ROWS}
            for name, some in {"": train_rows, "-eval": eval_rows, **parts}.items():
                self.data[mode + name] = write_rows(work / f"{mode}{name}.jsonl", some)
        rows = image_pairs(ROWS, work / "images")
        self.data["images"] = write_rows(work / "images.jsonl", rows)
        vlm = {"base_model": str(save_vlm(work / "Llava", "Llava"))}
        vlm |= {"processor_type": "LlavaProcessor", "data": "images"}
        self.images = LORA | {"lora_target_linear": None} | vlm
        self.images["lora_target_modules"] = ["q_proj", "v_proj"]
        self.singles: dict[str, Run] = {}
        start = save_adapter(model, work / "sft")
        self.on_adapter = {"adapter": "lora", "lora_model_dir": str(start)}

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
            **{"max_steps": 6, "num_epochs": 2, "learning_rate": 0.0003, **keys},
        )
        if "eval_batch_size" in keys:
            cfg["test_datasets"] = [{**cfg["datasets"][0], "path": str(self.data[f"{mode}-eval"])}]
            cfg["eval_steps"] = 3
        return cfg

    def on_ranks(self) -> dict[str, dict[str, Any]]:
        """Every run on two ranks, as config by name."""

        def make(name: str, mode: str, *cut: int, **keys: Any) -> None:
            configs[name] = self.config("ranks", name, mode, *cut, **keys)

        configs: dict[str, dict[str, Any]] = {}
        for mode in MODES:
            make(f"{mode}-4x2", mode, 4, 2, eval_batch_size=4, aot_samples=2)
            make(f"{mode}-1x8", mode, 1, 8, eval_batch_size=5)
            make(f"{mode}-8x1", mode, 8, 1, save_steps=2)
            make(f"{mode}-repeats-count", mode, 8, 1)
            for step in RESUMED:
                half_way = self.work / "ranks" / f"{mode}-8x1" / f"checkpoint-{step}"
                make(f"{mode}-resumed-{step}", mode, 8, 1, resume_from_checkpoint=str(half_way))
            make(f"{mode}-micro_batch", mode, 4, 2, aot_batch="micro_batch")
            make(f"{mode}-not_finite", mode, *((4, 2) if mode == "paired" else (8, 1)))
            split = {"accelerator_config": {"split_batches": True}}
            make(f"{mode}-split", mode, 8, 2, **split)
        make("unpaired-balanced", "unpaired", 8, 1, **BALANCED)
        for name in REFUSED:
            refused = {name: name == "dispatch_batches"}
            make(f"paired-{name}", "paired", 8, 1, accelerator_config=refused)
        make("paired-lora", "paired", 4, 2, **LORA)
        for mode in MODES:
            make(f"{mode}-held", mode, 1, 8, **LORA)
            make(f"{mode}-graphs", mode, 2, 4, **LORA, **CHECKPOINTING)
        for place, (mode, _) in MEMORY.items():
            make(f"{mode}-memory-{place}", mode, 2, 4, **LORA)
        make("paired-images", "paired", 4, 2, **self.images)
        make("paired-images-held", "paired", 1, 8, **self.images)
        make("paired-images-micro_batch", "paired", 4, 2, aot_batch="micro_batch", **self.images)
        make("paired-on-adapter", "paired", 4, 2, **self.on_adapter)
        make("paired-precompute", "paired", 4, 2, precompute_ref_log_probs=True)
        make("unpaired-lora-precompute", "unpaired", 4, 2, precompute_ref_log_probs=True, **LORA)
        return configs

    def single(self, mode: str, name: str = "", **keys: Any) -> Run:
        """A run of one process with one micro-batch a step, trained once."""
        if mode + name not in self.singles:
            cut = keys.pop("cut", (STEP, 1))
            cfg = self.config("one", mode + name, mode, *cut, **keys)
            self.singles[mode + name] = train(cfg)
        return self.singles[mode + name]

    def run(self, name: str) -> Run:
        return Run.last(self.work / "ranks" / name)

    def problems(self, name: str) -> list[list[list[int]]]:
        """[rank][step] -> micro-batches, positives, sequences (see ``launch.py``)."""
        files = sorted((self.work / "ranks").glob(f"{name}.rank?.json"))
        return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def empty_bench(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("ranks"), tiny_model)


@pytest.fixture(scope="module")
def bench(empty_bench: Bench) -> Bench:
    bench = empty_bench
    jobs = []
    for name, cfg in bench.on_ranks().items():
        keys: dict[str, Any] = {"fault": "not_finite"} if name.endswith("not_finite") else {}
        if name.endswith("repeats-count"):
            keys["repeats"] = "count"
        if "-memory-" in name:
            keys["memory"] = MEMORY[name.split("-")[-1]][1]
        if name.endswith(REFUSED):
            keys["fails"] = "yes"
        jobs.append(job(cfg, **keys))
    code = on_ranks(jobs, bench.work / "log", timeout=1200)
    assert code == 0, f"the ranks failed with {code}:\n{log(bench.work / 'log')[-8000:]}"
    return bench


@pytest.fixture
def whole(bench: Bench) -> Callable[[str], Run]:
    return lambda mode: bench.single(mode, eval_batch_size=STEP, aot_samples=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", CUTS)
def test_two_ranks_train_as_one_process(
    mode: str, cut: str, bench: Bench, whole: Callable[[str], Run]
) -> None:
    whole = whole(mode)
    assert_same(bench.run(f"{mode}-{cut}"), whole, tolerance=ROUNDING)
    # The last step of an epoch was the shorter one, and each rank knew which of its rows count.
    per_row = 2 if mode == "paired" else 1
    problems = [
        [(parts, rows // per_row) for parts, _, rows in rank]
        for rank in bench.problems(f"{mode}-{cut}")
    ]
    full, last = CUTS[cut]
    assert problems == [2 * [full, full, of_rank] for of_rank in last]
    sorted_u, expected = (run.logged("aot/sorted_u") for run in (bench.run(f"{mode}-{cut}"), whole))
    assert sorted_u == expected
    for name in ("num_tokens", "mean_token_accuracy", "entropy"):
        values = pytest.approx(whole.logged(name), rel=TOLERANCE)
        assert bench.run(f"{mode}-{cut}").logged(name) == values, name


@pytest.mark.parametrize("mode", MODES)
def test_one_rank_answers_while_the_others_wait(
    mode: str, bench: Bench, whole: Callable[[str], Run]
) -> None:
    found = [
        {file.name: file.read_text() for file in run.checkpoint.parent.glob("aot/samples-*")}
        for run in (bench.run(f"{mode}-4x2"), whole(mode))
    ]
    assert sorted(found[0]) == [f"samples-eval-step{step}.jsonl" for step in (0, 3, 6)]
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_that_accelerate_divides_among_the_ranks(
    mode: str, bench: Bench, whole: Callable[[str], Run]
) -> None:
    assert_same(bench.run(f"{mode}-split"), whole(mode), tolerance=ROUNDING)


def test_balanced_labels_make_an_epoch_longer_than_the_data(bench: Bench) -> None:
    whole = bench.single("unpaired", "-balanced", **BALANCED)
    assert whole.logged("aot/sorted_u") == whole.logged("aot/sorted_v") == [8, 6] * 3
    assert_same(bench.run("unpaired-balanced"), whole, tolerance=ROUNDING)


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_t_be_whole_is_refused_on_every_rank(name: str, bench: Bench) -> None:
    for rank in range(2):
        trace = (bench.work / "ranks" / f"paired-{name}.rank{rank}.txt").read_text()
        assert f"ValueError: `accelerator_config: {{{name}: " in trace


@pytest.mark.parametrize("step", RESUMED)
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_has_the_same_rows_and_knows_which_are_repeated(
    mode: str, step: int, bench: Bench, whole: Callable[[str], Run]
) -> None:
    assert len(bench.problems(f"{mode}-resumed-{step}")[0]) == 6 - step
    assert_same(bench.run(f"{mode}-resumed-{step}"), whole(mode), tolerance=ROUNDING)


@pytest.mark.parametrize("mode", MODES)
def test_repeated_rows_that_count_make_another_run(
    mode: str, bench: Bench, whole: Callable[[str], Run]
) -> None:
    losses = bench.run(f"{mode}-repeats-count").logged("loss"), whole(mode).logged("loss")
    misses = [relative(a, b) for a, b in zip(*losses, strict=True)]
    assert misses[2] > 10 * TOLERANCE, f"the negative control agrees: {misses}"
    run = bench.run(f"{mode}-repeats-count")
    assert run.logged("num_tokens")[-1] > whole(mode).logged("num_tokens")[-1]


@pytest.mark.parametrize("mode", MODES)
def test_repeated_rows_inside_micro_batches(mode: str, bench: Bench) -> None:
    """The mean over micro-batches is that of one process, which has none that is all repeated."""
    keys = {"cut": (4, 4), "aot_batch": "micro_batch"}
    whole = bench.single(mode, "-micro_batch", **keys)
    assert_same(bench.run(f"{mode}-micro_batch"), whole, tolerance=ROUNDING)


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


@pytest.fixture(scope="module")
def three(empty_bench: Bench) -> Bench:
    bench = empty_bench
    cuts = {"paired-21": (2, 2), "unpaired-21": (2, 2), "paired-3": (2, 1)}
    configs = [
        bench.config("ranks", f"three-{data}", data.split("-")[0], *cut, data=data, num_epochs=6)
        for data, cut in cuts.items()
    ]
    code = on_ranks(list(map(job, configs)), bench.work / "three", ranks=3, timeout=600)
    assert code == 0, f"the ranks failed with {code}:\n{log(bench.work / 'three')[-8000:]}"
    return bench


@pytest.mark.parametrize(
    ("data", "rows", "last"), [("paired-21", 12, 9), ("unpaired-21", 12, 9), ("paired-3", 6, 3)]
)
def test_three_ranks_train_as_one_process(data: str, rows: int, last: int, three: Bench) -> None:
    mode = data.split("-")[0]
    whole = three.single(mode, f"-{data}", data=data, cut=(rows, 1), num_epochs=6)
    assert_same(three.run(f"three-{data}"), whole, tolerance=ROUNDING)
    problems = three.problems(f"three-{data}")
    assert len(problems) == 3
    assert sum(rank[-1][2] for rank in problems) == last * (2 if mode == "paired" else 1)


def test_lora(bench: Bench) -> None:
    assert_same(bench.run("paired-lora"), bench.single("paired", "-lora", **LORA))


def test_images(bench: Bench) -> None:
    single = bench.single("paired", "-images", **bench.images)
    for cut in ("", "-held"):
        assert_same(bench.run(f"paired-images{cut}"), single)
    with pytest.raises(AssertionError):
        assert_same(bench.run("paired-images-micro_batch"), single, tolerance=10 * TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["held", "graphs", "1x8"])
def test_second_passes_are_saved(
    mode: str, name: str, bench: Bench, whole: Callable[[str], Run]
) -> None:
    """All but the last micro-batch of a rank, whose backward pass synchronizes the gradients."""
    single = whole(mode) if name == "1x8" else bench.single(mode, "-lora", **LORA)
    assert_same(bench.run(f"{mode}-{name}"), single)
    for rank in range(2):
        path = bench.work / "ranks" / f"{mode}-{name}.rank{rank}.carries"
        first, *steps = json.loads(path.read_text())
        assert first[-1] == "Rescore"
        for carries in steps:
            assert carries[-1] == "Rescore" and carries.count("Rescore") == 1, carries
            assert ("HoldGradient" in carries) == (name == "held")


@pytest.mark.parametrize("place", MEMORY)
def test_a_rank_that_runs_out_of_memory(place: str, bench: Bench) -> None:
    """It makes more passes than the other one, which waits; the gradient is the same."""
    mode, _ = MEMORY[place]
    name = f"{mode}-memory-{place}"
    assert_same(bench.run(name), bench.single(mode, "-lora", **LORA))
    files = (bench.work / "ranks" / f"{name}.rank{rank}.retries" for rank in range(2))
    roomy, limited = (json.loads(file.read_text()) for file in files)
    assert not any(roomy)
    # What is scored in halves is no retry of the step.
    assert any(limited) is (place != "scoring")


def test_on_an_adapter(bench: Bench) -> None:
    run = bench.run("paired-on-adapter")
    assert_same(run, bench.single("paired", "-on-adapter", **bench.on_adapter))
    # Against its copy, not the base model: the first step knows no margins.
    assert abs(run.logged("rewards/margins")[0]) < 1e-4


def test_precomputed_reference(bench: Bench, whole: Callable[[str], Run]) -> None:
    assert_same(bench.run("paired-precompute"), whole("paired"))


def test_lora_and_precomputed_reference(bench: Bench) -> None:
    # One process takes the reference by disabling the adapter in every step.
    assert_same(bench.run("unpaired-lora-precompute"), bench.single("unpaired", "-lora", **LORA))


@pytest.mark.parametrize("mode", MODES)
def test_every_rank_raises_where_one_is_not_finite(mode: str, bench: Bench) -> None:
    sequences = 16 if mode == "paired" else 8  # those of the last rank
    assert_every_rank_raised(bench.work / "ranks" / f"{mode}-not_finite", sequences, 2 * sequences)


def test_torchrun_trains_and_ends_when_a_rank_dies(
    bench: Bench, whole: Callable[[str], Run], tmp_path: Path
) -> None:
    """The other runs on ranks are not started by torchrun, which would import the host anew."""
    first, second = (bench.config("torchrun", name, "paired", 4, 2) for name in ("whole", "dies"))
    code = torchrun([job(first), job(second, fault="die")], tmp_path, timeout=400)
    assert code == 1
    assert_same(Run.last(Path(first["output_dir"])), whole("paired"), tolerance=ROUNDING)
    text = log(tmp_path)
    assert "Starting trainer" in text and "exitcode: 1" in text
    assert "done" not in text
