"""Graded rows: each level with the next lower one, against linear programs, and in every step."""

from itertools import pairwise

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aot_plugin.data.sampler import StratifiedSampler
from aot_plugin.ot.dominance import dominance_statistics
from aot_plugin.ot.losses import (
    LossOptions,
    UnpairedLogps,
    of_means,
    over_levels,
    transport,
    with_sft,
)
from aot_plugin.ot.penalties import PENALTIES
from aot_plugin.step.metrics import step_metrics

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
N = 23


def graded(
    levels: tuple[float, ...] = LEVELS, weighted: bool = False, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """logps, reference, labels, tokens and masses of rows with these levels, in no order."""
    generator = torch.Generator().manual_seed(seed)
    logps, ref = (torch.randn(2, N, generator=generator).double() * 3 - 8).unbind()
    label = torch.tensor(levels).double()[torch.arange(N) % len(levels)]
    label = label[torch.randperm(N, generator=generator)]
    tokens = torch.randint(1, 9, (N,), generator=generator).double()
    mass = torch.rand(N, generator=generator).double() + 0.1 if weighted else torch.ones(N).double()
    return logps, ref, label, tokens, mass


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("penalty", sorted(PENALTIES))
def test_value_and_gradient_are_those_of_the_linear_programs(penalty: str, weighted: bool) -> None:
    logps, ref, label, tokens, mass = graded(weighted=weighted)
    options = LossOptions(PENALTIES[penalty], beta=0.7)
    logps.requires_grad_()
    step = UnpairedLogps.from_sequences(logps, ref, label, tokens, mass)
    loss = over_levels(transport)(step, options)
    (gradient,) = torch.autograd.grad(loss, logps)
    scores = (logps - ref).detach()
    value, expected = 0.0, torch.zeros(N).double()
    for low, high in pairwise(LEVELS):
        rows, others = (label == high).nonzero()[:, 0], (label == low).nonzero()[:, 0]
        z = (scores[rows][:, None] - scores[others][None, :]).requires_grad_()
        cost = PENALTIES[penalty](z, 0.7)
        (slope,) = torch.autograd.grad(cost.sum(), z)
        a, b = ((mass[i] / mass[i].sum()).numpy() for i in (rows, others))
        plan = torch.from_numpy(ot.emd(a, b, cost.detach().numpy(), check_marginals=True))
        value += (plan * cost.detach()).sum().item() / 4
        expected.index_add_(0, rows, (plan * slope).sum(1) / 4)
        expected.index_add_(0, others, -(plan * slope).sum(0) / 4)
    assert loss.item() == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    # Two labels would say something else.
    two = UnpairedLogps.from_sequences(logps, ref, (label == 1).double(), tokens, mass)
    assert abs(transport(two, options).item() - value) > 1e-3


def test_gradient_by_finite_differences() -> None:
    logps, ref, label, tokens, mass = graded(weighted=True)
    options = LossOptions(PENALTIES["logistic"], beta=0.7, sft_weight=0.3, order="second")
    loss = with_sft(over_levels(of_means(transport)))
    assert torch.autograd.gradcheck(
        lambda x: loss(UnpairedLogps.from_sequences(x, ref, label, tokens, mass), options),
        logps.requires_grad_(),
    )


def test_two_levels_are_two_labels_to_the_bit() -> None:
    logps, ref, label, tokens, mass = graded((0.0, 1.0), weighted=True)
    options = LossOptions(PENALTIES["logistic"], beta=0.1)
    values = [
        over_levels(transport)(step, options)
        for step in (
            UnpairedLogps.from_sequences(logps, ref, label, tokens, mass),
            UnpairedLogps.from_sequences(logps, ref, label.bool(), tokens, mass),
        )
    ]
    plain = transport(UnpairedLogps(logps, ref, label.bool(), tokens, mass), options)
    assert values[0] == values[1] == plain


def test_a_missing_level_is_bridged() -> None:
    """The highest level is compared with the lowest one if nothing is between them."""
    logps, ref, label, tokens, mass = graded((0.0, 0.5, 1.0))
    options = LossOptions(PENALTIES["logistic"], beta=0.5)
    kept = label != 0.5
    without = [column[kept] for column in (logps, ref, label, tokens, mass)]
    loss = over_levels(transport)(UnpairedLogps.from_sequences(*without), options)
    both = UnpairedLogps(without[0], without[1], without[2] == 1, without[3])
    assert loss == transport(both, options)
    # Without the highest one, the middle is above the lowest.
    kept = label != 1
    lower = [column[kept] for column in (logps, ref, label, tokens, mass)]
    step = UnpairedLogps.from_sequences(*lower)
    middle = UnpairedLogps(lower[0], lower[1], lower[2] == 0.5, lower[3])
    assert over_levels(transport)(step, options) == transport(middle, options)
    found = step_metrics(step, beta=0.1)
    assert found["aot/w1"] == dominance_statistics(middle.u.numpy(), middle.v.numpy())["w1"]
    assert {"rewards/chosen", "aot/nll"}.isdisjoint(found)


@pytest.mark.parametrize("level", LEVELS)
def test_one_level_says_nothing(level: float) -> None:
    logps, ref, label, tokens, mass = graded((level,))
    logps.requires_grad_()
    step = UnpairedLogps.from_sequences(logps, ref, label, tokens, mass)
    loss = over_levels(transport)(step, LossOptions(PENALTIES["logistic"], beta=0.5))
    assert loss == 0 and not torch.autograd.grad(loss, logps)[0].any()
    assert step.comparisons == ()
    with pytest.raises(ValueError, match="one label"):
        step_metrics(step, beta=0.1)


def test_statistics_are_means_over_neighbouring_levels() -> None:
    logps, ref, label, tokens, mass = graded(weighted=True)
    step = UnpairedLogps.from_sequences(logps, ref, label, tokens, mass)
    found = step_metrics(step, beta=0.1)
    scores = (logps - ref).numpy()
    parts = []
    for low, high in pairwise(LEVELS):
        u, v = (label == high).numpy(), (label == low).numpy()
        parts.append(dominance_statistics(scores[u], scores[v], mass[u].numpy(), mass[v].numpy()))
    for name, value in parts[0].items():
        assert found[f"aot/{name}"] == pytest.approx(np.mean([part[name] for part in parts]))
        assert value != found[f"aot/{name}"]
    top = label == 1
    mean = (mass * (logps - ref))[top].sum() / mass[top].sum()
    assert found["rewards/chosen"] == pytest.approx(0.1 * mean.item())


@given(
    st.lists(st.sampled_from(LEVELS), min_size=1, max_size=80),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_the_sampler_keeps_the_proportions_of_all_levels(
    levels: list[float], block: int, seed: int
) -> None:
    order = list(StratifiedSampler(levels, block, seed))
    assert sorted(order) == list(range(len(levels)))
    for end in (*range(block, len(levels), block), len(levels)):
        for level in LEVELS:
            so_far = sum(levels[row] == level for row in order[:end])
            assert abs(so_far - end * levels.count(level) / len(levels)) <= 1


def test_two_levels_have_the_order_of_two_labels() -> None:
    labels = [i % 3 == 0 for i in range(50)]
    as_levels = [float(label) for label in labels]
    assert list(StratifiedSampler(labels, 8, 3)) == list(StratifiedSampler(as_levels, 8, 3))
