"""Second-order dominance: loss, statistics and test, against quadrature and closed forms."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.integrate import quad

from aot_plugin.ot.dominance import bootstrap_intervals, dominance_statistics
from aot_plugin.ot.losses import LossOptions, UnpairedLogps, transport
from aot_plugin.ot.penalties import PENALTIES, smoothed
from aot_plugin.ot.second_order import (
    STATISTICS,
    integrated_gap,
    second_order_statistics,
    second_order_test,
    statistics_of_sorted,
)
from aot_plugin.ot.transport import transport_value

samples = npst.arrays(
    np.float64, st.integers(1, 7), elements=st.integers(-24, 24).map(lambda k: k / 8)
)


def gap_integral(u: np.ndarray, v: np.ndarray, t: float) -> float:
    """I(t) by the definition: the sums of the worst shares of both samples."""

    def worst(x: np.ndarray) -> float:
        x, full = np.sort(x), int(t * len(x))
        rest = x[full] * (t - full / len(x)) if full < len(x) else 0.0
        return float(x[:full].sum() / len(x) + rest)

    return worst(u) - worst(v)


def quadrature(u: np.ndarray, v: np.ndarray, h: Any) -> float:
    """The integral of h(I(t)) over (0, 1), in small pieces, by another rule than ours."""
    ends = np.unique(np.concatenate([np.arange(n + 1) / n for n in (len(u), len(v), 64)]))
    pieces = (
        quad(lambda t: h(gap_integral(u, v, t)), a, b, limit=200)[0] for a, b in pairwise(ends)
    )
    return sum(pieces)


@given(samples, samples)
@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_the_value_is_the_integral(name: str, u: np.ndarray, v: np.ndarray) -> None:
    h = smoothed(PENALTIES[name], 0.2)

    def cost(z: torch.Tensor) -> torch.Tensor:
        return h(z, 0.3)

    found = transport_value(
        torch.from_numpy(u), torch.from_numpy(v), cost, order="second", kinks=(0.3, -0.3)
    )
    expected = quadrature(u, v, lambda z: cost(torch.tensor(z, dtype=torch.float64)).item())
    assert found.item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logps, ref_logps = 4 * torch.randn(2, 11, generator=generator).double()
    is_positive = torch.arange(11) % 3 == 0

    def loss(x: torch.Tensor, order: Any = "second") -> torch.Tensor:
        step = UnpairedLogps(x, ref_logps, is_positive, torch.ones(11).double())
        return transport(step, LossOptions(PENALTIES[name], 0.4, order=order))

    assert torch.autograd.gradcheck(loss, logps.requires_grad_())
    # The negative control: first order is another function.
    first, second = (torch.autograd.grad(loss(logps, o), logps)[0] for o in ("first", "second"))
    assert (first - second).norm() > 0.1 * first.norm()


def test_the_worst_responses_get_the_weight() -> None:
    """A gap at level s is part of I(t) for every t above s, so that a worst row weighs most."""
    u, v = torch.zeros(8).double(), torch.arange(8.0).double()
    u = (v + 0.01 * torch.arange(8)).requires_grad_()
    cost = lambda z: PENALTIES["logistic"](z, 1.0)  # noqa: E731
    (gradient,) = torch.autograd.grad(transport_value(u, v, cost, order="second"), u)
    assert (gradient[1:] > gradient[:-1]).all() and gradient[-1] < 0


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(
    "masses", [None, [1.0, 3.0, 2.0, 2.0, 1.0, 1.0]], ids=["alike", "weighted"]
)
def test_equal_values_share_their_gradient(order: Any, masses: list[float] | None) -> None:
    """Before the first step all logratios are 0, and the order of the rows must not matter."""
    mass = None if masses is None else torch.tensor(masses).double()
    logps = torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0, -3.0]).double().requires_grad_()
    is_positive = torch.tensor([True, True, True, False, False, False])
    step = UnpairedLogps(logps, torch.zeros(6).double(), is_positive, torch.ones(6).double(), mass)
    options = LossOptions(PENALTIES["logistic"], 0.4, order=order)
    (gradient,) = torch.autograd.grad(transport(step, options), logps)
    per_mass = gradient if mass is None else gradient / mass
    assert per_mass[0] == pytest.approx(per_mass[1])
    assert per_mass[3] == pytest.approx(per_mass[4])
    assert gradient.abs().min() > 0


@given(samples, samples)
def test_statistics_are_integrals(u: np.ndarray, v: np.ndarray) -> None:
    found = second_order_statistics(u, v)
    levels, integral = integrated_gap(u, v)
    for t, value in zip(levels, integral, strict=True):
        assert value == pytest.approx(gap_integral(u, v, t), abs=1e-12)
    t = (np.arange(20_000) + 0.5) / 20_000
    dense = np.interp(t, levels, integral)
    for key, values in zip(
        STATISTICS, (dense < -1e-12, np.maximum(-dense, 0), np.maximum(dense, 0)), strict=True
    ):
        assert found[key] == pytest.approx(values.mean(), abs=2e-3), key
    mean = found["second_order_dominance_amount"] - found["second_order_violation_amount"]
    assert mean == pytest.approx(np.trapezoid(integral, levels))
    if dominance_statistics(u, v)["violation_amount"] == 0:
        assert found["second_order_violation_amount"] < 1e-12


def test_masses_in_whole_numbers_are_repeated_values() -> None:
    random = np.random.default_rng(0)
    u, v = random.normal(size=6), random.normal(size=9)
    many, few = random.integers(1, 4, 6), random.integers(1, 4, 9)
    repeated = second_order_statistics(np.repeat(u, many), np.repeat(v, few))
    assert second_order_statistics(u, v, many, few) == pytest.approx(repeated)


def test_a_spread_is_dominated_in_the_second_order_only() -> None:
    narrow = np.linspace(-1, 1, 40)
    first, second = (
        dominance_statistics(narrow, 3 * narrow),
        second_order_statistics(narrow, 3 * narrow),
    )
    assert first["violation_amount"] > 0.4
    assert second["second_order_violation_amount"] < 1e-12
    intervals = bootstrap_intervals(
        narrow, 3 * narrow, False, n_resamples=50, statistics=statistics_of_sorted
    )
    assert set(intervals) == set(STATISTICS)
    low, high = intervals["second_order_dominance_amount"]
    assert low < second["second_order_dominance_amount"] < high


@pytest.mark.parametrize("paired", [True, False])
def test_the_test_has_its_level_and_power(paired: bool) -> None:
    random = np.random.default_rng(1)

    def p_value(scale: float, shift: float, n: int) -> float:
        x, y = random.normal(size=(2, n))
        # Rows depend on each other, as policy and reference do.
        v = (x + y) / 2**0.5 if paired else y
        return second_order_test(scale * x + shift, v, paired, n_resamples=199).p_value

    equal = np.array([p_value(1.0, 0.0, 60) for _ in range(150)])
    assert (equal < 0.05).mean() < 0.12
    wide = np.array([p_value(3.0, 0.0, 200) for _ in range(20)])  # the same mean, but riskier
    assert (wide < 0.05).mean() > 0.9
    better = np.array([p_value(0.5, 0.3, 60) for _ in range(20)])
    assert better.min() > 0.2
