"""First-order stochastic dominance of one sample over another, measured exactly.

With the left-continuous empirical quantile function of a sample x of size n,

    Q_X(t) = x_(ceil(n t)),    0 < t <= 1,    x_(1) <= ... <= x_(n),

or, where the values have masses w_i, Q_X(t) = x_(k) with the first k whose w_(1) + ... + w_(k) is
at least t times their sum, U dominates V in the first order when Q_U(t) >= Q_V(t) for every t. Two
empirical quantile functions are step functions, constant between neighbouring points of the merged
grid {i/n} | {j/m}, so every integral over t below is a finite sum and no level is sampled. The grid
is kept in integers (multiples of 1/(n m)): whether two steps coincide is never left to rounding.
With masses it is that of the cumulated masses, which is as exact where they are whole numbers.

Only numpy is needed; the trainer calls `dominance_statistics` at every step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .coupling import FloatArray, IntArray, monotone_coupling

GAP_PERCENTS = (5, 25, 50, 75, 95)
"""Levels of the reported quantile gaps, in per cent: integers, so that ceil(n t) is exact."""

_RESAMPLED_NUMBERS_AT_ONCE = 2_000_000  # 16 MB an array; bounds the memory of the bootstrap


class QuantileCurves(NamedTuple):
    """Two empirical quantile functions on their merged grid.

    On the interval (levels[k], levels[k + 1]] the first sample's quantile is x[k] and the second's
    is y[k]. `Axes.stairs(x, levels)` of matplotlib draws exactly this.
    """

    levels: FloatArray
    """Shape (k + 1,), increasing from 0 to 1."""
    x: FloatArray
    """Shape (k,), non-decreasing; unit of the sample."""
    y: FloatArray
    """Shape (k,), non-decreasing; unit of the sample."""


def as_sample(values: ArrayLike, name: str) -> FloatArray:
    """`values` as a float64 vector of shape (n,), n >= 1, all finite.

    Raises ValueError naming the sample `name` if it isn't one-dimensional, is empty, or holds NaN
    or an infinity.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1:
        raise ValueError(f"{name}: expected a one-dimensional sample, got shape {sample.shape}")
    if sample.size == 0:
        raise ValueError(f"{name}: the sample is empty")
    bad = int(np.count_nonzero(~np.isfinite(sample)))
    if bad:
        raise ValueError(f"{name}: {bad} of {sample.size} values are NaN or infinite")
    return sample


class Sample(NamedTuple):
    """A sample, or several of one size, with relative masses of the values."""

    values: FloatArray
    """Shape (..., n)."""
    mass: FloatArray | None
    """Shape (..., n); None if all are equal. The quantile functions of several samples have a
    common grid only without masses."""

    @property
    def size(self) -> int:
        return self.values.shape[-1]

    def sorted(self) -> Sample:
        if self.mass is None:
            return Sample(np.sort(self.values), None)
        order = np.argsort(self.values, kind="stable")
        return self.take(order)

    def take(self, rows: IntArray) -> Sample:
        """The given rows of a single sample, in the shape of ``rows``: drawn, or in order."""
        return Sample(self.values[rows], None if self.mass is None else self.mass[rows])

    def at(self, percent: int) -> FloatArray:
        """The quantile of sorted values at a level in per cent, (...)."""
        if self.mass is None:
            return self.values[..., (self.size * percent + 99) // 100 - 1]
        cumulated = np.cumsum(self.mass)
        return self.values[np.searchsorted(100.0 * cumulated, percent * cumulated[-1])]


def with_masses(values: ArrayLike, mass: ArrayLike | None, name: str) -> Sample:
    """`values` checked as by `as_sample`, with their masses.

    Raises ValueError also for masses of another shape, that aren't finite, or that aren't positive.
    """
    sample = as_sample(values, name)
    if mass is None:
        return Sample(sample, None)
    masses = np.asarray(mass, dtype=np.float64)
    if masses.shape != sample.shape or not (np.isfinite(masses) & (masses > 0.0)).all():
        raise ValueError(f"{name}: expected {sample.size} finite masses above 0")
    return Sample(sample, None if (masses == masses[0]).all() else masses)


def quantile_gaps(u: Sample, v: Sample) -> tuple[FloatArray, FloatArray]:
    """Q_U - Q_V of sorted samples u (..., n) and v (..., m) on the steps of both, (..., k), and
    the steps' widths, (k,)."""
    coupling = monotone_coupling(u.size, v.size, u.mass, v.mass)
    return u.values[..., coupling.u_index] - v.values[..., coupling.v_index], coupling.mass


def statistics_of_sorted(u: Sample, v: Sample) -> dict[str, FloatArray]:
    """The statistics of sorted samples u (..., n) and v (..., m): each of shape (...)."""
    gap, width = quantile_gaps(u, v)
    violation = np.maximum(-gap, 0.0) @ width
    dominance = np.maximum(gap, 0.0) @ width
    found = {
        # The widths add up to 1 with rounding.
        "violation_fraction": np.minimum((gap < 0.0) @ width, 1.0),
        "violation_amount": violation,
        "dominance_amount": dominance,
        "w1": violation + dominance,
    }
    for percent in GAP_PERCENTS:
        found[f"gap_q{percent:02d}"] = u.at(percent) - v.at(percent)
    return found


def quantile_curve(
    x: ArrayLike, y: ArrayLike, x_mass: ArrayLike | None = None, y_mass: ArrayLike | None = None
) -> QuantileCurves:
    """Both empirical quantile functions on the merged grid of their steps.

    x has shape (n,) and y shape (m,), and so have their masses; n and m may differ. Without masses
    the curves have n + m - gcd(n, m) steps.

    Raises ValueError, naming "x" or "y", for an empty, non-finite or not one-dimensional sample,
    and for masses that aren't finite and positive.
    """
    a, b = with_masses(x, x_mass, "x").sorted(), with_masses(y, y_mass, "y").sorted()
    grid = monotone_coupling(a.size, b.size, a.mass, b.mass)
    return QuantileCurves(grid.levels, a.values[grid.u_index], b.values[grid.v_index])


def dominance_statistics(
    u: ArrayLike, v: ArrayLike, u_mass: ArrayLike | None = None, v_mass: ArrayLike | None = None
) -> dict[str, float]:
    """How far the sample u dominates the sample v in the first order, and how far it doesn't.

    u has shape (n,) and v shape (m,), of any real dtype (computed in float64); n and m may differ
    and the order of the values doesn't matter. u_mass (n,) and v_mass (m,) are their relative
    masses; None if all are equal. Masses in whole numbers are the same as values repeated as often.
    Cost O((n + m) log(n + m)). With D(t) = Q_U(t) - Q_V(t) the result holds

    - ``violation_fraction``: the measure of {t in (0, 1): D(t) < 0}; no unit, 0 to 1.
    - ``violation_amount``: integral of max(-D(t), 0) dt; in the unit of the samples (nats for
      log-probabilities). 0 if and only if u dominates v.
    - ``dominance_amount``: integral of max(D(t), 0) dt.
    - ``w1``: the sum of both amounts, i.e. integral of |D(t)| dt, the Wasserstein-1 distance.
      The difference dominance_amount - violation_amount is mean(u) - mean(v).
    - ``gap_q05``, ``gap_q25``, ``gap_q50``, ``gap_q75``, ``gap_q95``: D at these levels.

    The comparison D(t) < 0 has no tolerance: where u and v differ by rounding noise only,
    violation_fraction is arbitrary and the amounts are what says so.

    Raises ValueError, naming "u" or "v", for an empty, non-finite or not one-dimensional sample,
    and for masses that aren't finite and positive.

    References: Melnyk et al. (2024), "Distributional Preference Alignment of LLMs via Optimal
    Transport", arXiv 2406.05882, sec. 2 (dominance by quantiles); the amounts are the two halves
    of W_1 on the line, e.g. Santambrogio (2015), "Optimal Transport for Applied Mathematicians",
    thm. 2.9 with h(z) = |z|.
    """
    a, b = with_masses(u, u_mass, "u").sorted(), with_masses(v, v_mass, "v").sorted()
    found = statistics_of_sorted(a, b)
    return {key: float(value) for key, value in found.items()}


def bootstrap_intervals(
    u: ArrayLike,
    v: ArrayLike,
    paired: bool,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    u_mass: ArrayLike | None = None,
    v_mass: ArrayLike | None = None,
    statistics: Callable[[Sample, Sample], Mapping[str, FloatArray]] = statistics_of_sorted,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of every key of `dominance_statistics`, or of ``statistics``.

    The latter takes sorted samples, (..., n) and (..., m), and returns arrays of shape (...).

    paired=True: u[i] and v[i] belong to one row and rows are drawn with replacement, which keeps
    their dependence (n = m is required). paired=False: both samples are drawn independently.
    A value is drawn with its mass, so that masses are random as the values are.
    The interval runs from the (1 - level)/2 to the (1 + level)/2 quantile of the resampled
    statistic (Efron and Tibshirani 1993, ch. 13). Equal arguments give equal intervals.

    The amounts and the fraction can't be negative, so a resample can only add to a violation that
    is truly 0: near 0 the intervals lean upwards and needn't cover it. They describe the spread
    of the statistic. For a decision use the tests in `aot_plugin.ot.order_tests`.

    Raises ValueError for the reasons of `dominance_statistics`, for paired samples of unequal
    size, n_resamples < 1, or a level outside (0, 1).
    """
    a, b = with_masses(u, u_mass, "u"), with_masses(v, v_mass, "v")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    draws: defaultdict[str, list[FloatArray]] = defaultdict(list)
    for drawn in resampled(a, b, paired, n_resamples, seed):
        for key, value in statistics(*drawn).items():
            draws[key].append(np.atleast_1d(value))
    tails = ((1.0 - level) / 2.0, (1.0 + level) / 2.0)
    ends = {key: np.quantile(np.concatenate(values), tails) for key, values in draws.items()}
    return {key: (float(low), float(high)) for key, (low, high) in ends.items()}


def resampled(
    u: Sample, v: Sample, paired: bool, n_resamples: int, seed: int
) -> Iterator[tuple[Sample, Sample]]:
    """Sorted bootstrap samples of u (n,) and v (m,), n_resamples in all, as by `resampled_indices`:
    many at a time without masses, one at a time with masses, since their grids differ."""
    for i, j in resampled_indices(u.size, v.size, paired, n_resamples, seed):
        if u.mass is None and v.mass is None:
            yield u.take(i).sorted(), v.take(j).sorted()
            continue
        for of_u, of_v in zip(i, j, strict=True):
            yield u.take(of_u).sorted(), v.take(of_v).sorted()


def resampled_indices(
    n: int, m: int, paired: bool, n_resamples: int, seed: int
) -> Iterator[tuple[IntArray, IntArray]]:
    """Bootstrap draws with replacement, in blocks of bounded memory.

    Yields index arrays of shapes (rows, n) and (rows, m), n_resamples rows in all; with
    paired=True both are the same array. Raises ValueError for paired samples of unequal size and
    for n_resamples < 1.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples: expected at least 1, got {n_resamples}")
    if paired and n != m:
        raise ValueError(f"paired samples must be of equal size, got {n} and {m}")
    random = np.random.default_rng(seed)
    block = max(1, _RESAMPLED_NUMBERS_AT_ONCE // (n + m))
    for start in range(0, n_resamples, block):
        rows = min(block, n_resamples - start)
        first = random.integers(0, n, size=(rows, n))
        yield first, first if paired else random.integers(0, m, size=(rows, m))
