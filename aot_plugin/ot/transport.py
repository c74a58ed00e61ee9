"""One-dimensional optimal transport between two samples, exact for unequal sizes.

For a convex penalty h, OT_h(U, V) = min over couplings of E h(u - v) = integral over t in (0, 1)
of h(Q_U(t) - Q_V(t)) dt (Santambrogio, *Optimal Transport for Applied Mathematicians*, thm. 2.9):
the monotone coupling is optimal, so sorting solves the problem. Sample sizes may differ: the
masses 1/n and 1/m are matched along the merged grid of quantile levels, which is the north-west
corner rule on sorted samples.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SortKind = Literal["hard", "soft"]


class Coupling(NamedTuple):
    """A coupling of n and m atoms as a list of at most n + m - 1 matched pairs.

    ``u_index`` and ``v_index`` (int64) say which atoms are matched, ``mass`` (float64) how much
    probability the pair carries; masses sum to 1, and per atom to 1/n or 1/m.
    """

    u_index: Tensor
    v_index: Tensor
    mass: Tensor


def northwest_corner(n: int, m: int, device: torch.device | None = None) -> Coupling:
    """The monotone coupling of *sorted* atoms 0..n-1 (mass 1/n each) and 0..m-1 (mass 1/m each).

    Levels are counted in units of 1/(n m), so the breakpoints i m and j n are integers and the
    coupling is exact: no mass below 1/(n m) is lost or invented by rounding.

    Raises:
        ValueError: if one of the samples is empty.
    """
    if n < 1 or m < 1:
        raise ValueError(f"a coupling needs at least one atom on each side, got n={n} and m={m}")
    u_levels = torch.arange(1, n + 1, device=device, dtype=torch.int64) * m
    v_levels = torch.arange(1, m + 1, device=device, dtype=torch.int64) * n
    # With n = m (every paired step) the two grids are the same and the merge can be skipped.
    levels = u_levels if n == m else torch.unique(torch.cat([u_levels, v_levels]))
    widths = torch.diff(levels, prepend=levels.new_zeros(1))
    return Coupling((levels - 1) // m, (levels - 1) // n, widths.double() / (n * m))


def coupling(u: Tensor, v: Tensor) -> Coupling:
    """The optimal coupling of the samples u (shape [n]) and v ([m]) in their own order.

    Ties are broken by position (stable sort), which changes the coupling but not its cost.
    """
    u_order, v_order = torch.argsort(u, stable=True), torch.argsort(v, stable=True)
    i, j, mass = northwest_corner(len(u), len(v), u.device)
    return Coupling(u_order[i], v_order[j], mass)


def soft_sort(x: Tensor, epsilon: float) -> Tensor:
    """Ascending soft sort of x (shape [n]): Blondel et al. 2020 (arXiv 2002.08871), eq. 5-6.

    With w the values sorted in descending order and z = (n, ..., 1) / epsilon, the result is the
    Euclidean projection of z onto the permutahedron of w, which is z - isotonic(z - w)
    (their proposition 3). The isotonic regression is SciPy's pool-adjacent-violators; its blocks
    are constant around x, so averaging within them is also the exact derivative.

    It equals ``sort(x)`` as soon as no gap between neighbours exceeds 1/epsilon, and tends to
    the mean of x as epsilon grows.

    Raises:
        ValueError: if epsilon is not positive.
    """
    if epsilon <= 0:
        raise ValueError(f"soft_sort needs epsilon > 0, got {epsilon}")
    from scipy.optimize import isotonic_regression

    n = len(x)
    w = torch.sort(x, descending=True).values
    rank = torch.arange(n, 0, -1, device=x.device, dtype=torch.float64)
    residual = rank / epsilon - w.detach().double()
    fit = isotonic_regression(residual.cpu().numpy(), increasing=False)
    starts = torch.as_tensor(fit.blocks, dtype=torch.int64, device=x.device)
    sizes = torch.diff(starts)
    block = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), sizes)
    # z minus the block's mean of (z - w), with the large z taken out exactly: mean of w, and how
    # far the rank is from the middle of its block. A block of one is w itself, to the last bit.
    means = torch.zeros(len(sizes), device=x.device, dtype=x.dtype).index_add(0, block, w) / sizes
    from_middle = rank - rank[starts[:-1]][block] + (sizes[block] - 1) / 2
    return (means[block] + (from_middle / epsilon).to(x.dtype)).flip(0)


def transport_value(
    u: Tensor,
    v: Tensor,
    cost: Callable[[Tensor], Tensor],
    sort: SortKind = "hard",
    epsilon: float = 0.1,
) -> Tensor:
    """OT_h(U, V) = integral of h(Q_U(t) - Q_V(t)) dt for the samples u ([n]) and v ([m]).

    Args:
        u: the sample that should dominate; float tensor, differentiable.
        v: the sample that should be dominated; same dtype, n and m may differ.
        cost: h, elementwise and convex (see ``penalties``).
        sort: "hard" (exact) or "soft" (``soft_sort`` with epsilon, in the unit of u: nats).
        epsilon: regularization strength of the soft sort.

    Returns:
        A scalar of u's dtype; its gradient is exact (sorting is differentiable almost everywhere).

    Raises:
        ValueError: if a sample is empty.
    """
    i, j, mass = northwest_corner(len(u), len(v), u.device)
    if sort == "soft":
        u_sorted, v_sorted = soft_sort(u, epsilon), soft_sort(v, epsilon)
    else:
        u_sorted, v_sorted = torch.sort(u).values, torch.sort(v).values
    return (mass.to(u.dtype) * cost(u_sorted[i] - v_sorted[j])).sum()


def recoupled_fraction(u: Tensor, v: Tensor) -> float:
    """The share of rows whose partner in the optimal coupling is another row (n = m required).

    0 means that AOT is the pairwise loss (DPO with this penalty) on these rows. Ties in one sample
    are broken by the other, so it is 0 wherever u and v are in the same order.
    """
    return (_lexicographic_order(u, v) != _lexicographic_order(v, u)).double().mean().item()


def _lexicographic_order(first: Tensor, second: Tensor) -> Tensor:
    order = torch.argsort(second, stable=True)
    return order[torch.argsort(first[order], stable=True)]
