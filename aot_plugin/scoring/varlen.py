"""Shared prompts in attention kernels that take variable lengths: flash attention, PyTorch's own.

Such a kernel sees one row as segments, and takes separate lengths for queries and for keys. Causal
attention is aligned at the end: the last query sees all keys of its segment, the one before it all
but the last. So if the queries of a segment are a completion, and its keys are the prompt followed
by the completion, each query sees the prompt and its own completion up to itself, at no cost of a
mask or of padding. The row holds the keys of a prompt once, so they are repeated for each of its
completions just before the kernel is called.

The segments travel as one keyword argument of the model's forward pass, which transformers passes
on to the attention function of each layer. There a wrapper around transformers' own function, under
the same name, repeats the keys and passes the lengths on. Window, scale, soft cap, sinks and
dropout reach a flash-attention kernel as the model gives them. Calls without the argument are left
as they are.
"""

from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .masks import PROMPT, Form, Places

ARGUMENT = "aot_segments"
"""Keyword argument of the model's forward pass. transformers does not use this name, so a model
that does not pass it on computes attention without it, which the probe detects, and never calls a
kernel with lengths that do not match its keys."""


class Segments(NamedTuple):
    """Segments of one row.

    Attributes:
        queries, keys: where segments begin, and the end of the last one, [segments + 1] int32.
        longest_queries, longest_keys: of a segment.
        source: the token that each key is taken from, [keys] int64; None if keys are as they stand
            in the row.
    """

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    source: Tensor | None


def segments_for(name: str, device: torch.device) -> Form:
    """The form for attention of this name (see ``takes_segments``).

    The wrapper is registered when the form is first used. The registration is checked at each use,
    since a function that other code registers in the meantime would ignore the segments.

    Raises:
        RuntimeError: when the form is used, if attention of this name does not take segments.
    """

    def form(places: Places) -> dict[str, Any]:
        registered, kind = AttentionInterface().get(name), _kind(name, device)
        if kind is None:
            raise RuntimeError(f"`{name}` attention is no longer transformers' own: {registered}")
        if not isinstance(registered, kind):
            AttentionInterface.register(name, kind(registered))
        return {"attention_mask": kind.mask(places), ARGUMENT: segments(places)}

    return form


def segments(places: Places) -> Segments:
    """From the places [1, width] of a row without padding in which the prompt of a document stands
    before its completions."""
    device = places.document.device
    at = torch.stack([places.document[0], places.branch[0]]).cpu()
    runs, lengths = torch.unique_consecutive(at, dim=1, return_counts=True)
    prompts: dict[int, Tensor] = {}
    queries, keys, start = [], [], 0
    for document, branch, length in zip(*runs.tolist(), lengths.tolist(), strict=True):
        own = torch.arange(start, start := start + length)
        queries.append(own)
        keys.append(torch.cat([prompts[document], own]) if document in prompts else own)
        if branch == PROMPT:
            prompts[document] = own
    index = torch.cat(keys)
    return Segments(
        _starts(queries, device),
        _starts(keys, device),
        max(map(len, queries)),
        max(map(len, keys)),
        index.to(device) if len(index) > start else None,
    )


def _starts(parts: list[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([0, *map(len, parts)]).cumsum(0).to(device, torch.int32)


class SegmentedAttention:
    """An attention function of transformers that takes segments, too."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Args: ``query``, ``key`` and ``value`` [1, heads, tokens, head size]."""
        found: Segments | None = kwargs.pop(ARGUMENT, None)
        if found is None:
            return self.inner(module, query, key, value, *args, **kwargs)
        if found.source is not None:
            key, value = key.index_select(2, found.source), value.index_select(2, found.source)
        return self.of_segments(found, module, query, key, value, *args, **kwargs)

    def of_segments(self, found: Segments, *args: Any, **kwargs: Any) -> Any:
        """Attention within segments. The keys are those of the segments already."""
        raise NotImplementedError

    @staticmethod
    def mask(places: Places) -> Tensor | None:
        """The mask to pass to the model, so that it builds none itself."""
        return None


class SegmentedFlash(SegmentedAttention):
    """Flash attention, by the lengths that transformers passes on to the kernel."""

    def of_segments(self, found: Segments, *args: Any, **kwargs: Any) -> Any:
        return self.inner(
            *args,
            cu_seq_lens_q=found.queries,
            cu_seq_lens_k=found.keys,
            max_length_q=found.longest_queries,
            max_length_k=found.longest_keys,
            **kwargs,
        )


class SegmentedSDPA(SegmentedAttention):
    """``sdpa``, by PyTorch's kernel for variable lengths. What ``sdpa`` ignores (soft caps) is
    ignored as well."""

    def of_segments(
        self,
        found: Segments,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if dropout or position_bias is not None or not causal:
            raise ValueError("PyTorch's kernel is causal, and has neither dropout nor biases")
        device, dtype = query.device.type, query.dtype
        if torch.is_autocast_enabled(device):  # which knows SDPA, but not this kernel
            dtype = torch.get_autocast_dtype(device)
        kernel, group = torch_varlen().varlen_attn, query.shape[1] // key.shape[1]
        grouped = {}
        if group > 1 and _has(kernel, "enable_gqa"):
            grouped = {"enable_gqa": True}
        elif group > 1:
            key, value = (values.repeat_interleave(group, dim=1) for values in (key, value))
        output = kernel(
            *(values[0].transpose(0, 1).to(dtype) for values in (query, key, value)),
            found.queries,
            found.keys,
            found.longest_queries,
            found.longest_keys,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            **grouped,
        )
        return output[None], None

    @staticmethod
    def mask(places: Places) -> Tensor | None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=places.document.device)


def torch_varlen() -> Any:
    """PyTorch's module of attention for variable lengths; None if it has none, or a first
    one without windows."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return varlen if _has(varlen.varlen_attn, "scale", "window_size") else None


@cache
def _has(kernel: Any, *parameters: str) -> bool:
    return set(parameters) <= signature(kernel).parameters.keys()


def _kind(name: str, device: torch.device) -> type[SegmentedAttention] | None:
    registered = AttentionInterface().get(name)
    if isinstance(registered, SegmentedAttention):
        return type(registered)
    if registered is flash_attention_forward:
        return SegmentedFlash
    if registered is sdpa_attention_forward and device.type == "cuda" and torch_varlen():
        return SegmentedSDPA
    return None


def takes_segments(name: str, device: torch.device) -> bool:
    """Whether attention of this name is transformers' own function for kernels that take lengths,
    or our wrapper of it. False for a function that other code has registered under the name, since
    what it does with lengths is unknown."""
    return _kind(name, device) is not None


def remove(name: str) -> None:
    """Restores the attention function of this name."""
    registered = AttentionInterface().get(name)
    if isinstance(registered, SegmentedAttention):
        AttentionInterface.register(name, registered.inner)
