"""What another package can add to aot_plugin (pluggy, project name ``aot_plugin``).

A package implements any of these functions with ``@aot_plugin.hookspecs.hookimpl`` in a module and
names that module in its entry points::

    [project.entry-points.aot_plugin]
    my_package = "my_package.aot"

The built-in penalties, losses and prompt strategies are registered through the same hooks. A name
that two packages register is an error, never a silent override.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .data.rows import PromptStrategy
    from .ot.losses import StepLoss
    from .ot.penalties import Penalty

PROJECT_NAME = "aot_plugin"
hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def aot_penalties() -> "Mapping[str, Penalty]":  # type: ignore[empty-body]
    """Penalties h by their names in ``aot_penalty``.

    ``penalty(z, beta) -> h(z)``: z = u - v is a float64 tensor of any shape (nats). h is
    elementwise, differentiable by autograd, and convex in z (otherwise sorting does not solve the
    transport problem).
    """


@hookspec
def aot_losses() -> "Mapping[str, StepLoss]":  # type: ignore[empty-body]
    """Whole losses by their names in ``aot_loss``.

    ``loss(step, options) -> scalar``: ``step`` holds the log-probabilities of every sequence of
    the optimizer step, over all micro-batches and ranks (``losses.PairedLogps`` or
    ``losses.UnpairedLogps``, float64); ``options`` holds the resolved penalty, beta and sort. The
    trainer differentiates the loss by autograd with respect to the policy's log-probabilities.
    """


@hookspec
def aot_prompt_strategies() -> "Mapping[str, PromptStrategy]":  # type: ignore[empty-body]
    """Prompt strategies for unpaired rows by their names in ``type:`` of a ``datasets:`` entry.

    ``strategy.examples(row, options)`` yields an ``Example`` (prompt turns, completion turn, label)
    for every response in a row; ``strategy.options`` is the pydantic class of the keys that the
    entry accepts (``PromptStrategy`` and ``Example`` are in ``aot_plugin.data.rows``).
    """
