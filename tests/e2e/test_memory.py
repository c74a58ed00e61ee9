"""What a step keeps in memory: exact in every proportion, within its budget, and cut when it fails.

Running out of memory is simulated (``limited_memory``).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import LORA, Cutter, assert_differs, assert_same
from limited_memory import Memory, limited
from torch import Tensor

from aot_plugin.host import steps
from aot_plugin.step import budget, engine
from aot_plugin.step.record import watched_steps

pytestmark = pytest.mark.slow

CHECKPOINTING: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}
CHECKPOINTING["checkpointed"]["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
SOME = 0.3


@pytest.mark.parametrize(
    ("mode", "how"), [("paired", "plain"), ("unpaired", "checkpointed"), ("paired", "reentrant")]
)
def test_graphs_are_kept_within_a_budget(
    mode: str, how: str, tiny_model: Path, tmp_path: Path
) -> None:
    """A budget for no graph beyond the free one, for some, and for all: the same run."""
    keys = {**LORA, "learning_rate": 0.01, **CHECKPOINTING[how]}
    cutter = Cutter(tmp_path, tiny_model, mode, **keys)
    whole = cutter.run(16, 1)
    with watched_steps() as everything:
        assert_same(cutter.run(2, 8), whole)
    # The first graph is measured in the first step, and all are kept from the second on.
    counts = [step.carries.count("KeepGraph") for step in everything]
    assert counts == [1, 8, 8, 8, 8]
    assert all(len([p for p in s.passes if p.gradient]) == 8 for s in everything)
    of_all = min(step.kept_bytes for step in everything[1:])

    limit = SOME * of_all
    with watched_steps() as some:
        assert_same(cutter.run(2, 8, aot_kept_memory=limit / steps.GIB), whole)
    for step in some[1:]:
        assert 1 < step.carries.count("KeepGraph") < 8
        # One graph is free, since its backward pass comes next.
        assert step.kept_bytes <= limit + of_all / 4
    with watched_steps() as none:
        assert_same(cutter.run(2, 8, aot_kept_memory=0), whole)
    assert [step.carries.count("KeepGraph") for step in none] == 5 * [1]
    assert_differs(cutter.run(2, 8, aot_batch="micro_batch"), whole)


def test_where_graphs_come_first(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: gradients are held of the pairs whose graphs do not fit."""
    monkeypatch.setattr(engine, "graphs_come_first", lambda device: True)
    monkeypatch.setattr(budget, "HELD_SHARE", 100.0)
    cutter = Cutter(tmp_path, tiny_model, "paired", **LORA, learning_rate=0.01)
    whole = cutter.run(16, 1)
    with watched_steps() as all_fit:
        assert_same(cutter.run(1, 16), whole)
    assert all_fit[0].carries.count("HoldGradient") == 15
    assert all(step.carries == ["KeepGraph"] * 16 for step in all_fit[1:])
    limit = SOME * min(step.kept_bytes for step in all_fit[1:]) / steps.GIB
    with watched_steps() as some_fit:
        assert_same(cutter.run(1, 16, aot_kept_memory=limit), whole)
    for step in some_fit[1:]:
        counts = {kind: step.carries.count(kind) for kind in step.carries}
        assert counts.keys() == {"HoldGradient", "KeepGraph"} and min(counts.values()) > 1
    assert_differs(cutter.run(1, 16, aot_batch="micro_batch"), whole)


def test_full_fine_tuning_keeps_graphs(tiny_model: Path, tmp_path: Path) -> None:
    cutter = Cutter(tmp_path, tiny_model, "paired", learning_rate=0.001)
    whole = cutter.run(16, 1)
    with watched_steps() as records:
        assert_same(cutter.run(1, 16), whole)
    assert [step.carries.count("KeepGraph") for step in records] == [1, 16, 16, 16, 16]
    assert_differs(cutter.run(1, 16, aot_batch="micro_batch"), whole)


# A micro-batch of two pairs takes some 100 to 160 tokens.
PLACES: dict[str, tuple[str, dict[str, Any], tuple[int, int], dict[str, Any]]] = {
    "scoring": ("paired", {"scoring": 70}, (2, 8), {}),
    "a graph that is kept": ("unpaired", {"graphs": 250}, (2, 8), {}),
    "a second forward pass": ("paired", {"graphs": 70}, (2, 8), {"aot_kept_memory": 0}),
    "backward, a kept graph": ("unpaired", {"backward": 70}, (2, 8), {}),
    "backward, a second pass": ("paired", {"backward": 70}, (2, 8), {"aot_kept_memory": 0}),
    "one micro-batch, forward": ("paired", {"graphs": 300}, (16, 1), {}),
    "one micro-batch, backward": ("unpaired", {"backward": 300}, (16, 1), {}),
    "everywhere": ("paired", {"graphs": 70, "scoring": 80, "backward": 60}, (4, 4), {}),
    "everywhere, one by one": ("unpaired", {"graphs": 60, "scoring": 60}, (4, 4), {}),
}


@pytest.fixture(scope="module")
def wholes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A cutter and its run of one micro-batch a step, for each mode."""
    found = {}
    for mode in ("paired", "unpaired"):
        folder = tmp_path_factory.mktemp(mode)
        cutter = Cutter(folder, tiny_model, mode, **LORA, learning_rate=0.01, max_steps=5)
        found[mode] = cutter, cutter.run(16, 1)
    return found


@pytest.mark.parametrize("place", PLACES)
def test_a_micro_batch_that_does_not_fit_is_cut(place: str, wholes: dict[str, Any]) -> None:
    mode, sizes, cut, keys = PLACES[place]
    cutter, whole = wholes[mode]
    # Labelled rows hold fewer tokens than pairs.
    scale = 1.0 if mode == "paired" else 0.4
    memory = Memory(**{name: scale * size for name, size in sizes.items()})
    with limited(memory) as said, watched_steps() as records:
        assert_same(cutter.run(*cut, **keys), whole)
    assert memory.failures > 0
    assert memory.most_alive <= memory.graphs
    assert said and all("out of memory" in line or "ran out" in line for line in said)
    # What did not fit once is remembered, in the step itself and in the later ones.
    assert max(step.retries for step in records) <= 4
    assert records[-1].retries == 0


def test_a_held_gradient_that_does_not_fit(
    wholes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass fails, and what is held is given up: second passes take its place."""
    monkeypatch.setattr(budget, "HELD_SHARE", 100.0)
    cutter, whole = wholes["paired"]
    memory = Memory(graphs=1e9)
    with limited(memory), watched_steps() as records:
        seen = memory.enter

        def once(hidden: Tensor) -> Tensor:
            if hidden.requires_grad and not memory.failures:
                memory.fail()
            return seen(hidden)

        memory.enter = once  # type: ignore[method-assign]
        assert_same(cutter.run(1, 16), whole)
    assert memory.failures == 1
    assert records[0].carries == ["HoldGradient"] * 16
    assert records[1].carries == ["Rescore"] * 16
    assert records[1].retries == 1


def test_an_evaluation_that_does_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    keys = {"val_set_size": 16, "eval_steps": 2, "eval_batch_size": 8, "max_steps": 4}
    cutter = Cutter(tmp_path, tiny_model, "paired", rows=80, **LORA, learning_rate=0.01, **keys)
    whole = cutter.run(16, 1)
    memory = Memory(scoring=200)
    with limited(memory) as said:
        run = cutter.run(16, 1)
    assert memory.failures > 0 and said
    assert run.logged("eval_loss") == pytest.approx(whole.logged("eval_loss"), rel=1e-5)


def test_one_row_that_does_not_fit_says_what_to_lower(tiny_model: Path, tmp_path: Path) -> None:
    cutter = Cutter(tmp_path, tiny_model, "unpaired", **LORA)
    memory = Memory(graphs=10)
    with limited(memory), pytest.raises(torch.OutOfMemoryError) as failed:
        cutter.run(2, 8)
    assert "lower `micro_batch_size` or `sequence_len`" in "\n".join(failed.value.__notes__)


def test_a_random_network_is_not_cut(tiny_model: Path, tmp_path: Path) -> None:
    """A second pass would be another network."""
    keys = {"overrides_of_model_config": {"attention_dropout": 0.3}}
    cutter = Cutter(tmp_path, tiny_model, "paired", **LORA, **keys)
    with limited(Memory(graphs=300)), pytest.raises(torch.OutOfMemoryError) as failed:
        cutter.run(16, 1)
    assert "lower `micro_batch_size`" in "\n".join(failed.value.__notes__)


def test_out_of_memory_before_a_step_begins(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is scored yet, so nothing can be done again."""
    micro_batch = steps.StepsMixin._micro_batch

    def failing(self: Any, batch: Any) -> Any:
        if self.is_in_train and self.state.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return micro_batch(self, batch)

    monkeypatch.setattr(steps.StepsMixin, "_micro_batch", failing)
    cutter = Cutter(tmp_path, tiny_model, "paired", **LORA)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        cutter.run(4, 4)
