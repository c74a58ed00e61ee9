"""Two statistical questions about first-order stochastic dominance, asked from opposite sides.

`dominance_test` takes dominance as the hypothesis: a small p-value is evidence *against* it, and a
large one is no proof of it. `almost_dominance` takes the lack of (almost) dominance as the
hypothesis: its upper limit falling below a threshold is evidence *for* it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .coupling import FloatArray, IntArray
from .dominance import (
    Sample,
    as_sample,
    quantile_gaps,
    resampled,
    resampled_indices,
    with_masses,
)


class DominanceTest(NamedTuple):
    """Outcome of `dominance_test`, or of `second_order.second_order_test`."""

    statistic: float
    """Of first order sup over x of (F_U(x) - F_V(x))_+, between 0 and 1; of second order in the
    samples' unit. 0 if u dominates v in the sample."""
    p_value: float
    method: str
    """"independent" (of first order Kolmogorov-Smirnov) or "paired" (bootstrap of whole rows)."""


class AlmostDominance(NamedTuple):
    """Outcome of `almost_dominance`; both are NaN where the samples have the same quantiles."""

    ratio: float
    """The violation ratio, 0 (u dominates v) to 1 (v dominates u)."""
    upper: float
    """One-sided upper confidence limit of the ratio."""


def dominance_test(
    u: ArrayLike, v: ArrayLike, paired: bool, n_resamples: int = 1000, seed: int = 0
) -> DominanceTest:
    """One-sided test of H0: U dominates V in the first order, i.e. F_U(x) <= F_V(x) for all x.

    The alternative is F_U(x) > F_V(x) for at least one x, so a small p-value is evidence that U
    does *not* dominate V. Nothing follows from a large one: equal distributions pass as well.
    The statistic is the largest amount by which F_U exceeds F_V.

    paired=False, u of shape (n,), v of shape (m,), independent of each other: the two-sample
    Kolmogorov-Smirnov test with `alternative="greater"` of SciPy (exact for small samples,
    asymptotically p = exp(-2 n m/(n + m) statistic^2)). Barrett and Donald (2003), "Consistent
    Tests for Stochastic Dominance", Econometrica 71(1), 71-104, show that this is the test of
    first-order dominance and that equality of the two distributions is its least favourable case.

    paired=True, n = m, rows (u_i, v_i) independent of each other, but u_i and v_i dependent: the
    Kolmogorov-Smirnov p-value would be wrong (too large under positive dependence), so rows are
    resampled whole and the process F_U - F_V is recentred: with F* the resampled distributions,

        p = P( sup_x [(F*_U - F_U) - (F*_V - F_V)](x) >= sup_x [F_U - F_V](x) ),

    counted over n_resamples with one added to both counts. This is the full-sample bootstrap
    with recentring of Linton, Maasoumi and Whang (2005), "Consistent Testing for Stochastic
    Dominance under General Sampling Schemes", Review of Economic Studies 72(3), for which prospects
    may depend on each other. It is asymptotically of its level where the distributions
    are equal and conservative elsewhere.

    Raises ValueError for a bad sample (see `dominance_statistics`) and, if paired, for samples of
    unequal size or n_resamples < 1.
    """
    a, b = as_sample(u, "u"), as_sample(v, "v")
    if not paired:
        from scipy.stats import ks_2samp

        found = ks_2samp(a, b, alternative="greater")
        return DominanceTest(float(found.statistic), float(found.pvalue), "independent")
    statistic, drawn = _recentred_suprema(a, b, n_resamples, seed)
    p_value = (1 + int(np.count_nonzero(drawn >= statistic))) / (n_resamples + 1)
    return DominanceTest(statistic / a.size, p_value, "paired")


def _recentred_suprema(
    u: FloatArray, v: FloatArray, n_resamples: int, seed: int
) -> tuple[int, IntArray]:
    """n sup (F_U - F_V)_+ and its recentred resamples, in whole rows so that `>=` is exact."""
    points = np.unique(np.concatenate([u, v]))
    u_below = np.searchsorted(np.sort(u), points, side="right")
    v_below = np.searchsorted(np.sort(v), points, side="right")
    excess = u_below - v_below
    suprema = []
    for index, _ in resampled_indices(u.size, v.size, True, n_resamples, seed):
        offset = u.size * np.arange(len(index))[:, None]
        counts = np.bincount((index + offset).ravel(), minlength=index.size).reshape(index.shape)
        u_drawn = _cumulative(counts[:, np.argsort(u)])[:, u_below]
        v_drawn = _cumulative(counts[:, np.argsort(v)])[:, v_below]
        suprema.append(np.maximum((u_drawn - v_drawn - excess).max(axis=1), 0))
    return max(int(excess.max()), 0), np.concatenate(suprema)


def _cumulative(counts: IntArray) -> IntArray:
    """Cumulative sums along the last axis with a leading 0."""
    return np.concatenate([np.zeros_like(counts[:, :1]), np.cumsum(counts, axis=1)], axis=1)


def violation_ratio(
    u: ArrayLike, v: ArrayLike, u_mass: ArrayLike | None = None, v_mass: ArrayLike | None = None
) -> float:
    """The share of the squared Wasserstein-2 distance that violates "U dominates V".

        integral of (Q_V - Q_U)_+^2 dt  /  integral of (Q_U - Q_V)^2 dt

    0 if u (n,) dominates v (m,), 1 if v dominates u, the complement of the ratio with the samples
    swapped. NaN if the quantile functions are equal: the ratio isn't defined there. This is the
    index of del Barrio, Cuesta-Albertos and Matran (2018), "An Optimal Transportation Approach for
    Assessing Almost Stochastic Order", in: The Mathematics of the Uncertain, Springer.

    u_mass (n,) and v_mass (m,) are the values' relative masses; None if all are equal.

    Raises ValueError for a bad sample (see `dominance_statistics`).
    """
    a, b = with_masses(u, u_mass, "u").sorted(), with_masses(v, v_mass, "v").sorted()
    return float(_ratios_of_sorted(a, b))


def _ratios_of_sorted(u: Sample, v: Sample) -> FloatArray:
    """Violation ratios of sorted samples u (..., n) and v (..., m), shape (...)."""
    gap, width = quantile_gaps(u, v)
    with np.errstate(invalid="ignore"):  # 0/0 is the NaN that stands for equal quantile functions
        # The ratio has no unit; dividing first keeps the squares from under- and overflowing.
        gap = gap / np.abs(gap).max(axis=-1, keepdims=True)
        return np.asarray((np.minimum(gap, 0.0) ** 2 @ width) / (gap**2 @ width))


def almost_dominance(
    u: ArrayLike,
    v: ArrayLike,
    paired: bool,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    u_mass: ArrayLike | None = None,
    v_mass: ArrayLike | None = None,
) -> AlmostDominance:
    """The violation ratio with a one-sided upper confidence limit.

    The limit is the ratio plus z_level times its bootstrap standard deviation. To reject H0:
    "the ratio is at least eps" at 1 - level is to find the limit below eps; below 0.5, U is closer
    to dominating V than the reverse. The estimate is asymptotically normal (del Barrio,
    Cuesta-Albertos and Matran 2018 for independent samples) except at 0 and 1, where
    the limit shouldn't be over-read. Resampling is that of `bootstrap_intervals`, masses included.
    Resamples with equal quantile functions are left out.

    Raises ValueError for the reasons of `bootstrap_intervals`.
    """
    from scipy.stats import norm

    a, b = with_masses(u, u_mass, "u"), with_masses(v, v_mass, "v")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    ratio = float(_ratios_of_sorted(a.sorted(), b.sorted()))
    blocks = resampled(a, b, paired, n_resamples, seed)
    drawn = np.concatenate([np.atleast_1d(_ratios_of_sorted(*samples)) for samples in blocks])
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(ratio) or drawn.size < 2:
        return AlmostDominance(ratio, float("nan"))
    upper = ratio + float(norm.ppf(level)) * float(np.std(drawn, ddof=1))
    return AlmostDominance(ratio, min(upper, 1.0))
