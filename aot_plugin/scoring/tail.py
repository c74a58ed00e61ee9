"""What a model does to its logits after the LM head, measured on known logits.

Gemma applies a soft cap, Cohere and Granite scale, most models return them unchanged. Configs name
the factor differently, so it is measured: the model is given known logits in place of its own, and
the function is read off what it returns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE, SMALL = 2.0**15, 2.0**-14
"""Logits at which a soft cap is all cap (below LARGE / 10), and all slope."""

WIDEST = 200.0
"""The other known logits lie between this and its negative."""

ROUNDING = 3e-6
"""Relative; the models take their factors in another order than ``Tail`` does."""


@dataclass(frozen=True)
class Tail:
    """f(x) = cap tanh(scale x / cap) for each logit x, or scale x if there is no cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """f of float32 logits of any shape; the same tensor if f is the identity."""
        if self.cap is not None:
            return torch.mul(logits, self.scale / self.cap).tanh_().mul_(self.cap)
        return logits if self.scale == 1 else logits * self.scale

    def backward_(self, grad: Tensor, values: Tensor) -> Tensor:
        """The gradient in x, in place of ``grad``, that in ``values`` = f(x). With a cap it
        destroys ``values``."""
        if self.scale != 1:
            grad.mul_(self.scale)
        if self.cap is not None:
            # d tanh = 1 - tanh^2
            grad.mul_(values.div_(self.cap).square_().neg_().add_(1))
        return grad


IDENTITY = Tail()


def known_logits(like: Tensor) -> Tensor:
    """Logits of the shape of ``like``, float32, for ``fitted_tail``.

    Each token of the vocabulary has several values, from token to token of the row a quarter of the
    last ones, so that something small that is added to it shows. All are bf16 numbers: FSDP2
    returns a model's output in bf16.
    """
    tokens, vocabulary = like.shape[-2:]
    values = torch.linspace(-WIDEST, WIDEST, vocabulary, device=like.device)
    sizes = 0.25 ** torch.arange(tokens, device=like.device)
    logits = (sizes[:, None] * values).expand(like.shape).bfloat16().float()
    logits.view(-1)[:2] = logits.new_tensor([LARGE, SMALL])
    return logits


def fitted_tail(logits: Tensor, returned: Tensor) -> Tail | None:
    """The function that made ``returned`` of ``known_logits``; None if it is no ``Tail``, or
    something else than a function of each logit."""
    if returned.shape != logits.shape:
        return None
    returned = returned.float()
    if torch.equal(returned, logits):
        return IDENTITY
    for tail in _candidates(*returned.flatten()[:2].tolist()):
        if torch.allclose(tail(logits), returned, rtol=ROUNDING, atol=0.0):
            return tail
    return None


def _candidates(of_large: float, of_small: float) -> Iterator[Tail]:
    scale = of_small / SMALL
    yield Tail(scale)
    if of_large != 0:
        yield Tail(1.0, of_large)  # exactly 1, where it can be
        yield Tail(scale, of_large)
