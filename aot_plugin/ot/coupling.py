"""The monotone coupling of two samples on the line: which atoms meet, and with how much mass.

It solves the transport problem for every convex cost of u - v, and its steps are those of the two
empirical quantile functions, so losses (torch) and statistics (numpy) are sums over the same grid.
Only numpy is needed.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class MonotoneCoupling(NamedTuple):
    """A coupling of n and m *sorted* atoms as k = n + m - gcd(n, m) matched pairs.

    On the levels (levels[k], levels[k + 1]] the first sample's quantile is its atom u_index[k], and
    the second's its atom v_index[k].
    """

    levels: FloatArray
    """(k + 1,), increasing from 0 to 1."""
    u_index: IntArray
    """(k,), non-decreasing from 0 to n - 1."""
    v_index: IntArray
    """(k,), non-decreasing from 0 to m - 1."""
    mass: FloatArray
    """(k,): how much probability each pair carries. The sum is 1, and 1/n or 1/m per atom."""


def monotone_coupling(n: int, m: int) -> MonotoneCoupling:
    """The north-west corner rule for atoms 0..n-1 (mass 1/n each) and 0..m-1 (mass 1/m each).

    Levels are counted in units of 1/(n m), so the merged grid {i/n} | {j/m} is one of integers:
    whether two steps coincide, and which mass is left, is never up to rounding.

    Raises:
        ValueError: if one of the samples is empty.
    """
    if n < 1 or m < 1:
        raise ValueError(f"a coupling needs at least one atom on each side, got n={n} and m={m}")
    u_steps = m * np.arange(1, n + 1, dtype=np.int64)
    v_steps = n * np.arange(1, m + 1, dtype=np.int64)
    # With n = m (every paired step) the two grids are the same and the merge can be skipped.
    right_ends = u_steps if n == m else np.union1d(u_steps, v_steps)
    return MonotoneCoupling(
        levels=np.concatenate(([0.0], right_ends / (n * m))),
        # On (.., g/(nm)] the quantile's index is ceil(n g/(nm)) = ceil(g/m), counted from 1.
        u_index=(right_ends - 1) // m,
        v_index=(right_ends - 1) // n,
        mass=np.diff(right_ends, prepend=0) / (n * m),
    )


def recoupled_fraction(u: FloatArray, v: FloatArray) -> float:
    """The share of rows i whose partner in the monotone coupling of u (n,) and v (n,) is not v[i].

    0 means that AOT is the pairwise loss (DPO with this penalty) on these rows. Ties in one sample
    are broken by the other, so it is 0 wherever u and v are in the same order.
    """
    return float(np.mean(np.lexsort((v, u)) != np.lexsort((u, v))))
