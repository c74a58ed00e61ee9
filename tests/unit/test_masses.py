"""Unequal masses against linear programs, finite differences, and rows repeated as often."""

from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aot_plugin.ot import coupling
from aot_plugin.ot.dominance import (
    GAP_PERCENTS,
    bootstrap_intervals,
    dominance_statistics,
    quantile_curve,
)
from aot_plugin.ot.losses import (
    LossOptions,
    PairedLogps,
    StepLogps,
    UnpairedLogps,
    negative_log_likelihood,
    transport,
    with_sft,
)
from aot_plugin.ot.order_tests import almost_dominance, violation_ratio
from aot_plugin.ot.penalties import PENALTIES, logistic
from aot_plugin.ot.transport import transport_value
from aot_plugin.report.scores import Scores
from aot_plugin.report.summary import NO_TEST, accuracy, summarize
from aot_plugin.step.metrics import step_metrics

values = st.integers(-40, 40).map(lambda k: k / 8)
weighted = st.lists(st.tuples(values, st.integers(1, 5)), min_size=1, max_size=9)


@pytest.fixture(params=sorted(PENALTIES))
def cost(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    penalty = PENALTIES[request.param]
    return lambda z: penalty(z, 0.7)


def sample(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Values, and masses that no common unit divides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator).double() * 3
    return x, torch.rand(size, generator=generator).double() * 10 + 0.01


def unzipped(rows: list[tuple[float, int]]) -> tuple[list[float], list[int], list[float]]:
    """Values, masses, and the values repeated as often as their masses say."""
    x, mass = map(list, zip(*rows, strict=True))
    return x, mass, np.repeat(x, mass).tolist()


# Transport.


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (8, 8), (7, 12), (30, 17)])
def test_value_and_gradient_equal_the_linear_program(n: int, m: int, cost: Any) -> None:
    (u, u_mass), (v, v_mass) = sample(n, seed=n), sample(m, seed=100 + m)
    z = (u[:, None] - v[None, :]).requires_grad_()
    costs = cost(z)
    (slopes,) = torch.autograd.grad(costs.sum(), z)
    a, b = (u_mass / u_mass.sum()).numpy(), (v_mass / v_mass.sum()).numpy()
    plan = torch.from_numpy(ot.emd(a, b, costs.detach().numpy(), check_marginals=True))
    u.requires_grad_(), v.requires_grad_()
    value = transport_value(u, v, cost, u_mass=u_mass, v_mass=v_mass)
    expected = ot.emd2(a, b, costs.detach().numpy())
    assert value.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)
    du, dv = torch.autograd.grad(value, (u, v))
    torch.testing.assert_close(du, (plan * slopes).sum(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dv, -(plan * slopes).sum(0), rtol=1e-9, atol=1e-12)
    if n > 1:  # the masses matter
        assert abs(transport_value(u, v, cost).item() - expected) > 1e-3 * expected


def test_gradient_equals_finite_differences(cost: Any) -> None:
    (u, u_mass), (v, v_mass) = sample(9, seed=0), sample(6, seed=1)
    masses = {"u_mass": u_mass, "v_mass": v_mass}
    assert torch.autograd.gradcheck(
        lambda u, v: transport_value(u, v, cost, **masses), (u.requires_grad_(), v.requires_grad_())
    )


@given(weighted, weighted)
def test_whole_masses_are_rows_repeated_as_often(u_rows: Any, v_rows: Any) -> None:
    (u, u_mass, more_u), (v, v_mass, more_v) = unzipped(u_rows), unzipped(v_rows)
    tensors = [torch.tensor(x).double() for x in (u, v, u_mass, v_mass, more_u, more_v)]
    for penalty in PENALTIES.values():
        found = transport_value(
            *tensors[:2], lambda z, h=penalty: h(z, 0.5), "hard", 0.1, *tensors[2:4]
        )
        torch.testing.assert_close(
            found, transport_value(*tensors[4:], lambda z, h=penalty: h(z, 0.5))
        )


@given(weighted, weighted)
def test_whole_masses_are_exact_marginals(u_rows: Any, v_rows: Any) -> None:
    masses = [np.array(unzipped(rows)[1], dtype=float) for rows in (u_rows, v_rows)]
    found = coupling.monotone_coupling(len(u_rows), len(v_rows), *masses)
    assert (found.mass > 0).all() and (np.diff(found.levels) > 0).all()
    units = masses[0].sum() * masses[1].sum()
    for index, mass, other in zip(found[1:3], masses, masses[::-1], strict=True):
        assert (np.diff(index) >= 0).all()
        marginal = np.bincount(index, np.rint(found.mass * units), len(mass))
        assert (marginal == mass * other.sum()).all()


def test_equal_masses_are_no_masses_to_the_last_bit(cost: Any) -> None:
    (u, _), (v, _) = sample(12, seed=0), sample(7, seed=1)
    plain = transport_value(u, v, cost)
    masses = {"u_mass": torch.full((12,), 0.1).double(), "v_mass": torch.full((7,), 3.0).double()}
    assert torch.equal(transport_value(u, v, cost, **masses), plain)


def test_atoms_without_mass_are_left_out(cost: Any) -> None:
    (u, u_mass), (v, v_mass) = sample(9, seed=0), sample(6, seed=1)
    u_mass[u.argmin()] = u_mass[u.argmax()] = 0.0
    there = u_mass > 0
    found = transport_value(u, v, cost, u_mass=u_mass, v_mass=v_mass)
    expected = transport_value(u[there], v, cost, u_mass=u_mass[there], v_mass=v_mass)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_only_ratios_of_masses_matter(scale: float) -> None:
    (u, u_mass), (v, v_mass) = sample(9, seed=0), sample(6, seed=1)
    found = transport_value(u, v, torch.square, u_mass=u_mass * scale, v_mass=v_mass * scale)
    expected = transport_value(u, v, torch.square, u_mass=u_mass, v_mass=v_mass)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), None])
def test_masses_that_mean_nothing_are_an_error(bad: float | None) -> None:
    x, mass = sample(4, seed=0)
    mass = torch.zeros(4) if bad is None else mass.index_fill(0, torch.tensor([2]), bad)
    with pytest.raises(ValueError, match="masses must be finite, at least 0 and not all 0"):
        transport_value(x, x, torch.square, u_mass=mass)


def test_the_soft_sort_refuses_masses() -> None:
    x, mass = sample(4, seed=0)
    with pytest.raises(ValueError, match="needs equal masses"):
        transport_value(x, x, torch.square, sort="soft", v_mass=mass)


@given(st.lists(st.tuples(values, values, st.integers(1, 5)), min_size=1, max_size=9))
def test_recoupled_fraction_is_that_of_repeated_rows(rows: Any) -> None:
    """Without ties, where which copy of a row meets which is not a choice."""
    u, v, mass = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    u, v = u + np.arange(len(u)) / 1e3, v + np.arange(len(v)) / 1e3
    order_u, order_v = (np.repeat(np.argsort(x), mass[np.argsort(x)].astype(int)) for x in (u, v))
    found = coupling.recoupled_fraction(u, v, mass)
    assert found == pytest.approx(np.mean(order_u != order_v), abs=1e-12)


# Losses and metrics of a step.


def step(mode: str, repeated: bool) -> tuple[StepLogps, Tensor, Tensor]:
    """A step with whole masses, or the same with its rows repeated as often; its leaf; and which
    sequence of the former each sequence is a copy of."""
    generator = torch.Generator().manual_seed(0)
    rows, per_row = 12, 2 if mode == "paired" else 1
    mass = torch.randint(1, 6, (rows,), generator=generator)
    logps, ref_logps = torch.randn(2, rows * per_row, generator=generator).double() * 5 - 90
    tokens = torch.randint(3, 30, (rows * per_row,), generator=generator).double()
    positive = torch.arange(rows * per_row) < (rows if mode == "paired" else 5)
    source = torch.arange(rows).repeat_interleave(mass) if repeated else torch.arange(rows)
    source = torch.cat([source + rows * block for block in range(per_row)])
    leaf = logps[source].requires_grad_()
    cls = PairedLogps if mode == "paired" else UnpairedLogps
    of_sequences = mass.repeat(per_row)[source].double()
    given_mass = torch.ones_like(of_sequences) if repeated else of_sequences
    columns = (leaf, ref_logps[source], positive[source], tokens[source], given_mass)
    return cls.from_sequences(*columns), leaf, source


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.parametrize("sft", [0.0, 0.7])
def test_loss_and_gradient_of_a_step_are_those_of_repeated_rows(mode: str, sft: float) -> None:
    options = LossOptions(logistic, 0.3, label_smoothing=0.1, sft_weight=sft)
    (few, leaf, _), (many, copies, source) = step(mode, False), step(mode, True)
    assert many.mass is None
    loss, expected = (with_sft(transport)(s, options) for s in (few, many))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, leaf)
    (of_copies,) = torch.autograd.grad(expected, copies)
    summed = torch.zeros_like(gradient).index_add(0, source, of_copies)
    torch.testing.assert_close(gradient, summed, rtol=1e-10, atol=1e-14)
    # Without masses it is another number.
    without = type(few).from_sequences(*_columns(few, mode))
    assert abs(with_sft(transport)(without, options).item() - loss.item()) > 1e-3


def _columns(found: StepLogps, mode: str) -> tuple[Tensor, ...]:
    if isinstance(found, UnpairedLogps):
        return found.logps, found.ref_logps, found.is_positive, found.tokens
    n = len(found.chosen)
    return (
        torch.cat([found.chosen, found.rejected]),
        torch.cat([found.ref_chosen, found.ref_rejected]),
        torch.arange(2 * n) < n,
        torch.cat([found.chosen_tokens, found.rejected_tokens]),
    )


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_metrics_of_a_step_are_those_of_repeated_rows(mode: str) -> None:
    (few, *_), (many, *_) = step(mode, False), step(mode, True)
    found, expected = step_metrics(few, 0.3), step_metrics(many, 0.3)
    assert found.keys() == expected.keys()
    if mode == "paired":  # it tells copies of a row apart
        for metrics in (found, expected):
            metrics.pop("aot/recoupled_fraction")
    assert found == pytest.approx(expected, rel=1e-10)
    without = step_metrics(type(few).from_sequences(*_columns(few, mode)), 0.3)
    differ = {key for key in found if found[key] != pytest.approx(without[key], rel=1e-6)}
    assert {"aot/w1", "aot/nll", "rewards/margins", "logps/chosen"} <= differ


def test_a_step_without_positives_has_no_likelihood() -> None:
    logps = torch.randn(4).double()
    columns = (logps, logps, torch.zeros(4).bool(), torch.ones(4), torch.arange(4).double() + 1)
    assert negative_log_likelihood(UnpairedLogps.from_sequences(*columns)) == 0


# Statistics of an evaluation.


@given(weighted, weighted)
def test_statistics_are_those_of_repeated_values(u_rows: Any, v_rows: Any) -> None:
    (u, u_mass, more_u), (v, v_mass, more_v) = unzipped(u_rows), unzipped(v_rows)
    found, expected = (
        dominance_statistics(u, v, u_mass, v_mass),
        dominance_statistics(more_u, more_v),
    )
    for percent in GAP_PERCENTS:  # no rounding at the steps
        assert found[f"gap_q{percent:02d}"] == expected[f"gap_q{percent:02d}"]
    assert found == pytest.approx(expected, abs=1e-12)
    ratios = violation_ratio(u, v, u_mass, v_mass), violation_ratio(more_u, more_v)
    assert ratios[0] == pytest.approx(ratios[1], nan_ok=True)
    masses = np.array(u_mass, dtype=float), np.array(v_mass, dtype=float)
    options = {"paired": False, "n_resamples": 2, "seed": 0}
    wins, _ = accuracy(np.array(u), np.array(v), **options, masses=masses)
    repeated, _ = accuracy(np.array(more_u), np.array(more_v), **options)
    assert wins == pytest.approx(repeated)


@given(weighted, weighted)
def test_curves_are_those_of_repeated_values(u_rows: Any, v_rows: Any) -> None:
    (u, u_mass, more_u), (v, v_mass, more_v) = unzipped(u_rows), unzipped(v_rows)
    few, many = quantile_curve(u, v, u_mass, v_mass), quantile_curve(more_u, more_v)
    middles = (many.levels[1:] + many.levels[:-1]) / 2
    step_of = np.searchsorted(few.levels, middles) - 1
    assert (few.x[step_of] == many.x).all() and (few.y[step_of] == many.y).all()


def test_intervals_cover_the_spread_of_weighted_statistics() -> None:
    """Weights from 1 to 20: the statistic's spread over new samples, by brute force, is wider than
    the interval that takes all rows for equal, and that of the weighted interval."""

    def draw(seed: int) -> tuple[np.ndarray, ...]:
        random = np.random.default_rng(seed)
        u, v = random.normal(1, 1, 200), random.normal(0, 1, 200)
        return u, v, random.choice([1.0, 20.0], 200, p=[0.9, 0.1])

    means = [dominance_statistics(u, v, w, w)["w1"] for u, v, w in map(draw, range(400))]
    truth = np.quantile(means, 0.975) - np.quantile(means, 0.025)
    u, v, w = draw(1000)
    low, high = bootstrap_intervals(u, v, True, 400, u_mass=w, v_mass=w)["w1"]
    plain = np.subtract(*bootstrap_intervals(u, v, True, 400)["w1"][::-1])
    assert 0.7 < (high - low) / truth < 1.4
    assert plain < 0.75 * truth
    almost = almost_dominance(u, v, True, 200, u_mass=w, v_mass=w)
    assert almost.ratio == violation_ratio(u, v, w, w) < almost.upper


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_the_summary_of_an_evaluation_counts_weights(mode: str, make_scores: Any) -> None:
    weight = np.array([1.0, 2.0, 5.0, 1.0, 3.0, 1.0, 1.0, 4.0])
    copies = np.repeat(range(8), weight.astype(int))
    found = summarize(make_scores(mode, weight), 20)
    expected = summarize(make_scores(mode, None, copies), 20)
    assert found["weighted"] and not expected["weighted"]
    for part in ("margins", "rewards"):
        for key in ("first_mean", "second_mean", "violation_ratio"):
            assert found[part][key] == pytest.approx(expected[part][key])
        assert found[part]["statistics"] == pytest.approx(expected[part]["statistics"])
        assert found[part]["test"] == NO_TEST and expected[part]["test"]["p_value"] is not None
    assert found["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["n_chosen"] + found["n_rejected"] == (16 if mode == "paired" else 8)


@pytest.fixture
def make_scores() -> Callable[..., Scores]:
    def make(mode: str, weight: np.ndarray | None, rows: Any = slice(None)) -> Scores:
        random = np.random.default_rng(3)
        logps = random.normal(-50, 4, (4, 8))[:, rows]
        tokens = random.integers(3, 30, (2, 8))[:, rows]
        common = {"beta": 0.1, "step": 1, "eval_set": "eval", "weight": weight}
        if mode == "unpaired":
            label = np.array([1, 0, 0, 1, 1, 0, 1, 0], dtype=bool)[rows]
            columns = {"logps": logps[0], "ref_logps": logps[1], "tokens": tokens[0]}
            return Scores.unpaired(**columns, label=label, **common)
        names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
        columns = dict(zip(names, logps, strict=True))
        columns |= {"chosen_tokens": tokens[0], "rejected_tokens": tokens[1]}
        return Scores.paired(**columns, **common)

    return make


def test_weights_are_stored_with_the_scores(make_scores: Any, tmp_path: Any) -> None:
    weight = np.arange(8) + 0.5
    for mode in ("paired", "unpaired"):
        scores = make_scores(mode, weight)
        loaded = Scores.load(scores.save(tmp_path / mode))
        assert (loaded.columns["weight"] == weight).all()
        assert (loaded.u_mass == scores.u_mass).all() and len(loaded.u_mass) == len(loaded.u)
        assert (loaded.v_mass == scores.v_mass).all() and len(loaded.v_mass) == len(loaded.v)
