"""What takes one micro-batch from its scores to its part of the step's gradient.

Before the transport move a sequence has no weight in the loss; afterwards it has one, a constant
dL/dlogp, and its part of the gradient is dL/dlogp x grad logp. The three kinds differ in what they
keep between the two: nothing, the scoring pass's graph, or grad logp itself.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..scoring.model_input import Batch
from ..scoring.scorer import Scorer


class Carry(Protocol):
    """One micro-batch of n sequences; each method is called once, in this order."""

    def score(self) -> Tensor:
        """Their log-probabilities, [n] float32, in nats, without gradient."""
        ...

    def surrogate(self, weights: Tensor) -> Tensor:
        """A scalar (float32) whose gradient in the policy's parameters is that of
        sum(weights x logp), for constant weights dL/dlogp, [n] float32."""
        ...


class Rescore:
    """Keeps nothing, and takes a second forward pass."""

    def __init__(self, scorer: Scorer, batch: Batch) -> None:
        self._scorer, self._batch = scorer, batch

    def score(self) -> Tensor:
        return self._scorer.logps(self._batch)

    def surrogate(self, weights: Tensor) -> Tensor:
        return self._scorer.weighted_sum(self._batch, weights)


class KeepGraph:
    """Keeps the graph of the scoring pass."""

    def __init__(self, scorer: Scorer, batch: Batch) -> None:
        self._scorer, self._batch = scorer, batch
        self._logps: Tensor | None = None

    def score(self) -> Tensor:
        self._logps = self._scorer.logps_with_graph(self._batch)
        return self._logps.detach()

    def surrogate(self, weights: Tensor) -> Tensor:
        assert self._logps is not None
        return (weights * self._logps).sum()


class HoldGradient:
    """Keeps the gradient of one row's score, a copy of the trainable parameters: little for
    adapters.

    The weights of a row's sequences are known but for one factor where the loss looks at the row's
    score alone: +1 for one sequence, +1 and -1 for the two of a pair (their margin). Then the row's
    part of the gradient is that factor times the gradient held. A loss that looks at more of a pair
    costs a second forward pass.

    Args:
        signs: [n] float32, 1 or -1: the score is sum(signs x logp).
        parameters: the trainable ones.
    """

    def __init__(
        self, scorer: Scorer, batch: Batch, signs: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        self._scorer, self._batch = scorer, batch
        self._signs, self._parameters = signs, parameters
        self._gradient: tuple[Tensor | None, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the gradient that is held."""
        return sum(g.nbytes for g in self._gradient or () if g is not None)

    def score(self) -> Tensor:
        logps = self._scorer.logps_with_graph(self._batch)
        score = (self._signs * logps).sum()
        self._gradient = torch.autograd.grad(score, self._parameters, allow_unused=True)
        return logps.detach()

    def surrogate(self, weights: Tensor) -> Tensor:
        gradient, self._gradient = self._gradient, None
        factors = self._signs * weights
        if (factors != factors[0]).any():
            return self._scorer.weighted_sum(self._batch, weights)
        assert gradient is not None
        return scaled_gradient(factors[0], gradient, self._parameters)


def scaled_gradient(
    factor: Tensor, gradient: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> Tensor:
    """A scalar of value 0 (float32) whose gradient in the parameters is factor x gradient, for a
    constant factor []. None in ``gradient`` stands for 0."""
    return _ScaledGradient.apply(factor, gradient, *parameters)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: Tensor, gradient: Any, *parameters: Tensor) -> Tensor:
        ctx.factor, ctx.gradient = factor, gradient
        return factor.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad * ctx.factor
        return (None, None, *(None if g is None else g * factor.to(g.dtype) for g in ctx.gradient))
