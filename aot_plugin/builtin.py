"""The built-in penalties, losses and prompt strategies.

They are registered like those of any other package: by an entry point of the group ``aot_plugin``
that names this module.
"""

from collections.abc import Mapping

from .data.rows import STRATEGIES, PromptStrategy
from .hookspecs import hookimpl
from .ot.losses import LOSSES, StepLoss
from .ot.penalties import PENALTIES, Penalty


@hookimpl
def aot_penalties() -> Mapping[str, Penalty]:
    return PENALTIES


@hookimpl
def aot_losses() -> Mapping[str, StepLoss]:
    return LOSSES


@hookimpl
def aot_prompt_strategies() -> Mapping[str, PromptStrategy]:
    return STRATEGIES
