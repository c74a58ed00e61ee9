"""Attention kernels on shared prompts: forward and backward pass against dense float32 attention.

A row holds documents, each a prompt and its completions. A query of the prompt sees the prompt up
to itself, a query of a completion the prompt and its own completion up to itself. Kernels that take
variable lengths get one segment per branch, with its queries, and the keys of the prompt repeated
before its own; FlexAttention gets a mask of blocks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HEADS, KEY_HEADS, HEAD_SIZE = 8, 2, 64


class Segment(NamedTuple):
    """A branch of a document: where its queries stand in the row, and its keys, prompt first."""

    queries: Tensor
    keys: Tensor


def segments_of(documents: list[list[int]], device: torch.device) -> list[Segment]:
    """Of documents that are given as the lengths of the prompt and of each completion."""
    found, start = [], 0
    for lengths in documents:
        branches = []
        for length in lengths:
            branches.append(torch.arange(start, start + length, device=device))
            start += length
        prompt, *completions = branches
        found.append(Segment(prompt, prompt))
        found += [Segment(own, torch.cat([prompt, own])) for own in completions]
    return found


Kernel = Callable[[Tensor, Tensor, Tensor, list[Segment]], Tensor]
"""(queries [tokens, heads, size], keys and values [tokens, key heads, size]) -> like queries."""


def dense(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment]) -> Tensor:
    """Each segment with all its scores: the reference in float32, the size of rounding in bf16."""
    out = torch.zeros_like(q)
    for queries, keys in segments:
        offset = len(keys) - len(queries)
        sees = torch.ones(len(queries), len(keys), dtype=torch.bool, device=q.device).tril(offset)
        own, all_k, all_v = (x.transpose(0, 1) for x in (q[queries], k[keys], v[keys]))
        group = HEADS // KEY_HEADS
        all_k, all_v = (x.repeat_interleave(group, dim=0) for x in (all_k, all_v))
        scores = own @ all_k.transpose(1, 2) * HEAD_SIZE**-0.5
        weights = scores.float().masked_fill(~sees, float("-inf")).softmax(-1).to(q.dtype)
        out = out.index_copy(0, queries, (weights @ all_v).transpose(0, 1))
    return out


def _lengths(parts: list[Tensor]) -> tuple[Tensor, int]:
    sizes = torch.tensor([0, *map(len, parts)], device=parts[0].device)
    return sizes.cumsum(0).to(torch.int32), int(sizes.max())


def flash_attn() -> Kernel:
    """The package's own. Raises ImportError."""
    from flash_attn import flash_attn_varlen_func

    def kernel(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment]) -> Tensor:
        index = torch.cat([keys for _, keys in segments])
        of_q, most_q = _lengths([queries for queries, _ in segments])
        of_k, most_k = _lengths([keys for _, keys in segments])
        return flash_attn_varlen_func(
            q, k[index], v[index], of_q, of_k, most_q, most_k, causal=True
        )

    return kernel


def torch_varlen() -> Kernel:
    """PyTorch's own. Raises ImportError."""
    from torch.nn.attention.varlen import varlen_attn

    def kernel(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment]) -> Tensor:
        index = torch.cat([keys for _, keys in segments])
        index_k, index_v = (x[index].repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k, v))
        of_q, most_q = _lengths([queries for queries, _ in segments])
        of_k, most_k = _lengths([keys for _, keys in segments])
        return varlen_attn(q, index_k, index_v, of_q, of_k, most_q, most_k, window_size=(-1, 0))

    return kernel


def flex() -> Kernel:
    """FlexAttention, compiled where there is CUDA; on a CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cuda = torch.cuda.is_available()
    attend = torch.compile(flex_attention) if cuda else flex_attention

    def kernel(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment]) -> Tensor:
        tokens = len(q)
        sees = torch.zeros(tokens, tokens, dtype=torch.bool, device=q.device)
        for queries, keys in segments:
            offset = len(keys) - len(queries)
            sees[queries[:, None], keys] = torch.ones_like(sees[: len(queries), : len(keys)]).tril(
                offset
            )
        mask = create_block_mask(
            lambda batch, head, query, key: sees[query, key], None, None, tokens, tokens, q.device
        )
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return kernel


KERNELS: dict[str, Callable[[], Kernel]] = {
    "flash_attn": flash_attn,
    "torch varlen": torch_varlen,
    "flex": flex,
}


def errors(
    kernel: Kernel, documents: list[list[int]], device: torch.device, backward: bool = True
) -> dict[str, tuple[float, float]]:
    """(error of the kernel, error of dense attention) in bf16, relative to dense float32 attention,
    of the output and of the gradients in queries, keys and values."""
    generator = torch.Generator(device).manual_seed(0)
    segments = segments_of(documents, device)
    tokens = sum(map(sum, documents))

    def random(heads: int) -> Tensor:
        size = (tokens, heads, HEAD_SIZE)
        return torch.randn(size, generator=generator, device=device).to(torch.bfloat16)

    inputs = random(HEADS), random(KEY_HEADS), random(KEY_HEADS)
    direction = random(HEADS)

    def run(kernel: Kernel, dtype: torch.dtype, backward: bool) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_(backward) for x in inputs]
        out = kernel(*leaves, segments)
        gradients = torch.autograd.grad(out, leaves, direction.to(dtype)) if backward else ()
        return [out.detach(), *gradients]

    reference = run(dense, torch.float32, backward)
    found, rounded = run(kernel, torch.bfloat16, backward), run(dense, torch.bfloat16, backward)
    return {
        name: (relative(a, exact), relative(b, exact))
        for name, a, b, exact in zip(
            ("output", "dq", "dk", "dv"), found, rounded, reference, strict=False
        )
    }


def relative(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|."""
    return ((found.float() - exact).norm() / exact.norm()).item()
