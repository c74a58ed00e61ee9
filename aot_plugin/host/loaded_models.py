"""The models that the host has loaded, in order.

Full fine-tuning needs a reference model. The host loads one with the same settings as the policy
(``overrides_of_model_config``, dtype, added tokens), but passes it only to trainers of pairs. TRL's
KTO trainer would load another one from the bare checkpoint. The host's plugin hook after loading a
model sees both models, so they are recorded there.
"""

import weakref
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_loaded: list["weakref.ref[nn.Module]"] = []


def remember(model: nn.Module) -> None:
    """Records a model that the host has loaded, by a weak reference."""
    _loaded[:] = [other for other in _loaded if other() is not None]
    _loaded.append(weakref.ref(model))


def loaded_after(policy: nn.Module) -> nn.Module | None:
    """The model that the host loaded right after ``policy``: its reference, if the run has one."""
    models = [model() for model in _loaded]
    following = (b for a, b in pairwise(models) if a is policy)
    return next(following, None)


@torch.no_grad()
def begin_as_policy(reference: nn.Module, policy: nn.Module) -> list[str]:
    """Copies the policy's weights to the reference. Call before the first step.

    Both come from the same checkpoint, but embeddings of added tokens are drawn separately for
    each. Weights that are sharded over ranks (ZeRO-3, FSDP) are not copied.

    Returns:
        The names of the weights that differed.
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
