"""The package flash-attn in plain torch, where transformers imports the real one.

Its kernels need a GPU. With this in their place, all of transformers' own path to them runs on a
CPU, up to the call of ``flash_attn_varlen_func`` with the arguments of the real one.
"""

import sys
from functools import wraps
from importlib.machinery import ModuleSpec
from inspect import signature
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as utils

from aot_plugin.scoring import varlen

NAME = "flash_attention_2"


class FlashAttn:
    """Both kernels, and the arguments of the calls that they got."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def module(self) -> ModuleType:
        parameters = signature(attention)

        @wraps(attention)  # transformers looks at the signature
        def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Tensor:
            call = parameters.bind(*args, **kwargs)
            call.apply_defaults()
            self.calls.append(dict(call.arguments))
            return attention(**self.calls[-1])

        def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
            rows, width = q.shape[:2]
            starts = torch.arange(rows + 1, dtype=torch.int32) * width
            flat = (x.flatten(0, 1) for x in (q, k, v))
            out = flash_attn_varlen_func(*flat, starts, starts, width, width, **kwargs)
            return out.unflatten(0, (rows, width))

        package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
        for module in (package, padding):
            module.__spec__ = ModuleSpec(module.__name__, None)
        vars(package).update(
            flash_attn_func=flash_attn_func,
            flash_attn_varlen_func=flash_attn_varlen_func,
            flash_attn_with_kvcache=None,
            bert_padding=padding,
            __version__="2.8.3",
        )
        vars(padding).update(pad_input=utils._pad_input, unpad_input=utils._unpad_input)
        return package


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,  # of the version for GPT-OSS
) -> Tensor:
    """The documented behaviour of ``flash_attn_varlen_func``, one segment after the other."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert (starts_q[-1], starts_k[-1]) == (len(q), len(k)), "the kernel would read elsewhere"
    assert dropout_p == 0.0
    group = q.shape[1] // k.shape[1]
    found, longest = [], [0, 0]
    for n in range(len(starts_q) - 1):
        queries = q[starts_q[n] : starts_q[n + 1]]
        keys = k[starts_k[n] : starts_k[n + 1]].repeat_interleave(group, dim=1)
        values = v[starts_k[n] : starts_k[n + 1]].repeat_interleave(group, dim=1)
        longest = [max(longest[0], len(queries)), max(longest[1], len(keys))]
        scores = torch.einsum("qhd,khd->hqk", queries, keys)
        scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # Aligned at the end: the last query stands at the last key.
        at = torch.arange(len(queries))[:, None] + len(keys) - len(queries)
        ahead = torch.arange(len(keys)) - at
        hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
        if window_size[0] >= 0:
            hidden |= ahead < -window_size[0]
        if window_size[1] >= 0:
            hidden |= ahead > window_size[1]
        scores = scores.masked_fill(hidden, float("-inf"))
        if s_aux is not None:
            sinks = s_aux[:, None, None].expand(-1, len(queries), 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, values))
    assert [max_seqlen_q, max_seqlen_k] == longest
    return torch.cat(found)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs the stand-in as the package flash-attn, usable on a CPU."""
    kernels = FlashAttn()
    package = kernels.module()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", package.bert_padding)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    checks = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    monkeypatch.setitem(checks, "general_availability_check", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    yield kernels
    varlen.remove(NAME)
