"""Penalties h(z): what a violation z = u - v of the quantile order costs.

Every penalty is non-increasing where it matters (a quantile of U above that of V is good), convex,
and elementwise, so that the transport problem with cost h(u - v) is solved by sorting.
Source: AOT, arXiv 2406.05882 (relaxations of the violation of first-order stochastic dominance).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Penalty = Callable[[Tensor, float], Tensor]
"""``penalty(z, beta) -> h(z)``: elementwise, any shape, differentiable, convex in z."""


def logistic(z: Tensor, beta: float) -> Tensor:
    """h(z) = -log sigmoid(beta z): the smooth default, DPO's own when nothing is re-coupled."""
    return -F.logsigmoid(beta * z)


def squared_hinge(z: Tensor, beta: float) -> Tensor:
    """h(z) = max(beta - z, 0)^2: no gradient once U leads V by the margin beta (nats)."""
    return torch.relu(beta - z).square()


def least_squares(z: Tensor, beta: float) -> Tensor:
    """h(z) = (beta - z)^2: pulls every quantile gap to exactly beta (nats)."""
    return (beta - z).square()


def smoothed(penalty: Penalty, label_smoothing: float) -> Penalty:
    """(1 - s) h(z) + s h(-z): a share s of the labels is taken to be flipped (as in TRL)."""
    if not label_smoothing:
        return penalty

    def h(z: Tensor, beta: float) -> Tensor:
        return (1 - label_smoothing) * penalty(z, beta) + label_smoothing * penalty(-z, beta)

    return h


PENALTIES: dict[str, Penalty] = {
    "logistic": logistic,
    "squared_hinge": squared_hinge,
    "least_squares": least_squares,
}
