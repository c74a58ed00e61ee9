"""Decides, once per run, how sequences are presented to the model.

Where a step must not depend on its micro-batches, a model whose results for a sequence depend on
the others in its micro-batch is refused. Other layouts than padded rows only save time, so a model
whose results depend on them gets padded rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import varlen
from .cost import Cost
from .layout import PADDED, Layout, Packed, Shared
from .masks import additive_mask, block_mask, boolean_mask, permit_variants
from .probe import MEDIAN, coarsest_dtype, probe


@dataclass(frozen=True)
class Settled:
    """The layout of a run, and for the log why prompts are not shared, and why rows are not packed;
    None if they are."""

    layout: Layout
    why_not_shared: str | None
    why_not_packed: str | None


def settle_layout(
    model: nn.Module,
    unwrapped: PreTrainedModel,
    longest: int | None,
    device: torch.device,
    checkpointing: bool,
    regrouped: bool,
    multiple: int = 1,
    images: bool = False,
) -> Settled:
    """Probes the layouts that the model's config permits, and returns the best one that is exact.

    Args:
        model: the policy, in the state and under the autocast in which it is going to score.
        unwrapped: the same without the wrappers of DDP, DeepSpeed or FSDP.
        longest: tokens of the widest row, padding included; None if there is no limit.
        checkpointing: whether layers forget what they computed until the backward pass.
        regrouped: whether a step must be exact however it is cut into micro-batches.
        multiple: what the width of padded rows is rounded up to.
        images: whether rows have images. They are scored in the host's micro-batches; the probe's
            rows have none.

    Raises:
        ValueError: if ``regrouped``, and a sequence's log-probabilities depend on the others in its
            micro-batch.
    """
    if regrouped:
        refuse_rope_of_the_longest_row(unwrapped.config.get_text_config(), longest)
    backend = unwrapped.config._attn_implementation
    if backend == "flex_attention":
        permit_variants()
    layouts, why_not = (
        ([], "rows with images are scored as they come")
        if images
        else possible_layouts(unwrapped, longest, device, checkpointing, multiple)
    )
    found = probe(model, unwrapped, longest, device, layouts)
    *failed, last = found.why_not() or [why_not]
    layout = layouts[len(failed)] if last is None else PADDED
    if not isinstance(layout, Packed):
        varlen.remove(backend)
    if regrouped and found.depends_on_company:
        raise ValueError(
            "the log-probabilities of a row depend on the rows beside it in a micro-batch (by "
            f"{found.company.found[MEDIAN]:.1g} nats a token, where rounding makes "
            f"{found.company.rounding[MEDIAN]:.1g}), so the result would depend on how a step is "
            "cut. Another `attn_implementation` or a smaller `sequence_len` may help; "
            "`aot_batch: micro_batch` sorts inside micro-batches and trains all the same"
        )
    if isinstance(layout, Packed):
        return Settled(layout, None, None)
    masked = f"`attn_implementation: {backend}` computes what its mask hides"
    return Settled(layout, last, next(iter(failed), last or masked))


def possible_layouts(
    model: PreTrainedModel,
    longest: int | None,
    device: torch.device,
    checkpointing: bool,
    multiple: int = 1,
) -> tuple[list[Layout], str | None]:
    """Layouts other than padded rows that nothing in the model's config forbids, the best first;
    and the reason why there are no others.

    Kernels that take variable lengths see a sequence's keys in its own order, so a sliding window
    does no harm. Masks of ours replace those of the model's layers, so with them no window may be
    narrower than the ``longest`` sequence.
    """
    config = model.config.get_text_config()
    backend = model.config._attn_implementation
    if why := why_rows_hold_one_sequence(model):
        return [], why
    found: list[Layout] = []
    if varlen.takes_segments(backend, device):
        found.append(Packed(varlen.segments_for(backend, device)))
    if backend not in ("sdpa", "eager", "flex_attention"):
        return found, f"`attn_implementation: {backend}` accepts no custom mask"
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    if window is not None and (longest is None or longest > window):
        return found, f"the sliding window of {window} tokens is narrower than `sequence_len`"
    if backend == "flex_attention":
        return [Packed(block_mask)], None
    dtype, eager = coarsest_dtype(model, device), backend == "eager"
    try:
        cost = Cost.of(config, dtype.itemsize, checkpointing, eager)
    except Exception as error:  # a config of another kind; the model trains without
        return found, f"what that costs is unknown: {type(error).__name__}: {error}"
    form = additive_mask(dtype) if eager else boolean_mask
    return [*found, Shared(form, cost, multiple)], None


def why_rows_hold_one_sequence(model: PreTrainedModel) -> str | None:
    """What forbids several sequences in a row with every kind of attention; None if nothing is
    known to forbid it."""
    config = model.config.get_text_config()
    if getattr(config, "attention_chunk_size", None) is not None:
        return "the model attends within chunks"
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(map(str, kinds - {"full_attention", "sliding_attention"}))
    # State-space and linear-attention layers come with one, whether the config names them or not.
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        others = others or ["convolution"]
    if others:
        return f"the model has layers of another kind ({', '.join(others)})"
    # Such a mask is written for one sequence a row, and may act beyond the probe's length only.
    if any(buffer.ndim == 4 and buffer.dtype == torch.bool for buffer in model.buffers()):
        return "the model has a mask of its own"
    return None


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
