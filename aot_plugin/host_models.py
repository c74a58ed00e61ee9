"""The models that the host has loaded, in order.

Full fine-tuning needs a reference model. The host loads one, by the same settings as the policy
(``overrides_of_model_config``, dtype, added tokens), but hands it to trainers of pairs only; TRL's
KTO trainer would load another from the bare checkpoint. The host's hook for plugins sees it.
"""

import weakref
from itertools import pairwise

from torch import nn

_loaded: list["weakref.ref[nn.Module]"] = []


def remember(model: nn.Module) -> None:
    """Called as the host loads a model; it is not kept alive."""
    _loaded[:] = [other for other in _loaded if other() is not None]
    _loaded.append(weakref.ref(model))


def loaded_after(policy: nn.Module) -> nn.Module | None:
    """The model that the host loaded next to this one: its reference, if the run has one."""
    models = [model() for model in _loaded]
    following = (b for a, b in pairwise(models) if a is policy)
    return next(following, None)
