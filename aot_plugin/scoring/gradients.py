"""Whether the gradient of rows together is the sum of the gradients of the rows alone.

The scores may agree and the gradients not: kernels, and layers that save memory, have a backward
pass of their own. So it is compared on the first rows of a run, for some of the parameters.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .model_input import FIELDS, Batch, is_divisible
from .scorer import Scorer

TOLERANCE = 0.25
"""Relative error that is rounding without further ado. In bf16 on a CPU rounding makes 0.002 to
0.06 (SmolLM2-135M; random Llama, Mixtral, Qwen3-MoE, DeepSeek-V3, Gemma 2 and Falcon Mamba models
of 8 layers), and 0.1 in the magnitudes of DoRA; Axolotl's `tiled_mlp` with two rows is off by 0.4
to 0.8."""

TIMES_ROUNDING = 1.5
"""How many times the measured rounding a larger error may be. Not more: what is measured shifts the
output of every module by up to a unit in the last place, which makes 0.2 to 0.3 in SmolLM2-135M in
bf16. A backward pass that knows one of two rows is off by 1.6 there."""

DRAWS = 2
"""How often rounding is measured. A token that is routed to another expert is not in every draw."""

LARGEST = 2**26
"""Parameters with more elements are not compared, for the memory of their gradients."""

SAMPLE = 2**20
"""Number of elements of a gradient that are compared at most, evenly spaced."""

SMALL = 0.01
"""Parameters whose gradient is smaller than this share of the largest one are not compared."""


def gradient_error(
    scorer: Scorer,
    batch: Batch,
    model: nn.Module,
    perturbed: Callable[[], AbstractContextManager[Any]],
) -> float:
    """The relative error of the gradient of a few rows in one micro-batch, in the layout of the
    run, against the sum of the gradients of padded rows one by one.

    Compared are the first and the last parameter of each kind, that is, of each name without its
    numbers: the gradient of the first one passes through all other layers, and the last layers may
    have kernels that the first ones lack (experts after dense layers, heads).

    Rounding may make most of a gradient that is nearly 0: that of a response whose tokens are
    certain. So it is measured where the error is larger than ``TOLERANCE``.

    Args:
        scorer: scores batches under the policy.
        batch: the rows, of which at most four are used.
        model: the policy, unwrapped.
        perturbed: context in which the model rounds differently each time.

    Returns:
        The largest error over the compared parameters (see ``relative_error``); 0 if rounding
        explains it, or if there is nothing to compare.
    """
    compared = _compared(model)
    if not compared or not is_divisible(batch):
        return 0.0
    n = len(batch["input_ids"])
    # Chosen responses stand before the rejected ones: both of a pair, which share a prompt.
    rows = sorted({row for row in (0, 1, n // 2, n // 2 + 1) if row < n})
    together = _gradient(scorer, batch, rows, compared, model)
    alone = _gradients_alone(scorer, batch, rows, compared, model)
    if together is None or alone is None:
        return 0.0  # a layer adds to .grad by itself; its gradients can't be taken aside
    error = relative_error([together], alone)
    if error <= TOLERANCE:
        return 0.0
    for _ in range(DRAWS):
        with perturbed():
            again = _gradients_alone(scorer, batch, rows, compared, model)
        if again is None or error <= TIMES_ROUNDING * relative_error(again, alone):
            return 0.0
    return error


def relative_error(found: Sequence[Sequence[Tensor]], rows: Sequence[Sequence[Tensor]]) -> float:
    """The largest ||sum(found) - sum(rows)|| / sqrt(sum ||row||^2) over parameters, except those
    whose gradients are ``SMALL``.

    Not in units of the sum: it is nearly 0 where rows want the opposite of each other (two answers
    to one question that are equally probable), and its rounding is that of the rows.

    A gradient that is NaN only in ``found`` is off by infinity.

    Args:
        found: gradients of which the sum is to be compared, each one tensor a parameter.
        rows: the gradients of single rows.
    """
    of_parameters = list(zip(*rows, strict=True))
    sizes = [sum(t.norm().item() ** 2 for t in parts) ** 0.5 for parts in of_parameters]
    largest = max(sizes, default=0.0)
    return max(
        (
            (sum(a) - sum(b)).norm().nan_to_num(math.inf, math.inf).item() / size
            for a, b, size in zip(zip(*found, strict=True), of_parameters, sizes, strict=True)
            if size > SMALL * largest
        ),
        default=0.0,
    )


def gradient_aside(
    score: Tensor, parameters: Sequence[Tensor], trained: Sequence[Tensor]
) -> tuple[Tensor | None, ...] | None:
    """The gradient of ``score`` in ``parameters``; None where it is 0.

    A layer that saves memory by running ``backward`` inside its own backward pass (reentrant
    checkpointing, tiled layers) adds to ``.grad`` of the ``trained`` parameters what is then
    missing here. If one does, nothing is returned at all, and ``.grad`` is as it was.
    """
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    try:
        gradient = torch.autograd.grad(score, parameters, allow_unused=True)
        is_whole = all(parameter.grad is None for parameter in trained)
    finally:
        for parameter, grad in zip(trained, before, strict=True):
            parameter.grad = grad
    return gradient if is_whole else None


def _gradients_alone(
    scorer: Scorer, batch: Batch, rows: list[int], compared: list[nn.Parameter], model: nn.Module
) -> list[list[Tensor]] | None:
    """``_gradient`` of each row."""
    alone = [_gradient(scorer, batch, [row], compared, model) for row in rows]
    found = [gradient for gradient in alone if gradient is not None]
    return found if len(found) == len(rows) else None


def _compared(model: nn.Module) -> list[nn.Parameter]:
    kinds: dict[Any, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad and not isinstance(p, DTensor) and 0 < p.numel() <= LARGEST:
            kinds.setdefault((re.sub(r"\d+", "", name), p.shape), []).append(p)
    ends = (p for same in kinds.values() for p in (same[0], same[-1]))
    return list({id(p): p for p in ends}.values())


def _gradient(
    scorer: Scorer, batch: Batch, rows: list[int], compared: list[nn.Parameter], model: nn.Module
) -> list[Tensor] | None:
    """The gradient of the sum of the rows' log-probabilities in float32; None if some of it is
    added to ``.grad`` on the way."""
    part = {name: batch[name][rows] for name in FIELDS}
    weights = torch.ones(len(rows), device=part["input_ids"].device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    score = (scorer.weighted_sum if len(rows) > 1 else scorer.weighted_sum_apart)(part, weights)
    gradient = gradient_aside(score, compared, trained)
    if gradient is None:
        return None
    return [
        _sample(torch.zeros_like(p) if g is None else g)
        for p, g in zip(compared, gradient, strict=True)
    ]


def _sample(gradient: Tensor) -> Tensor:
    return gradient.flatten()[:: -(-gradient.numel() // SAMPLE)].float()
