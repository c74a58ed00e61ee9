"""What tells attention which keys a query sees, where several sequences stand in one row.

A token has a place: its document (one prompt and its completions) and its branch in it (the prompt,
or one of the completions). A query sees the keys before it that belong to the prompt of its
document or to its own branch. Attention backends take this in different forms; a ``Form`` gives the
keyword arguments of the model's forward pass.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROMPT = 0
"""Branch of a prompt; completions count from 1."""

VARIANTS = 64
"""How often PyTorch may compile ``flex_attention``."""

PADDING = -1
"""Document of padding, which sees padding: the softmax over no key at all is NaN."""


class Places(NamedTuple):
    """Where tokens belong, each [rows, width] int64; documents count from 0 in each row."""

    document: Tensor
    branch: Tensor


Form = Callable[[Places], dict[str, Any]]
"""Keyword arguments of the model's forward pass for tokens at these places."""


def boolean_mask(places: Places) -> dict[str, Any]:
    """For ``sdpa``: [rows, 1, width, width] bool, True where a query (third dimension) sees a key
    (fourth)."""
    (document, branch), width = places, places.document.shape[1]
    sees = torch.ones(width, width, dtype=torch.bool, device=document.device).tril()
    sees = sees & (document[:, :, None] == document[:, None, :])
    sees &= (branch[:, :, None] == branch[:, None, :]) | (branch == PROMPT)[:, None, :]
    return {"attention_mask": sees[:, None]}


def additive_mask(dtype: torch.dtype) -> Form:
    """For ``eager``, which adds the mask to the scores: 0 where a query sees a key, and the lowest
    number of ``dtype`` elsewhere."""

    def form(places: Places) -> dict[str, Any]:
        sees = boolean_mask(places)["attention_mask"]
        lowest = torch.full_like(sees, torch.finfo(dtype).min, dtype=dtype)
        return {"attention_mask": lowest.masked_fill_(sees, 0.0)}

    return form


def block_mask(places: Places) -> dict[str, Any]:
    """For ``flex_attention``, which skips the blocks that no query sees.

    It is made with autocast and gradients off, since each of their states would be compiled apart.
    """
    document, branch = places

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document[row, query] == document[row, key]
        own = (branch[row, query] == branch[row, key]) | (branch[row, key] == PROMPT)
        return (query >= key) & same & own

    (rows, width), device = document.shape, document.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        mask = _create_block_mask(device.type)(sees, rows, None, width, width, device=device)
    return {"attention_mask": mask}


@cache
def _create_block_mask(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    # Compiled, it does not hold a mask of width x width.
    return torch.compile(create_block_mask) if device == "cuda" else create_block_mask


def permit_variants() -> None:
    """Lets PyTorch compile ``flex_attention`` as often as a run needs.

    It is compiled for each state of gradients and autocast, each kind of mask, and first for one
    width and then for any. After 8 times PyTorch computes all scores of a row without its kernel,
    which takes the square of the width in memory, and says so in a warning only (seen on an H200).
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    # From PyTorch 2.12 on a setting is that of its thread, and backward passes on a GPU have a
    # thread of their own, which reads the default.
    entry: Any = getattr(config, "_config", {}).get("recompile_limit")
    if isinstance(getattr(entry, "default", None), int):
        entry.default = max(entry.default, VARIANTS)
