"""Which carries a step gets, and how large graphs are predicted and measured to be."""

import math

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aot_plugin.step.budget import (
    CARRIES,
    CPU_SHARE,
    HOLD,
    KEEP,
    RESCORE,
    Allocations,
    Budget,
    GraphSizes,
    Permits,
    allot,
)

ALL, NOTHING = Permits(None, None), Permits("no", "no")
DDP = Permits(None, None, synchronizes=True)


@given(
    st.lists(st.floats(1, 100), min_size=1, max_size=12),
    st.floats(0, 500),
    st.integers(0, 14),
    st.booleans(),
    st.booleans(),
)
def test_no_allotment_exceeds_its_budget(
    graphs: list[float], budget: float, fit: int, synchronizes: bool, graphs_first: bool
) -> None:
    permits = Permits(None, None, synchronizes=synchronizes)
    kinds = allot(graphs, permits, fit=fit, budget=budget, graphs_first=graphs_first)
    assert len(kinds) == len(graphs) and set(kinds) <= set(CARRIES)
    assert kinds.count(HOLD) <= fit
    kept = [graph for graph, kind in zip(graphs, kinds, strict=True) if kind == KEEP]
    # The first of them is free, since its backward pass comes next.
    assert sum(kept[1:]) <= budget
    if synchronizes:
        assert kinds[-1] == RESCORE
    elif graphs_first or len(graphs) > fit:
        assert kept
    refused = [g for g, kind in zip(graphs, kinds, strict=True) if kind == RESCORE]
    left = budget - sum(kept[1:])
    assert all(graph > left for graph in (refused[:-1] if synchronizes else refused))


def test_allotments() -> None:
    unknown = [math.inf] * 4
    assert allot(unknown, ALL, fit=0, budget=1e9) == [KEEP, RESCORE, RESCORE, RESCORE]
    assert allot([9.0, 3, 2, 1], ALL, fit=0, budget=4) == [KEEP, KEEP, RESCORE, KEEP]
    assert allot([9.0, 3, 2, 1], ALL, fit=2, budget=1) == [HOLD, HOLD, KEEP, KEEP]
    assert allot([9.0, 3, 2, 1], DDP, fit=9, budget=9) == [HOLD, HOLD, HOLD, RESCORE]
    assert allot([9.0], DDP, fit=9, budget=9) == [RESCORE]
    assert allot([9.0, 3], NOTHING, fit=2, budget=99) == [RESCORE, RESCORE]


def test_allotments_where_graphs_come_first() -> None:
    def found(graphs: list[float], permits: Permits, fit: int, budget: float) -> list[str]:
        return allot(graphs, permits, fit=fit, budget=budget, graphs_first=True)

    assert found([math.inf] * 4, ALL, fit=2, budget=1e9) == [KEEP, HOLD, HOLD, RESCORE]
    assert found([9.0, 3, 2, 1], ALL, fit=9, budget=3) == [KEEP, KEEP, HOLD, HOLD]
    assert found([9.0, 3, 2, 1], DDP, fit=9, budget=2) == [KEEP, HOLD, KEEP, RESCORE]
    assert found([9.0, 3], Permits("no", None), fit=1, budget=99) == [HOLD, RESCORE]
    assert found([9.0, 3], NOTHING, fit=2, budget=99) == [RESCORE, RESCORE]


def test_predictions_grow_with_tokens_and_width() -> None:
    sizes = GraphSizes()
    assert not sizes.covers(1) and sizes.predict(1, 1) == math.inf
    sizes.learn(2, 100, 2_000)
    assert sizes.covers(100) and not sizes.covers(101)
    assert sizes.predict(2, 100) == 2_000
    assert sizes.predict(4, 50) == 2_000
    assert sizes.predict(1, 200) == 4_000  # twice as wide: four times the scores of attention
    sizes.learn(1, 200, 3_000)
    assert sizes.predict(2, 100) == 3_000  # the most per token that was seen


def test_a_budget_of_the_cpu() -> None:
    machine = psutil.virtual_memory().total
    device = torch.device("cpu")
    assert Budget(device, 2).of_step(100) == machine * CPU_SHARE / 2
    limited = Budget(device, 1, limit=1000)
    assert limited.of_step(100) == 1000
    limited.lower(600)
    assert limited.of_step(100) == 300


def test_a_budget_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the arithmetic of an allocator whose numbers are given; none is here to ask."""
    says = {"memory_allocated": 100, "max_memory_allocated": 900, "memory_reserved": 150}
    for name, value in {**says, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1950, 4000))
    device = torch.device("cuda")
    budget = Budget(device, 1)
    assert budget.of_step(50) == 0  # the first step shows what it needs: 900 - 100
    budget.step_ended()
    assert budget.of_step(50) == pytest.approx(0.8 * (1950 + 150 - 100) - 800)
    assert budget.of_step(80) == pytest.approx(0.8 * 2000 - 1.6 * 800)  # a larger micro-batch
    assert budget.of_step(200) == 0
    budget.lower(400)
    assert budget.of_step(50) == 200


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_graph_is_measured_as_what_it_holds(checkpointing: bool) -> None:
    """Against the sizes that saved tensors have by hand."""
    layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
    given = torch.randn(16, 8)
    with Allocations() as made:
        x = given
        for layer in layers:
            if checkpointing:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
    # Tanh keeps its output, which is the next layer's input; checkpointing keeps the inputs. The
    # first input was there before.
    assert made.nbytes == 3 * given.nbytes
    del x
    assert made.nbytes == 0
