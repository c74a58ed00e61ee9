"""Every number against an oracle that gets there by another road."""

from fractions import Fraction
from math import ceil, gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, wasserstein_distance

from aot_plugin.ot.dominance import (
    GAP_PERCENTS,
    bootstrap_intervals,
    dominance_statistics,
    quantile_curve,
    resampled_indices,
)

# Multiples of 1/8 are exact in binary: shifts and scalings of them hold without a tolerance,
# and there are plenty of ties.
values = st.integers(-400, 400).map(lambda k: k / 8)
samples = st.lists(values, min_size=1, max_size=12)


def brute_force(u, v):
    """The definition, in rational numbers: one evaluation of Q in each cell of width 1/(n m)."""
    u, v = sorted(map(Fraction, u)), sorted(map(Fraction, v))
    cells = len(u) * len(v)

    def quantile(x, t):
        return x[ceil(len(x) * t) - 1]

    middles = [Fraction(2 * k + 1, 2 * cells) for k in range(cells)]
    gaps = [quantile(u, t) - quantile(v, t) for t in middles]
    expected = {
        "violation_fraction": Fraction(sum(gap < 0 for gap in gaps), cells),
        "violation_amount": sum(max(-gap, 0) for gap in gaps) / cells,
        "dominance_amount": sum(max(gap, 0) for gap in gaps) / cells,
        "w1": sum(abs(gap) for gap in gaps) / cells,
    }
    for percent in GAP_PERCENTS:
        t = Fraction(percent, 100)
        expected[f"gap_q{percent:02d}"] = quantile(u, t) - quantile(v, t)
    return {key: float(value) for key, value in expected.items()}


@given(samples, samples)
def test_equals_the_definition_in_rational_arithmetic(u, v):
    assert dominance_statistics(u, v) == pytest.approx(brute_force(u, v), abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(200, 200), (200, 150), (7, 1000), (1, 1)])
def test_w1_equals_scipy_and_pot(n, m):
    ot = pytest.importorskip("ot")
    random = np.random.default_rng(n + m)
    u, v = random.normal(0.3, 2, n), random.standard_t(3, m)
    w1 = dominance_statistics(u, v)["w1"]
    assert w1 == pytest.approx(wasserstein_distance(u, v), rel=1e-12)
    assert w1 == pytest.approx(ot.wasserstein_1d(u, v, p=1), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (40, 64), (3, 7)])
def test_agrees_with_a_fine_grid_of_numpys_quantiles(n, m):
    random = np.random.default_rng(n)
    u, v = random.normal(size=n), random.normal(0.1, 1.5, size=m)
    cells = 200_000
    t = (np.arange(cells) + 0.5) / cells
    gap = np.quantile(u, t, method="inverted_cdf") - np.quantile(v, t, method="inverted_cdf")
    found = dominance_statistics(u, v)
    # A grid cell is wrong only where it holds a step: at most n + m of them.
    tolerance = (n + m) / cells * np.ptp(np.concatenate([u, v]))
    assert found["violation_fraction"] == pytest.approx(np.mean(gap < 0), abs=(n + m) / cells)
    assert found["violation_amount"] == pytest.approx(np.maximum(-gap, 0).mean(), abs=tolerance)
    assert found["dominance_amount"] == pytest.approx(np.maximum(gap, 0).mean(), abs=tolerance)
    assert 0 < found["violation_fraction"] < 1  # else the comparison above is vacuous


@given(samples, samples)
def test_difference_of_the_amounts_is_the_difference_of_the_means(u, v):
    found = dominance_statistics(u, v)
    difference = found["dominance_amount"] - found["violation_amount"]
    assert difference == pytest.approx(np.mean(u) - np.mean(v), abs=1e-10)


@given(samples, samples, values)
def test_a_common_shift_changes_nothing(u, v, shift):
    moved = dominance_statistics(np.add(u, shift), np.add(v, shift))
    assert moved == dominance_statistics(u, v)


@given(samples, samples, st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_scale(u, v, scale):
    before = dominance_statistics(u, v)
    after = dominance_statistics(np.multiply(u, scale), np.multiply(v, scale))
    assert after.pop("violation_fraction") == before.pop("violation_fraction")
    assert after == pytest.approx({key: scale * value for key, value in before.items()})


@given(samples, samples)
def test_swap(u, v):
    there, back = dominance_statistics(u, v), dominance_statistics(v, u)
    assert there["violation_amount"] == back["dominance_amount"]
    assert there["dominance_amount"] == back["violation_amount"]
    assert there["w1"] == back["w1"]
    assert there["violation_fraction"] + back["violation_fraction"] <= 1 + 1e-12
    for percent in GAP_PERCENTS:
        assert there[f"gap_q{percent:02d}"] == -back[f"gap_q{percent:02d}"]


@given(samples, samples, st.integers(1, 4), st.integers(1, 4))
def test_a_sample_repeated_is_the_same_distribution(u, v, k, r):
    assert dominance_statistics(u * k, v * r) == pytest.approx(
        dominance_statistics(u, v), abs=1e-10
    )


@given(samples, samples, st.randoms(use_true_random=False))
def test_order_of_the_values_does_not_matter(u, v, random):
    shuffled_u, shuffled_v = list(u), list(v)
    random.shuffle(shuffled_u)
    random.shuffle(shuffled_v)
    assert dominance_statistics(shuffled_u, shuffled_v) == dominance_statistics(u, v)


@given(st.lists(st.tuples(values, st.integers(0, 80)), min_size=1, max_size=12))
def test_u_at_least_v_row_by_row_has_no_violation(rows):
    v = [value for value, _ in rows]
    u = [value + more / 8 for value, more in rows]
    found = dominance_statistics(u, v)
    assert found["violation_fraction"] == 0
    assert found["violation_amount"] == 0


def test_a_violation_that_can_be_seen_by_hand():
    # Q_U = 0, 3; Q_V = 1, 1.5, 2 on thirds. Violated on (0, 1/2]: by 1 on a third, 1.5 on a sixth.
    found = dominance_statistics([3.0, 0.0], [1.5, 2.0, 1.0])
    assert found["violation_fraction"] == pytest.approx(1 / 2)
    assert found["violation_amount"] == pytest.approx(1 / 3 + 1.5 / 6)
    assert found["dominance_amount"] == pytest.approx(1.5 / 6 + 1 / 3)
    assert found["gap_q05"] == -1.0
    assert found["gap_q50"] == -1.5  # left-continuous: at t = 1/2 U still has its lower value
    assert found["gap_q95"] == 1.0


@pytest.mark.parametrize("n", [20, 60, 100, 140])
def test_levels_are_exact_where_floats_are_not(n):
    x = np.arange(1, n + 1)
    found = dominance_statistics(x, [0])
    for percent in GAP_PERCENTS:
        assert found[f"gap_q{percent:02d}"] == ceil(Fraction(n * percent, 100))


@given(samples, samples)
def test_curves_are_the_quantile_functions(x, y):
    curves = quantile_curve(x, y)
    assert curves.levels[0] == 0 and curves.levels[-1] == 1
    assert np.all(np.diff(curves.levels) > 0)
    assert len(curves.x) == len(curves.y) == len(x) + len(y) - gcd(len(x), len(y))
    middles = (curves.levels[1:] + curves.levels[:-1]) / 2
    for sample, curve in ((x, curves.x), (y, curves.y)):
        expected = np.sort(sample)[np.ceil(len(sample) * middles).astype(int) - 1]
        np.testing.assert_array_equal(curve, expected)


def test_float32_and_float64_inputs_agree():
    u, v = np.float32([0.1, 0.2]), np.float32([0.15, 0.3, -1])
    assert dominance_statistics(u, v) == dominance_statistics(u.astype(float), v.astype(float))


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [float("inf")], [[1.0]]])
@pytest.mark.parametrize("which", ["u", "v"])
def test_a_bad_sample_is_named(bad, which):
    arguments = {"u": [1.0], "v": [1.0]} | {which: bad}
    with pytest.raises(ValueError, match=f"^{which}: "):
        dominance_statistics(**arguments)
    with pytest.raises(ValueError, match=f"^{which}: "):
        bootstrap_intervals(**arguments, paired=False, n_resamples=2)


@pytest.mark.parametrize(("paired", "m"), [(True, 60), (False, 60), (False, 45)])
def test_bootstrap_equals_a_loop_over_its_resamples(paired, m):
    random = np.random.default_rng(5)
    v = random.normal(size=m)
    u = random.normal(0.2, 1.3, size=60)
    blocks = resampled_indices(60, m, paired, 500, seed=7)
    draws = [draw for block in blocks for draw in zip(*block, strict=True)]
    assert all(np.array_equal(i, j) for i, j in draws) == paired
    rows = [dominance_statistics(u[i], v[j]) for i, j in draws]
    found = bootstrap_intervals(u, v, paired, n_resamples=500, seed=7, level=0.9)
    assert tuple(found) == tuple(rows[0])
    for key, interval in found.items():
        expected = np.quantile([row[key] for row in rows], [0.05, 0.95])
        assert interval == pytest.approx(tuple(expected), abs=1e-12), key


@pytest.mark.parametrize("paired", [True, False])
def test_bootstrap_agrees_with_scipys(paired):
    random = np.random.default_rng(5)
    v = random.normal(size=60)
    u = v + 0.2 + random.normal(0, 0.3, size=60)
    found = bootstrap_intervals(u, v, paired, n_resamples=4000)
    for key in ("w1", "dominance_amount"):  # smooth statistics: their bootstrap quantiles settle
        scipys = bootstrap(
            (u, v),
            lambda a, b, key=key: dominance_statistics(a, b)[key],
            paired=paired,
            vectorized=False,
            n_resamples=4000,
            method="percentile",
            random_state=1,
        ).confidence_interval
        assert found[key] == pytest.approx(tuple(scipys), abs=0.02), key


def test_pairing_matters():
    # Strongly dependent rows: the difference of means is far less uncertain when rows stay whole.
    random = np.random.default_rng(0)
    v = random.normal(size=200)
    u = v + 0.5
    joint = bootstrap_intervals(u, v, paired=True)["dominance_amount"]
    apart = bootstrap_intervals(u, v, paired=False)["dominance_amount"]
    assert joint == pytest.approx((0.5, 0.5))
    assert apart[1] - apart[0] > 0.2


def test_bootstrap_is_deterministic_and_seeded():
    u, v = np.linspace(0, 1, 9), np.linspace(-1, 2, 7)
    first = bootstrap_intervals(u, v, paired=False, n_resamples=200, seed=3)
    assert first == bootstrap_intervals(u, v, paired=False, n_resamples=200, seed=3)
    assert first != bootstrap_intervals(u, v, paired=False, n_resamples=200, seed=4)


def test_blocks_hold_every_resample_and_every_row(monkeypatch):
    monkeypatch.setattr("aot_plugin.ot.dominance._RESAMPLED_NUMBERS_AT_ONCE", 700)
    blocks = list(resampled_indices(50, 50, False, 99, seed=0))
    assert [len(i) for i, _ in blocks] == [7] * 14 + [1]
    assert len({tuple(row) for i, _ in blocks for row in i}) == 99
    for side in zip(*blocks, strict=True):
        drawn = np.bincount(np.concatenate([index.ravel() for index in side]), minlength=50)
        assert drawn.sum() == 99 * 50
        assert drawn.min() > 50 and drawn.max() < 150  # 99 expected of each row, 5 sigma


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_intervals_cover_the_mean_difference_as_often_as_they_say(level):
    # gap_q50 of two symmetric samples has the true value 0.4; 200 repetitions, 3 sigma of slack.
    random = np.random.default_rng(11)
    hits = 0
    for seed in range(200):
        u, v = random.normal(0.4, 1, 80), random.normal(0, 1, 60)
        low, high = bootstrap_intervals(u, v, False, n_resamples=200, seed=seed, level=level)[
            "gap_q50"
        ]
        hits += low <= 0.4 <= high
    assert abs(hits / 200 - level) < 3 * (level * (1 - level) / 200) ** 0.5 + 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paired": True}, "equal size, got 2 and 3"),
        ({"n_resamples": 0}, "n_resamples"),
        ({"level": 1.0}, "level"),
    ],
)
def test_bootstrap_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(**({"u": [1, 2], "v": [1, 2, 3], "paired": False} | change))


@settings(max_examples=20)
@given(samples, samples)
def test_bootstrap_intervals_are_ordered_and_in_range(u, v):
    found = bootstrap_intervals(u, v, paired=False, n_resamples=25)
    assert all(low <= high for low, high in found.values())
    low, high = found["violation_fraction"]
    assert low >= 0 and high <= 1 + 1e-12


def test_fast_enough_for_every_step():
    from time import perf_counter

    random = np.random.default_rng(0)
    u, v = random.normal(size=4096), random.normal(size=4000)
    fastest = min(
        (lambda start: (dominance_statistics(u, v), perf_counter() - start)[1])(perf_counter())
        for _ in range(5)
    )
    assert fastest < 0.05  # about 1 ms; a quadratic algorithm takes seconds
