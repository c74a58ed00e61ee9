"""Whether the gradient of rows together is the sum of the gradients of the rows alone.

The scores may agree and the gradients not: kernels, and layers that save memory, have a backward
pass of their own. So it is compared on the first rows of a run, for some of the parameters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .model_input import FIELDS, Batch, is_divisible
from .scorer import Scorer

TOLERANCE = 0.25
"""Relative error that may be rounding. In bf16 on a CPU rounding makes 0.01 to 0.03 (SmolLM2-135M;
random Llama, Mixtral, Qwen3-MoE and Gemma 2 models of 8 layers); Axolotl's `tiled_mlp` with two
rows is off by 0.4 to 0.8."""

COMPARED = 16
"""Number of parameters that are compared, of at most ``LARGEST`` elements each: the first ones,
whose gradients pass through all other layers."""

LARGEST = 2**24

SMALL = 0.01
"""Parameters whose gradient is smaller than this share of the largest one are not compared."""


def gradient_error(scorer: Scorer, batch: Batch, model: nn.Module) -> float:
    """The relative error of the gradient of a few rows in one micro-batch, in the layout of the
    run, against the sum of the gradients of padded rows one by one.

    Args:
        scorer: scores batches under the policy.
        batch: the rows, of which at most four are used.
        model: the policy, unwrapped.

    Returns:
        The largest error over the compared parameters, in units of the gradient's norm; 0 if there
        is nothing to compare.
    """
    compared = _compared(model)
    if not compared or not is_divisible(batch):
        return 0.0
    n = len(batch["input_ids"])
    # Chosen responses stand before the rejected ones: both of a pair, which share a prompt.
    rows = sorted({row for row in (0, 1, n // 2, n // 2 + 1) if row < n})
    together = _gradient(scorer, batch, rows, compared, model)
    alone = [_gradient(scorer, batch, [row], compared, model) for row in rows]
    if together is None or any(gradient is None for gradient in alone):
        return 0.0  # a layer adds to .grad by itself; its gradients can't be taken aside
    summed = [torch.stack(parts).sum(dim=0) for parts in zip(*filter(None, alone), strict=True)]
    return relative_error(together, summed)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ||found - expected|| / ||expected|| over tensors that are not ``SMALL``."""
    sizes = [tensor.norm().item() for tensor in expected]
    largest = max(sizes, default=0.0)
    return max(
        (
            (a - b).norm().item() / size
            for a, b, size in zip(found, expected, sizes, strict=True)
            if size > SMALL * largest
        ),
        default=0.0,
    )


def _compared(model: nn.Module) -> list[nn.Parameter]:
    trained = (p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor))
    return [p for p in trained if 0 < p.numel() <= LARGEST][:COMPARED]


def _gradient(
    scorer: Scorer, batch: Batch, rows: list[int], compared: list[nn.Parameter], model: nn.Module
) -> list[Tensor] | None:
    """The gradient of the sum of the rows' log-probabilities in float32; None if some of it is
    added to ``.grad`` on the way."""
    part = {name: batch[name][rows] for name in FIELDS}
    weights = torch.ones(len(rows), device=part["input_ids"].device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    try:
        score = (scorer.weighted_sum if len(rows) > 1 else scorer.weighted_sum_apart)(part, weights)
        gradient = torch.autograd.grad(score, compared, allow_unused=True)
        is_whole = all(parameter.grad is None for parameter in trained)
    finally:
        for parameter, grad in zip(trained, before, strict=True):
            parameter.grad = grad
    if not is_whole:
        return None
    return [
        torch.zeros_like(p, dtype=torch.float32) if g is None else g.float()
        for p, g in zip(compared, gradient, strict=True)
    ]
