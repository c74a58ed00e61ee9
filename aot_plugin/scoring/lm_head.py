"""Log-probabilities of given tokens from hidden states, without ever holding the full logits.

The logits are by far the widest tensor of a forward pass (tokens x vocabulary). Here they exist for
a chunk of tokens at a time. Where the weight of a token in the loss is known before the forward
pass, as it is after the transport stage, the gradient of a chunk is computed together with its
logits, so these are computed once; otherwise the backward pass computes them anew.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**24
"""Logits held at a time: 64 MB in float32."""


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None = None,
) -> Tensor:
    """log softmax(hidden W' + b) at the targets, for n tokens.

    Args:
        hidden: [n, d]; with autocast on, the product is taken in autocast's dtype.
        weight, bias: the LM head's, [vocabulary, d] and [vocabulary].
        targets: [n] int64.
        token_weights: [n], constants. If given, the result is not the vector of log-probabilities
            but the scalar sum(token_weights x log p), and its gradient is ready with it.

    Returns:
        [n] or [] float32, in nats.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():
        logps = _logps(hidden, weight, bias, targets)
        return logps if token_weights is None else (token_weights * logps).sum()
    if token_weights is None:
        return _TokenLogps.apply(hidden, weight, bias, targets)
    return _WeightedTokenLogps.apply(hidden, weight, bias, targets, token_weights)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, tokens, size):
        yield slice(start, start + size)


def _chunk_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p at the targets [c], logits [c, V], log of their partition sums [c, 1]).

    float32 from here on, whatever the product was taken in: bf16 resolves a log-probability of
    a long sequence to whole nats only.
    """
    logits = F.linear(hidden, weight, bias).float()
    log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
    return (logits.gather(-1, targets[:, None]) - log_z)[:, 0], logits, log_z


def _logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    parts = [
        _chunk_logps(hidden[part], weight, bias, targets[part])[0]
        for part in _chunks(len(hidden), len(weight))
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _value_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weights: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """sum(token_weights x log p) and its gradients in (hidden, weight, bias) where needed."""
    value = token_weights.new_zeros(())
    of_hidden = torch.empty_like(hidden) if needed[0] else None
    # Summed over chunks in float32, as a single product would accumulate.
    of_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
    of_bias = (
        torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None
    )
    for part in _chunks(len(hidden), len(weight)):
        logps, logits, log_z = _chunk_logps(hidden[part], weight, bias, targets[part])
        scale = token_weights[part, None]
        value += (token_weights[part] * logps).sum()
        # d log p(target) / d logits = onehot(target) - softmax(logits)
        of_logits = logits.sub_(log_z).exp_().mul_(-scale)
        of_logits.scatter_add_(-1, targets[part, None], scale)
        if of_bias is not None:
            of_bias += of_logits.sum(dim=0)
        of_logits = of_logits.to(hidden.dtype)
        if of_hidden is not None:
            torch.mm(of_logits, weight, out=of_hidden[part])
        if of_weight is not None:
            of_weight += of_logits.T @ hidden[part]
    return value, [
        of_hidden,
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    ]


class _WeightedTokenLogps(torch.autograd.Function):
    """sum(token_weights x log p), its gradient computed along with its value."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weights: Tensor,
    ) -> Tensor:
        # Weights are of the order beta / n, and in fp16 the loss scale that lifts gradients over
        # its smallest number comes only with the backward pass.
        unit = token_weights.abs().amax() if len(token_weights) else token_weights.new_zeros(())
        unit = torch.where(unit > 0, unit, 1.0)
        value, gradients = _value_and_gradients(
            hidden, weight, bias, targets, token_weights / unit, ctx.needs_input_grad
        )
        ctx.save_for_backward(unit, *gradients)
        return value * unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, *gradients = ctx.saved_tensors
        factor = grad * unit
        scaled = [None if g is None else (g.float() * factor).to(g.dtype) for g in gradients]
        return (*scaled, None, None)


class _TokenLogps(torch.autograd.Function):
    """The vector of log-probabilities; the backward pass computes the logits anew."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        return _logps(hidden, weight, bias, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        _, gradients = _value_and_gradients(
            hidden, weight, bias, targets, grad, ctx.needs_input_grad
        )
        return (*gradients, None)
