"""Level and power by simulation, the formulas against loops and against SciPy's own test."""

from math import exp, isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp, norm

from aot_plugin.ot.dominance import resampled_indices
from aot_plugin.ot.order_tests import almost_dominance, dominance_test, violation_ratio

samples = st.lists(st.integers(-40, 40).map(lambda k: k / 8), min_size=1, max_size=12)


def excess_of_distribution_functions(u, v):
    """sup (F_U - F_V)_+ by counting at every observed point."""
    points = np.concatenate([u, v])
    return max(0.0, max(np.mean(np.asarray(u) <= x) - np.mean(np.asarray(v) <= x) for x in points))


@given(samples, samples)
def test_statistic_is_the_excess_of_distribution_functions(u, v):
    expected = excess_of_distribution_functions(u, v)
    assert dominance_test(u, v, paired=False).statistic == pytest.approx(expected, abs=1e-12)
    if len(u) == len(v):
        found = dominance_test(u, v, paired=True, n_resamples=3)
        assert found.statistic == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_direction(paired):
    low, high = np.linspace(0, 1, 80), np.linspace(0.5, 1.5, 80)
    assert dominance_test(high, low, paired).p_value == 1.0
    assert dominance_test(low, high, paired).p_value < 0.01


def test_asymptotic_p_value_is_barrett_and_donalds():
    # Beyond SciPy's exact range its value must be exp(-2 nm/(n+m) D^2) to first order.
    random = np.random.default_rng(0)
    u, v = random.normal(-0.02, 1, 12_000), random.normal(0, 1, 15_000)
    found = dominance_test(u, v, paired=False)
    scale = len(u) * len(v) / (len(u) + len(v))
    assert found.p_value == pytest.approx(exp(-2 * scale * found.statistic**2), rel=0.05)
    assert 0.001 < found.p_value < 0.5


def test_paired_p_value_equals_a_loop():
    random = np.random.default_rng(4)
    v = random.normal(size=30).round(1)  # ties within and across the samples
    u = (v + random.normal(-0.1, 0.5, size=30)).round(1)
    [(index, _)] = resampled_indices(30, 30, True, 200, seed=9)

    def process(a, b, points):
        return np.array([np.mean(a <= x) - np.mean(b <= x) for x in points])

    points = np.unique(np.concatenate([u, v]))
    observed = process(u, v, points)
    drawn = [max(0, np.max(process(u[i], v[i], points) - observed)) for i in index]
    expected = (1 + sum(s >= max(0, observed.max()) - 1e-12 for s in drawn)) / 201
    found = dominance_test(u, v, paired=True, n_resamples=200, seed=9)
    assert found.p_value == pytest.approx(expected)
    assert 0.01 < expected < 0.99


def rejections(make, paired, repetitions=300, n=100):
    random = np.random.default_rng(17)
    p_values = [
        dominance_test(*make(random, n), paired=paired, n_resamples=199).p_value
        for _ in range(repetitions)
    ]
    return float(np.mean(np.array(p_values) <= 0.1))


def dependent(random, n, shift=0.0):
    common = random.normal(size=n)
    u, v = (common + 0.3 * random.normal(size=n) for _ in range(2))
    return u + shift, v


def test_level_at_equal_distributions():
    # 300 repetitions at level 0.1: the rate has a standard deviation of 0.017.
    independent = rejections(lambda r, n: (r.normal(size=n), r.normal(size=n)), paired=False)
    assert 0.04 < independent < 0.15
    assert 0.04 < rejections(dependent, paired=True) < 0.17


def test_pairing_is_what_gives_the_power():
    def worse(random, n):
        return dependent(random, n, shift=-0.2)

    assert rejections(worse, paired=True) > 0.75
    assert rejections(worse, paired=False) < 0.4  # the wrong test for such rows


def test_dominance_is_seldom_rejected():
    assert rejections(lambda r, n: dependent(r, n, shift=0.1), paired=True) < 0.03


def test_equal_rows_are_no_evidence():
    x = np.linspace(0, 1, 20)
    assert dominance_test(x, x, paired=True) == (0.0, 1.0, "paired")
    assert dominance_test(x, x, paired=False).p_value == 1.0


@given(samples, samples)
def test_violation_ratio_is_the_definition(u, v):
    cells = len(u) * len(v)
    middles = (np.arange(cells) + 0.5) / cells
    gap = np.subtract(
        *(np.sort(x)[np.ceil(len(x) * middles - 1e-9).astype(int) - 1] for x in (u, v))
    )
    ratio = violation_ratio(u, v)
    if not gap.any():
        assert isnan(ratio)
    else:
        assert ratio == pytest.approx(np.sum(np.minimum(gap, 0) ** 2) / np.sum(gap**2))
        assert ratio + violation_ratio(v, u) == pytest.approx(1)


def test_violation_ratio_of_tiny_and_huge_gaps():
    u, v = np.array([0.0, 3.0]), np.array([1.0, 2.0])
    for scale in (1e-200, 1.0, 1e200):
        assert violation_ratio(u * scale, v * scale) == pytest.approx(0.5)


def test_violation_ratio_of_two_normals_is_the_integral():
    # N(0.5, 2^2) against N(0, 1): the gap at level t is 0.5 + z, negative for z < -0.5.
    a = -0.5
    below = (1 + 0.25) * norm.cdf(a) + (-a) * norm.pdf(a) - 2 * 0.5 * norm.pdf(a)
    n = 20_000
    z = norm.ppf((np.arange(n) + 0.5) / n)
    assert violation_ratio(0.5 + 2 * z, z) == pytest.approx(below / 1.25, abs=1e-3)


def test_upper_limit_is_the_normal_one():
    random = np.random.default_rng(2)
    v = random.normal(size=50)
    u = v * 1.5 + 0.2
    found = almost_dominance(u, v, paired=True, n_resamples=300, seed=5, level=0.9)
    [(index, _)] = resampled_indices(50, 50, True, 300, seed=5)
    spread = np.std([violation_ratio(u[i], v[i]) for i in index], ddof=1)
    assert found.ratio == violation_ratio(u, v)
    assert found.upper == pytest.approx(found.ratio + norm.ppf(0.9) * spread)
    assert found.ratio < found.upper < 1


def test_upper_limit_covers():
    truth = violation_ratio(
        0.3 + 1.5 * norm.ppf((np.arange(9999) + 0.5) / 9999),
        norm.ppf((np.arange(9999) + 0.5) / 9999),
    )
    random = np.random.default_rng(8)
    covered = [
        truth
        <= almost_dominance(
            random.normal(0.3, 1.5, 150), random.normal(size=120), False, 200, seed, 0.9
        ).upper
        for seed in range(150)
    ]
    assert 0.82 < np.mean(covered) < 0.99


def test_equal_samples_have_no_ratio():
    ratio, upper = almost_dominance([1.0, 2.0], [1.0, 2.0], paired=True, n_resamples=9)
    assert isnan(ratio) and isnan(upper)


@pytest.mark.parametrize("function", [dominance_test, almost_dominance])
def test_bad_samples_are_named(function):
    with pytest.raises(ValueError, match=r"^v: the sample is empty"):
        function([1.0], [], paired=False)
    with pytest.raises(ValueError, match="equal size"):
        function([1.0, 2.0], [1.0], paired=True)


def test_scipys_greater_is_our_direction():
    # The one convention on which everything rests: F of the *first* sample too large is rejected.
    assert ks_2samp([0.0] * 30, [1.0] * 30, alternative="greater").pvalue < 1e-6
    assert ks_2samp([1.0] * 30, [0.0] * 30, alternative="greater").pvalue == 1.0
