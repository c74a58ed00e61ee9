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
    """A coupling of n and m *sorted* atoms as k matched pairs.

    With equal masses on each side k = n + m - gcd(n, m), otherwise k < n + m. On the levels
    (levels[k], levels[k + 1]] the first sample's quantile is its atom u_index[k], and the second's
    its atom v_index[k].
    """

    levels: FloatArray
    """(k + 1,), increasing from 0 to 1."""
    u_index: IntArray
    """(k,), non-decreasing, below n."""
    v_index: IntArray
    """(k,), non-decreasing, below m."""
    mass: FloatArray
    """(k,): how much probability each pair carries. The sum is 1, and each atom's share of it is
    its own mass."""


def monotone_coupling(
    n: int, m: int, u_mass: FloatArray | None = None, v_mass: FloatArray | None = None
) -> MonotoneCoupling:
    """The north-west corner rule for atoms 0..n-1 and 0..m-1, both of total mass 1.

    Args:
        n, m: numbers of atoms.
        u_mass: relative masses of the n sorted atoms, (n,); None if all are equal.
        v_mass: those of the m sorted atoms, (m,).

    Raises:
        ValueError: if one of the samples is empty, or if masses are negative, not finite or all 0.
    """
    if n < 1 or m < 1:
        raise ValueError(f"a coupling needs at least one atom on each side, got n={n} and m={m}")
    if _are_equal(u_mass) and _are_equal(v_mass):
        return _of_equal_masses(n, m)
    u_steps, v_steps = _cumulated(n, u_mass), _cumulated(m, v_mass)
    # Each is multiplied by the other's total: integer masses stay integers, so that steps that
    # coincide do so without rounding, and the last steps coincide whatever the masses are.
    u_ends, v_ends = u_steps * v_steps[-1], v_steps * u_steps[-1]
    right_ends = np.union1d(u_ends, v_ends)
    right_ends = right_ends[right_ends > 0.0]
    return MonotoneCoupling(
        levels=np.concatenate(([0.0], right_ends / right_ends[-1])),
        # The first atom that reaches the level, so that atoms without mass are left out.
        u_index=np.searchsorted(u_ends, right_ends),
        v_index=np.searchsorted(v_ends, right_ends),
        mass=np.diff(right_ends, prepend=0.0) / right_ends[-1],
    )


def _are_equal(mass: FloatArray | None) -> bool:
    return mass is None or bool((mass == mass[0]).all() and 0.0 < mass[0] < np.inf)


def _cumulated(n: int, mass: FloatArray | None) -> FloatArray:
    """Cumulated masses in a unit in which they are exact if they can be, (n,)."""
    if mass is None or _are_equal(mass):
        return np.arange(1, n + 1, dtype=np.float64)
    if not (np.isfinite(mass).all() and (mass >= 0.0).all() and mass.max() > 0.0):
        raise ValueError("masses must be finite, at least 0 and not all 0")
    # A power of two: nothing is rounded, and no product of two totals overflows.
    scaled: FloatArray = np.ldexp(mass, -int(np.frexp(mass.max())[1]))
    return np.cumsum(scaled)


def _of_equal_masses(n: int, m: int) -> MonotoneCoupling:
    """Mass 1/n for each of n atoms, 1/m for each of m.

    Levels are counted in units of 1/(n m), so the merged grid {i/n} | {j/m} is one of integers:
    whether two steps coincide, and which mass is left, is never up to rounding.
    """
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


def recoupled_fraction(u: FloatArray, v: FloatArray, mass: FloatArray | None = None) -> float:
    """The share of rows i whose partner in the monotone coupling of u (n,) and v (n,) is not v[i].

    With masses (n,), those of u[i] and v[i], it is the share of the mass.

    0 means that AOT is the pairwise loss (DPO with this penalty) on these rows. Ties in one sample
    are broken by the other, so it is 0 wherever u and v are in the same order.
    """
    u_order, v_order = np.lexsort((v, u)), np.lexsort((u, v))
    if mass is None:
        return float(np.mean(u_order != v_order))
    coupling = monotone_coupling(len(u), len(v), mass[u_order], mass[v_order])
    return float(coupling.mass @ (u_order[coupling.u_index] != v_order[coupling.v_index]))
