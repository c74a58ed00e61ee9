"""How one micro-batch gets from its scores to its contribution to the step's gradient.

Sequence i contributes (dL/dlogp_i) grad logp_i. The weight dL/dlogp_i is known only after all
sequences of the step are scored. The three carries differ in what they keep in the meantime:
nothing, the autograd graph of the scoring pass, or grad logp_i itself.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..scoring.gradients import gradient_aside
from ..scoring.model_input import Batch
from ..scoring.scorer import Scorer


class Carry(Protocol):
    """One micro-batch of n sequences. ``score`` is called first, once; a ``Rescore`` whose weights
    are known already needs none. Then ``surrogate`` is called once.

    ``wrapped`` says whether a forward pass with gradient goes through the host's wrapper, where DDP
    arms the synchronization of gradients.
    """

    def score(self, wrapped: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the sequences, [n] float32, in nats, and what is watched beside
        them, [n, 2] (``watched_sequence_logps``), both detached."""
        ...

    def surrogate(self, weights: Tensor, wrapped: bool) -> Tensor:
        """A scalar (float32) whose gradient in the policy's parameters is that of
        sum(weights x logp), for constant weights dL/dlogp, [n] float32."""
        ...


class Rescore:
    """Keeps nothing; the backward stage runs a second forward pass."""

    def __init__(self, scorer: Scorer, batch: Batch) -> None:
        self._scorer, self._batch = scorer, batch

    def score(self, wrapped: bool) -> tuple[Tensor, Tensor]:
        return self._scorer.watched_logps(self._batch)

    def surrogate(self, weights: Tensor, wrapped: bool) -> Tensor:
        return self._scorer.weighted_sum(self._batch, weights, wrapped)


class KeepGraph:
    """Keeps the autograd graph of the scoring pass."""

    def __init__(self, scorer: Scorer, batch: Batch) -> None:
        self._scorer, self._batch = scorer, batch
        self._logps: Tensor | None = None

    def score(self, wrapped: bool) -> tuple[Tensor, Tensor]:
        self._logps, watched = self._scorer.logps_with_graph(self._batch, wrapped)
        return self._logps.detach(), watched

    def surrogate(self, weights: Tensor, wrapped: bool) -> Tensor:
        assert self._logps is not None
        return (weights * self._logps).sum()


class HoldGradient:
    """Keeps the gradient of a row's score s = sum_i signs_i logp_i.

    A row is one sequence (s = logp) or one pair (s = the margin). If the loss depends on the row
    through s only, the row contributes (dL/ds) grad s, and dL/ds is a single number. Memory: one
    copy of the trainable parameters per row, which is small for adapters. If the loss depends on a
    pair's two log-probabilities in another way, a second forward pass is run instead. So it is if
    the model adds gradients to parameters behind autograd's back.

    Args:
        signs: [n] float32, each 1 or -1.
        parameters: the trainable parameters.
    """

    def __init__(
        self, scorer: Scorer, batch: Batch, signs: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        self._scorer, self._batch = scorer, batch
        self._signs, self._parameters = signs, parameters
        self._gradient: tuple[Tensor | None, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the held gradient."""
        return sum(g.nbytes for g in self._gradient or () if g is not None)

    def score(self, wrapped: bool) -> tuple[Tensor, Tensor]:
        logps, watched = self._scorer.logps_with_graph(self._batch, wrapped)
        score = (self._signs * logps).sum()
        self._gradient = gradient_aside(score, self._parameters, self._parameters)
        return logps.detach(), watched

    def surrogate(self, weights: Tensor, wrapped: bool) -> Tensor:
        gradient, self._gradient = self._gradient, None
        factors = self._signs * weights
        if gradient is None or (factors != factors[0]).any():
            return self._scorer.weighted_sum(self._batch, weights, wrapped)
        return scaled_gradient(factors[0], gradient, self._parameters)


def scaled_gradient(
    factor: Tensor, gradient: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> Tensor:
    """A scalar of value 0 (float32) whose gradient in ``parameters`` is factor x gradient.

    Args:
        factor: [], a constant.
        gradient: one tensor per parameter; None for 0.
    """
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
