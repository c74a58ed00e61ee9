"""Tokens by which one response of a pair is longer than the other, and their lower weight.

LD-DPO (Liu et al. 2024, arXiv 2409.06411, sec. 4.2): with l the length of the shorter response, the
score of a response y is

    sum_(t <= l) log p(y_t) + alpha sum_(t > l) log p(y_t),    0 <= alpha <= 1,

under policy and reference, so that length alone moves the score less.
"""

import torch
from torch import Tensor

from .model_input import ModelInput

EXCESS = 2
"""What ``completion_mask`` holds for a token beyond the shorter response's length; 1 for others."""


def mark_excess(completion_mask: Tensor) -> Tensor:
    """Marks the excess tokens of n pairs.

    Args:
        completion_mask: [2n, width] int64, 0 or 1; the i-th row and the (n + i)-th are a pair. The
            first column predicts nothing and does not count.
    """
    mask = completion_mask.clone()
    mask[:, 0] = 0
    shorter = mask.sum(dim=1).unflatten(0, (2, -1)).amin(dim=0).repeat(2)
    is_excess = mask.bool() & (mask.cumsum(dim=1) > shorter[:, None])
    return torch.where(is_excess, EXCESS, completion_mask)


def excess_factors(inputs: ModelInput, weight: float) -> Tensor:
    """[n] float32: the factor of each completion token's log-probability, in the order of
    ``completion_mask[:, 1:]``."""
    mask = inputs.completion_mask[:, 1:]
    return torch.where(mask[mask.bool()] == EXCESS, weight, 1.0)
