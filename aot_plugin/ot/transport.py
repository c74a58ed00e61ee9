"""One-dimensional optimal transport between two samples, exact for unequal sizes.

For a convex penalty h, OT_h(U, V) = min over couplings of E h(u - v) = integral over t in (0, 1)
of h(Q_U(t) - Q_V(t)) dt (Santambrogio, *Optimal Transport for Applied Mathematicians*, thm. 2.9):
the monotone coupling is optimal, so sorting solves the problem. Sample sizes and masses may differ:
the masses, 1/n and 1/m where none are given, are matched along the merged grid of quantile levels,
which is the north-west corner rule on sorted samples.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .coupling import FloatArray, monotone_coupling

SortKind = Literal["hard", "soft"]
OrderKind = Literal["first", "second"]


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
    u_mass: Tensor | None = None,
    v_mass: Tensor | None = None,
    order: OrderKind = "first",
    kinks: Sequence[float] = (),
) -> Tensor:
    """OT_h(U, V) = integral of h(Q_U(t) - Q_V(t)) dt for the samples u ([n]) and v ([m]).

    Of second order (see ``second_order``): the integral of h(I(t)) dt, with the integrated gap I(t)
    of Q_U - Q_V from 0 to t (``integral_over_lines``).

    Args:
        u: the sample that should dominate; float tensor, differentiable.
        v: the sample that should be dominated; same dtype, n and m may differ.
        cost: h, elementwise and convex (see ``penalties``).
        sort: "hard" (exact) or "soft" (``soft_sort`` with epsilon, in the unit of u: nats).
        epsilon: regularization strength of the soft sort.
        u_mass: relative masses of u, [n]; None if all are equal. Only their ratios matter.
        v_mass: those of v, [m].
        order: of dominance.
        kinks: where the second derivative of h jumps; of use in second order.

    Returns:
        A scalar of u's dtype; its gradient is exact (sorting is differentiable almost everywhere).

    Raises:
        ValueError: if a sample is empty, if masses are negative, not finite or all 0, or if there
            are masses with the soft sort: it mixes neighbours, which only means something if they
            are exchangeable.
    """
    if sort == "soft" and (u_mass is not None or v_mass is not None):
        raise ValueError("the soft sort needs equal masses: use the hard one")
    if sort == "soft":
        u_sorted, v_sorted = soft_sort(u, epsilon), soft_sort(v, epsilon)
        coupling = monotone_coupling(len(u), len(v))
    else:
        (u_sorted, u_order), (v_sorted, v_order) = torch.sort(u), torch.sort(v)
        masses = _in_order(u_mass, u_order), _in_order(v_mass, v_order)
        u_sorted, v_sorted = _ties_shared(u_sorted, masses[0]), _ties_shared(v_sorted, masses[1])
        coupling = monotone_coupling(len(u), len(v), *masses)
    arrays = (coupling.u_index, coupling.v_index, coupling.mass)
    i, j, mass = (torch.from_numpy(array).to(u.device) for array in arrays)
    mass, gap = mass.to(u.dtype), u_sorted[i] - v_sorted[j]
    if order == "first":
        return (mass * cost(gap)).sum()
    grown = mass * gap
    return (mass * integral_over_lines(grown.cumsum(0) - grown, grown, cost, kinks)).sum()


def integral_over_lines(
    start: Tensor, slope: Tensor, cost: Callable[[Tensor], Tensor], kinks: Sequence[float] = ()
) -> Tensor:
    """The integral of h(start + slope x) dx over x in (0, 1), for k lines.

    By 8 Gauss-Legendre nodes between kinks: exact for piecewise polynomials up to degree 15
    (squared hinge, least squares), and within rounding for an analytic h (logistic) as long as its
    argument moves by a few units only.

    Args:
        start, slope: [k].
        cost: h, elementwise.
        kinks: where the second derivative of h jumps.

    Returns:
        [k].
    """
    nodes, weights = (
        torch.as_tensor(array).to(start) for array in np.polynomial.legendre.leggauss(8)
    )
    # The ends of the parts need no gradient: what one part loses, its neighbour wins.
    steep = torch.where(slope == 0, 1.0, slope).detach()
    cuts = [((kink - start.detach()) / steep).clamp(0, 1) for kink in kinks]
    ends = torch.stack([torch.zeros_like(start), *cuts, torch.ones_like(start)]).sort(dim=0).values
    total = torch.zeros_like(start)
    for left, right in pairwise(ends):
        x = left[:, None] + (right - left)[:, None] * (1 + nodes) / 2
        total = total + (right - left) / 2 * (cost(start[:, None] + slope[:, None] * x) @ weights)
    return total


def _ties_shared(x: Tensor, mass: FloatArray | None) -> Tensor:
    """Sorted x [n] itself, but equal values share their gradient in proportion to their masses [n].

    They are one atom. Which of them comes first is up to the order of the rows, and in second order
    the first ones would get the largest weights (at the start all logratios are 0).
    """
    _, atom = torch.unique_consecutive(x.detach(), return_inverse=True)
    masses = torch.ones_like(x) if mass is None else torch.from_numpy(mass).to(x)
    total = torch.zeros_like(masses).index_add(0, atom, masses)[atom]
    share = masses / torch.where(total > 0, total, 1.0)
    mean = torch.zeros_like(x).index_add(0, atom, share * x)[atom]
    return x.detach() + (mean - mean.detach())


def _in_order(mass: Tensor | None, order: Tensor) -> FloatArray | None:
    return None if mass is None else mass[order].double().cpu().numpy()
