"""The models that the host has loaded, in order.

Full fine-tuning needs a reference model. The host loads one, by the same settings as the policy
(``overrides_of_model_config``, dtype, added tokens), but hands it to trainers of pairs only; TRL's
KTO trainer would load another from the bare checkpoint. The host's hook for plugins sees it.
"""

import weakref
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.tensor import DTensor

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


@torch.no_grad()
def begin_as_policy(reference: nn.Module, policy: nn.Module) -> list[str]:
    """Give the reference the policy's weights, as they are before the first step.

    Both come from one checkpoint, but embeddings of added tokens are drawn anew for each. Weights
    that are shared out among ranks (ZeRO-3, FSDP) are left alone.

    Returns:
        The names of the weights that were other ones.
    """
    theirs = dict(policy.named_parameters())
    changed = []
    for name, parameter in reference.named_parameters():
        weight = theirs.get(name)
        if weight is None:
            continue
        shared = any(isinstance(p, DTensor) or not p.numel() for p in (parameter, weight))
        if shared or weight.shape != parameter.shape or weight.is_meta:
            continue
        values = weight.to(parameter.device, parameter.dtype)
        if not torch.equal(values, parameter):
            parameter.copy_(values)
            changed.append(name)
    return changed
