"""Gradients that wait for the factor of their row.

Before the transport move nobody knows by how much a row counts in the loss, but for a row on its
own that is all that is unknown: by the chain rule its part of the step's gradient is one number
times the gradient of its score (log-probability, or margin of a pair). So the number may come
after the gradient, and the row needs no second forward pass. What that takes is memory: a copy of
the trainable parameters' gradients per row, which is little for adapters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradient = tuple[Tensor | None, ...]
"""One gradient per parameter; None where the score does not depend on it."""

HELD_KEY = "aot_held"
"""Key of a collated batch that was scored along with its gradient: the ``Gradient``."""


def held_surrogate(factor: Tensor, gradient: Gradient, parameters: Sequence[Tensor]) -> Tensor:
    """A scalar of value 0 (float32) whose gradient in the parameters is factor x gradient, for a
    constant factor of shape []."""
    return _Held.apply(factor, gradient, *parameters)


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: Tensor, gradient: Gradient, *parameters: Tensor) -> Tensor:
        ctx.factor, ctx.gradient = factor, gradient
        return factor.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad * ctx.factor
        return (None, None, *(None if g is None else g * factor.to(g.dtype) for g in ctx.gradient))
