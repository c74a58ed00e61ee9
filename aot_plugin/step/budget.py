"""Which carry each micro-batch of a step gets: what is permitted, and what fits."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

HELD_SHARE = 1 / 3
"""Memory that held gradients may take in a step, as a share of what the model's weights take."""


@dataclass(frozen=True)
class Permits:
    """What stands in the way of a carry in this run, in words; None if nothing does."""

    why_no_kept_graph: str | None
    why_no_held_gradients: str | None


@dataclass(frozen=True)
class Allotment:
    """Carries of a step's micro-batches, in their order: the first ``held`` hold gradients, the
    next ``kept`` (at most one) keep their graph, and the others are scored again."""

    held: int
    kept: int


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients_that_fit(model: nn.Module) -> int:
    """How many copies of the trainable parameters' gradients may be held at once."""

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.nbytes for parameter in parameters)

    return int(size(model.parameters()) * HELD_SHARE / size(trainable(model)))


def allot(micro_batches: int, one_row_each: bool, permits: Permits, fit: int) -> Allotment:
    """The carries of a step.

    Gradients are held for rows only. A graph is kept for the micro-batch that is scored last and
    back-propagated next, so that no two graphs are alive at once.

    Args:
        one_row_each: whether each micro-batch holds a single row.
        fit: ``gradients_that_fit``.
    """
    may_hold = one_row_each and permits.why_no_held_gradients is None
    held = min(micro_batches, fit) if may_hold else 0
    kept = int(permits.why_no_kept_graph is None and held < micro_batches)
    return Allotment(held, kept)
