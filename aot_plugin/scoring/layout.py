"""Decides, once per run, how sequences are presented to the model.

Sequences are always regrouped into micro-batches, so a model whose results depend on that is
refused. Sharing prompts only saves time, so for a model whose results depend on it prompts are not
shared.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .cost import Cost
from .probe import MEDIAN, coarsest_dtype, probe
from .shared_prompts import why_not_shared


@dataclass(frozen=True)
class Layouts:
    """``cost``: what decides where prompts are shared, or None and the reason why they never
    are."""

    cost: Cost | None
    why_not_shared: str | None


def settle_layouts(
    model: nn.Module,
    unwrapped: PreTrainedModel,
    longest: int | None,
    device: torch.device,
    checkpointing: bool,
    regrouped: bool,
) -> Layouts:
    """Ask ``model``, in the state and under the autocast in which it is going to score.

    Args:
        unwrapped: the same without the wrappers of DDP, DeepSpeed or FSDP.
        longest: tokens of the widest row, padding included; None if there is no limit.
        checkpointing: whether layers forget what they computed until the backward pass.
        regrouped: whether a step is exact over several micro-batches.

    Raises:
        ValueError: if ``regrouped``, and a sequence's log-probabilities depend on the others in its
            micro-batch.
    """
    config = unwrapped.config.get_text_config()
    if regrouped:
        refuse_rope_of_the_longest_row(config, longest)
    why_not = why_not_shared(unwrapped, longest)
    found = probe(model, unwrapped, longest, device, share=why_not is None)
    if regrouped and found.depends_on_company:
        raise ValueError(
            "the log-probabilities of a row depend on the rows beside it in a micro-batch (by "
            f"{found.company.found[MEDIAN]:.1g} nats a token, where rounding makes "
            f"{found.company.rounding[MEDIAN]:.1g}), so the result would depend on how a step is "
            "cut. Another `attn_implementation` or a smaller `sequence_len` may help; "
            "`aot_batch: micro_batch` sorts inside micro-batches and trains all the same"
        )
    why_not = why_not or found.why_not_shared()
    if why_not is not None:
        return Layouts(None, why_not)
    itemsize = coarsest_dtype(unwrapped, device).itemsize
    try:
        return Layouts(Cost.of(config, itemsize, checkpointing), None)
    except Exception as error:  # a config of another kind; the model trains without
        return Layouts(None, f"what that costs is unknown: {type(error).__name__}: {error}")


def refuse_rope_of_the_longest_row(config: Any, longest: int | None) -> None:
    """Rotary embeddings whose frequencies transformers takes by the longest row of a batch."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(of_kind for of_kind in parameters.values() if isinstance(of_kind, dict))]
    for rope in kinds:
        kind = rope.get("rope_type", "default")
        limit = config.max_position_embeddings
        if kind == "longrope":
            if rope.get("short_factor") == rope.get("long_factor"):
                continue
            limit = rope.get("original_max_position_embeddings", limit)
            other = "the same `short_factor` and `long_factor`"
        elif "dynamic" in kind:
            other = "another `rope_type`"
        else:
            continue
        if longest is None or longest > limit:
            raise ValueError(
                f"rotary embeddings of `rope_type: {kind}` change for a whole micro-batch as soon "
                f"as one of its rows is longer than {limit} tokens, padding included, so the "
                f"result would depend on how a step is cut; write `sequence_len: {limit}` (which "
                "`pad_to_multiple_of` must divide), or `overrides_of_model_config` "
                f"with `rope_parameters` of {other}"
            )
