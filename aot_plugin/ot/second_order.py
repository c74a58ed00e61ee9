"""Second-order stochastic dominance of one sample over another, measured exactly.

With the integrated quantile gap

    I(t) = integral over s in (0, t) of (Q_U(s) - Q_V(s)) ds,    0 <= t <= 1,

U dominates V in the second order when I(t) >= 0 for every t: whoever prefers more to less and is
averse to risk prefers U (Ogryczak and Ruszczynski 2002, "Dual Stochastic Dominance and Related
Mean-Risk Models", SIAM Journal on Optimization 13(1), thm. 3.1; for language models Nitsure et al.
2024, "Risk Aware Benchmarking of Large Language Models", arXiv 2310.07132). I(t)/t compares the
means of the worst shares t of both samples. First-order dominance implies second-order dominance.

The quantile functions are step functions, so I is linear between the points of their merged grid,
and every integral below is a finite sum. Only numpy is needed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .coupling import FloatArray
from .dominance import Sample, quantile_curve, quantile_gaps, resampled, with_masses
from .order_tests import DominanceTest

STATISTICS = (
    "second_order_violation_fraction",
    "second_order_violation_amount",
    "second_order_dominance_amount",
)
"""The keys of `second_order_statistics`, in its order."""


def integrated_gap(
    u: ArrayLike, v: ArrayLike, u_mass: ArrayLike | None = None, v_mass: ArrayLike | None = None
) -> tuple[FloatArray, FloatArray]:
    """Levels t (k + 1,) from 0 to 1, and I(t) (k + 1,), linear in between, in the samples' unit.

    Raises ValueError for the reasons of `dominance_statistics`.
    """
    levels, x, y = quantile_curve(u, v, u_mass, v_mass)
    return levels, np.concatenate(([0.0], np.cumsum((x - y) * np.diff(levels))))


def second_order_statistics(
    u: ArrayLike, v: ArrayLike, u_mass: ArrayLike | None = None, v_mass: ArrayLike | None = None
) -> dict[str, float]:
    """How far the sample u dominates the sample v in the second order, and how far it doesn't.

    Arguments as of `dominance_statistics`. The result holds

    - ``second_order_violation_fraction``: the measure of {t in (0, 1): I(t) < 0}, 0 to 1.
    - ``second_order_violation_amount``: integral of max(-I(t), 0) dt, in the samples' unit. 0 if
      and only if u dominates v in the second order.
    - ``second_order_dominance_amount``: integral of max(I(t), 0) dt.

    As in `dominance_statistics`, I(t) < 0 has no tolerance.

    Raises ValueError for the reasons of `dominance_statistics`.
    """
    a, b = with_masses(u, u_mass, "u").sorted(), with_masses(v, v_mass, "v").sorted()
    return {key: float(value) for key, value in statistics_of_sorted(a, b).items()}


def statistics_of_sorted(u: Sample, v: Sample) -> dict[str, FloatArray]:
    """The statistics of sorted samples u (..., n) and v (..., m): each of shape (...)."""
    start, end, width = _pieces(u, v)
    positive, share = _positive_part(start, end)
    negative, _ = _positive_part(-start, -end)
    below = (np.minimum(start, end) < 0.0) * (1.0 - share)
    fraction = np.minimum(below @ width, 1.0)  # the widths add up to 1 with rounding
    return dict(zip(STATISTICS, (fraction, negative @ width, positive @ width), strict=True))


def second_order_test(
    u: ArrayLike, v: ArrayLike, paired: bool, n_resamples: int = 1000, seed: int = 0
) -> DominanceTest:
    """One-sided test of H0: U dominates V in the second order, i.e. I(t) >= 0 for all t.

    The statistic is sup over t of (-I(t))_+, in the samples' unit. Both samples are resampled (in
    whole rows if paired) and the process is recentred, as in `dominance_test`:

        p = P( sup_t [I - I*](t) >= sup_t [-I](t) )

    with I* of the resampled samples, counted over n_resamples with one added to both counts. The
    tests of Barrett and Donald (2003) and Linton, Maasoumi and Whang (2005) are of this form, with
    integrated distribution functions; quantiles are those of Nitsure et al. (2024). A small p-value
    is evidence that U does *not* dominate V; nothing follows from a large one.

    Raises ValueError for a bad sample (see `dominance_statistics`),
    paired samples of unequal size, or n_resamples < 1.
    """
    a, b = with_masses(u, None, "u"), with_masses(v, None, "v")
    _, ends, _ = _pieces(a.sorted(), b.sorted())
    statistic = max(float(-ends.min()), 0.0)
    drawn = np.concatenate(
        [
            np.maximum((ends - _pieces(*samples)[1]).max(axis=-1), 0.0)
            for samples in resampled(a, b, paired, n_resamples, seed)
        ]
    )
    p_value = (1 + int(np.count_nonzero(drawn >= statistic))) / (n_resamples + 1)
    return DominanceTest(statistic, p_value, "paired" if paired else "independent")


def _pieces(u: Sample, v: Sample) -> tuple[FloatArray, FloatArray, FloatArray]:
    """I at the start and at the end of each step of sorted samples, (..., k), and the steps'
    widths, (k,)."""
    gap, width = quantile_gaps(u, v)
    end = np.cumsum(gap * width, axis=-1)
    return np.concatenate([np.zeros_like(end[..., :1]), end[..., :-1]], axis=-1), end, width


def _positive_part(start: FloatArray, end: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean over (0, 1) of max(f, 0) for f linear from ``start`` to ``end``, and the share of (0, 1)
    where f > 0."""
    high, low = np.maximum(start, end), np.minimum(start, end)
    above = np.maximum(high, 0.0)
    span = high - np.minimum(low, 0.0)
    share = np.divide(above, span, out=np.ones_like(span), where=(low < 0.0) & (span > 0.0))
    share = np.where(high > 0.0, share, 0.0)
    return share * (above + np.maximum(low, 0.0)) / 2.0, share
