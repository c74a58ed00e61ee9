"""Which carry each micro-batch of a step gets, from what is permitted and what fits."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

HELD_SHARE = 1 / 3
"""Memory that held gradients may take in a step, as a share of what the model's weights take."""


@dataclass(frozen=True)
class Permits:
    """Why a carry is not allowed in this run, for the log; None if it is."""

    why_no_kept_graph: str | None
    why_no_held_gradients: str | None


@dataclass(frozen=True)
class Allotment:
    """Carries of a step's micro-batches in order: the first ``held`` use HoldGradient, the next
    ``kept`` (0 or 1) KeepGraph, the others Rescore."""

    held: int
    kept: int


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients_that_fit(model: nn.Module) -> int:
    """How many copies of the trainable parameters' gradients may be held at once."""

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.nbytes for parameter in parameters)

    gradient = size(trainable(model))
    # ZeRO-3 leaves a rank's parameters empty between passes.
    return int(size(model.parameters()) * HELD_SHARE / gradient) if gradient else 0


def allot(micro_batches: int, one_row_each: bool, permits: Permits, fit: int) -> Allotment:
    """Allots carries to the micro-batches of a step.

    A gradient can be held for a single row only. A graph is kept for the micro-batch that is scored
    last and back-propagated first, so that at most one graph is alive at a time.

    Args:
        micro_batches: their number.
        one_row_each: True if every micro-batch is a single row.
        permits: which carries are allowed.
        fit: how many gradients may be held (``gradients_that_fit``).
    """
    may_hold = one_row_each and permits.why_no_held_gradients is None
    held = min(micro_batches, fit) if may_hold else 0
    kept = int(permits.why_no_kept_graph is None and held < micro_batches)
    return Allotment(held, kept)
