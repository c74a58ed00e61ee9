"""Log-probabilities of given tokens from hidden states, without ever holding the full logits.

The logits are by far the widest tensor of a forward pass (tokens x vocabulary). Here they exist for
a chunk of tokens at a time. Where the weight of a token in the loss is known before the forward
pass, as it is after the transport stage, the gradient of a chunk is computed together with its
logits, so these are computed once; otherwise the backward pass computes them anew.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from .tail import IDENTITY, Tail

CHUNK_ELEMENTS = 2**24
"""Logits held at a time: 64 MB in float32."""


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states.

    Attributes:
        project: takes hidden states [c, d], each by itself, and the parameters; returns logits
            [c, vocabulary]. Called under autocast if that is on.
        parameters: the tensors that may need gradients.
        vocabulary: how many logits a token has.
        tail: what the model does to them afterwards.
    """

    project: Callable[[Tensor, Sequence[Tensor]], Tensor]
    parameters: tuple[Tensor, ...]
    vocabulary: int
    tail: Tail = IDENTITY


def linear_head(weight: Tensor, bias: Tensor | None, tail: Tail = IDENTITY) -> Head:
    """x W' + b, for W [vocabulary, d] and b [vocabulary].

    Under autocast they are cast here, once for all chunks: of frozen weights it keeps no copy.
    """
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    parameters = (weight,) if bias is None else (weight, bias)
    return Head(lambda hidden, found: F.linear(hidden, *found), parameters, len(weight), tail)


def module_head(
    module: nn.Module, forward: Callable[[Tensor], Tensor], vocabulary: int, tail: Tail = IDENTITY
) -> Head:
    """What ``forward``, that of ``module``, computes."""
    called = _Called(module, forward)
    trained = {name: p for name, p in called.named_parameters() if p.requires_grad}

    def project(hidden: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        given = dict(zip(trained, parameters, strict=True))
        logits: Tensor = torch.func.functional_call(called, given, (hidden,))
        return logits

    return Head(project, tuple(trained.values()), vocabulary, tail)


class _Called(nn.Module):
    """``module``, called by ``forward``: without its hooks, which run once for all chunks."""

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self._forward = module, forward

    def forward(self, hidden: Tensor) -> Tensor:
        return self._forward(hidden)


def token_logps(
    head: Head, hidden: Tensor, targets: Tensor, token_weights: Tensor | None = None
) -> Tensor:
    """log softmax(tail(logits of the hidden states)) at the targets, for n tokens.

    Args:
        head: the LM head; with autocast on, its products are taken in autocast's dtype.
        hidden: [n, d].
        targets: [n] int64.
        token_weights: [n] float32, constants. If given, the result is not the vector of
            log-probabilities but the scalar sum(token_weights x log p), and its gradient is ready
            with it.

    Returns:
        [n] or [] float32, in nats.
    """
    inputs = (hidden, *head.parameters)
    if token_weights is None:
        return _token_logps(head, hidden, targets, watch=False)[0]
    if not _needs_graph(inputs):
        return (token_weights * _logps(head, hidden, targets, watch=False)[0]).sum()
    return _WeightedTokenLogps.apply(head, targets, token_weights, *inputs)


def watched_token_logps(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``token_logps`` [n], and what is watched beside them, [n, 2] float32 without graph: whether
    the target is the most probable token (1 or 0), and the entropy of the prediction, in nats."""
    return _token_logps(head, hidden, targets, watch=True)


@torch.no_grad()
def watched_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """What ``watched_token_logps`` watches, for logits [n, vocabulary] of any dtype."""
    parts = [
        _softmax_(logits[part].to(torch.float32, copy=True), targets[part], watch=True)[1]
        for part in _chunks(*logits.shape)
    ]
    return torch.cat(parts)


def _token_logps(head: Head, hidden: Tensor, targets: Tensor, watch: bool) -> tuple[Tensor, Tensor]:
    inputs = (hidden, *head.parameters)
    if _needs_graph(inputs):
        return _TokenLogps.apply(head, targets, watch, *inputs)
    return _logps(head, hidden, targets, watch)


def _needs_graph(inputs: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(1, CHUNK_ELEMENTS // vocabulary)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """At least one, so that no tokens at all have results and gradients like any others."""
    size = chunk_tokens(vocabulary)
    for start in range(0, max(tokens, 1), size):
        yield slice(start, start + size)


def _softmax_(values: Tensor, targets: Tensor, watch: bool) -> tuple[Tensor, Tensor]:
    """log p at the targets [c], and what is watched [c, 2] (without ``watch`` [c, 0]), for logits
    [c, V] float32, which are destroyed.

    float32 from here on, whatever the product was taken in: bf16 resolves a log-probability of
    a long sequence to whole nats only.
    """
    shifted = values.sub_(values.amax(dim=-1, keepdim=True))
    weights = shifted.exp()
    total = weights.sum(dim=-1)
    log_total = total.log()
    logps = shifted.gather(-1, targets[:, None])[:, 0] - log_total
    if not watch:
        return logps, logps.new_empty(len(logps), 0)
    is_best = shifted.argmax(dim=-1) == targets
    # -sum p log p, for p = weights / total and log p = shifted - log_total
    entropy = log_total - weights.mul_(shifted).sum(dim=-1) / total
    return logps, torch.stack([is_best, entropy], dim=1)


@torch.no_grad()
def _logps(head: Head, hidden: Tensor, targets: Tensor, watch: bool) -> tuple[Tensor, Tensor]:
    parts = []
    for part in _chunks(len(hidden), head.vocabulary):
        logits = head.project(hidden[part], head.parameters)
        parts.append(_softmax_(head.tail(logits.float()), targets[part], watch))
    logps, watched = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(watched)


@contextmanager
def _graph_of_its_own() -> Iterator[None]:
    """A graph that lives for one chunk: hooks that offload what the model's graph saves, or count
    it, must not see it."""
    with torch.enable_grad(), saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        yield


def _value_and_gradients(
    head: Head, targets: Tensor, token_weights: Tensor, hidden: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """sum(token_weights x log p), and its gradients in the hidden states and in the parameters,
    None where not needed.

    From log p back to the logits the gradient is written out, in no more than two tensors of a
    chunk's size; from there to hidden states and parameters it is autograd's, so any head will do.
    """
    value = token_weights.new_zeros(())
    of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
    # Leaves of their own: hooks on the parameters are for the sum over all chunks.
    leaves = [p.detach().requires_grad_(p.requires_grad) for p in head.parameters]
    of_leaves: list[Tensor | None] = [None] * len(leaves)
    for part in _chunks(len(hidden), head.vocabulary):
        with _graph_of_its_own():
            rows = hidden[part].detach().requires_grad_(hidden.requires_grad)
            logits = head.project(rows, leaves)
        values = head.tail(logits.detach().float())
        top = values.amax(dim=-1, keepdim=True)
        of_values = torch.sub(values, top).exp_()
        total = of_values.sum(dim=-1, keepdim=True)
        scale = token_weights[part, None]
        logps = values.gather(-1, targets[part, None]) - top - total.log()
        value += (scale * logps).sum()
        # d log p(target) / d values = onehot(target) - softmax(values)
        of_values.mul_(-scale / total)
        of_values.scatter_add_(-1, targets[part, None], scale)
        of_logits = head.tail.backward_(of_values, values).to(logits.dtype)
        inputs = [leaf for leaf in (rows, *leaves) if leaf.requires_grad]
        grads = iter(torch.autograd.grad(logits, inputs, of_logits, allow_unused=True))
        if of_hidden is not None:
            of_hidden[part] = next(grads)
        for i, leaf in enumerate(leaves):
            if leaf.requires_grad:
                of_leaves[i] = _added(of_leaves[i], next(grads))
    return value, [
        of_hidden,
        *(
            None if total is None else total.to(leaf.dtype)
            for total, leaf in zip(of_leaves, leaves, strict=True)
        ),
    ]


def _added(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Summed over chunks in float32, as a single product would accumulate."""
    if grad is None:
        return total
    return grad.to(torch.float32, copy=True) if total is None else total.add_(grad)


class _WeightedTokenLogps(torch.autograd.Function):
    """sum(token_weights x log p), its gradient computed along with its value."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        targets: Tensor,
        token_weights: Tensor,
        hidden: Tensor,
        *_: Tensor,
    ) -> Tensor:
        # Weights are of the order beta / n, and in fp16 the loss scale that lifts gradients over
        # its smallest number comes only with the backward pass.
        unit = token_weights.abs().amax() if len(token_weights) else token_weights.new_zeros(())
        unit = torch.where(unit > 0, unit, 1.0)
        value, gradients = _value_and_gradients(head, targets, token_weights / unit, hidden)
        ctx.save_for_backward(unit, *gradients)
        return value * unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, *gradients = ctx.saved_tensors
        factor = grad * unit
        scaled = [None if g is None else (g.float() * factor).to(g.dtype) for g in gradients]
        return (None, None, None, *scaled)


class _TokenLogps(torch.autograd.Function):
    """The vector of log-probabilities, and what is watched; the backward pass computes the logits
    anew."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, targets: Tensor, watch: bool, hidden: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.head = head
        device = hidden.device.type
        ctx.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        ctx.save_for_backward(targets, hidden)
        logps, watched = _logps(head, hidden, targets, watch)
        ctx.mark_non_differentiable(watched)
        return logps, watched

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, of_watched: Tensor) -> tuple[Tensor | None, ...]:
        targets, hidden = ctx.saved_tensors
        with ctx.autocast:
            _, gradients = _value_and_gradients(ctx.head, targets, grad, hidden)
        return (None, None, None, *gradients)
