"""Sequences with the same prompt, in one row that holds the prompt once.

The row is ``prompt, completion 1, completion 2, ...``. Each completion sees the prompt and itself
(a mask over the causal one) and has the positions it would have on its own, so its
log-probabilities and their gradients are those of separate rows. A pair of preferences costs
prompt + chosen + rejected tokens in place of twice the prompt and the padding of the shorter one.

The last prompt token predicts the first token of every completion, so it is repeated before each
of them: position t + 1 is then always predicted at position t, as in an ordinary row.

Attention looks at every pair of tokens of a row, those that the mask hides included. So long
completions of a short prompt are better off apart, and many completions in several rows: a batch
takes the layout that costs least work, of those that need no more memory than separate rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .cost import Cost
from .model_input import Batch, ModelInput, padded_rows

PROMPT, PADDING = 0, -1
"""Branch numbers; those of completions count from 1."""


Prompt = tuple[int, list[int]]
"""Length of a prompt, and the numbers of the sequences that begin with it."""


@dataclass(frozen=True)
class Layout:
    """Rows of the model's input, and what they cost (see ``Cost``)."""

    rows: list[Prompt]
    shared: bool
    work: float
    memory: float


def cheapest_layout(prompts: Sequence[Prompt], lengths: Sequence[int], cost: Cost) -> Layout:
    """Of the layouts that take no more memory than separate rows, that with the least work.

    Args:
        prompts: those of the sequences of one batch.
        lengths: of all sequences, prompt included.
    """
    apart = [(length, [member]) for length, members in prompts for member in members]
    widths = [lengths[member] for _, (member,) in apart]
    # Rows of one length need no mask, so PyTorch's causal kernel takes them.
    padded = min(widths) < max(widths)
    best = _priced(apart, max(widths), padded, False, cost)
    most = best.memory
    for together in _doubled(max(len(members) for _, members in prompts)):
        rows = [row for prompt in prompts for row in divided(prompt, together)]
        width = max(tokens_of(row, lengths) for row in rows)
        layout = _priced(rows, width, True, True, cost)
        if layout.work < best.work and layout.memory <= most:
            best = layout
    return best


def _priced(rows: list[Prompt], width: int, masked: bool, shared: bool, cost: Cost) -> Layout:
    sizes = (len(rows), width, masked)
    return Layout(rows, shared, cost.work(*sizes), cost.memory(*sizes))


def _doubled(most: int) -> list[int]:
    """2, 4, 8, ... up to the first number that is not below ``most``; none if that is 1."""
    return [2**power for power in range(1, (most - 1).bit_length() + 1)]


def divided(prompt: Prompt, together: int) -> list[Prompt]:
    """A prompt's sequences in rows of at most ``together``."""
    length, members = prompt
    return [
        (length, members[start : start + together]) for start in range(0, len(members), together)
    ]


def tokens_of(row: Prompt, lengths: Sequence[int]) -> int:
    once = _encoded_once(row)
    return once + sum(lengths[member] - once for member in row[1])


def _encoded_once(row: Prompt) -> int:
    """Tokens that the sequences of a row share: all of the prompt but the last one, see above."""
    length, members = row
    return length - 1 if len(members) > 1 else 0


def blocks_of(prompt: Prompt, lengths: Sequence[int], cost: Cost, most: int) -> list[Prompt]:
    """The sequences of one prompt in rows of at most ``most`` tokens, with the least work."""

    def work(rows: list[Prompt]) -> float:
        sizes = [(tokens_of(row, lengths), len(row[1]) > 1) for row in rows]
        return sum(cost.work(1, tokens, masked) for tokens, masked in sizes)

    def fits(rows: list[Prompt]) -> bool:
        return max(tokens_of(row, lengths) for row in rows) <= most

    choices = [divided(prompt, together) for together in _doubled(len(prompt[1]))]
    return min([divided(prompt, 1), *filter(fits, choices)], key=work)


def share_prompts(batch: Batch, cost: Cost, multiple: int = 1) -> ModelInput:
    """The batch with prompts encoded once for several of their sequences; one sequence a row if
    that would cost more (``cheapest_layout``).

    Args:
        multiple: what the width of shared rows is rounded up to.
    """
    ids, completion = unpadded(batch)
    layout = cheapest_layout(distinct_prompts(ids, completion), list(map(len, ids)), cost)
    if not layout.shared:
        return padded_rows(batch)
    return shared_rows(ids, completion, layout.rows, batch["input_ids"].device, multiple)


def shared_rows(
    ids: list[Tensor],
    completion: list[Tensor],
    rows: Sequence[Prompt],
    device: torch.device,
    multiple: int = 1,
) -> ModelInput:
    """Sequences in these rows, which hold a prompt once."""
    columns = list(zip(*(_row(ids, completion, row) for row in rows), strict=True))
    width = max(map(len, columns[0]))
    width += -width % multiple
    input_ids, position_ids, completion_mask, sequence, branch = (
        torch.stack([F.pad(row, (0, width - len(row)), value=padding) for row in column]).to(device)
        for column, padding in zip(columns, (0, 0, 0, 0, PADDING), strict=True)
    )
    return ModelInput(
        input_ids=input_ids,
        attention_mask=_mask(branch)[:, None],
        completion_mask=completion_mask,
        sequences=len(ids),
        position_ids=position_ids,
        sequence=sequence,
    )


def unpadded(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """``input_ids`` and ``completion_mask`` of each sequence, [length] int64, on the CPU,
    so that slicing does not synchronize with the GPU."""
    keep = batch["attention_mask"].bool().cpu()
    ids, completion = (
        [row[k] for row, k in zip(batch[name].cpu(), keep, strict=True)]
        for name in ("input_ids", "completion_mask")
    )
    return ids, completion


def distinct_prompts(
    input_ids: Sequence[Tensor], completion_mask: Sequence[Tensor]
) -> list[Prompt]:
    """(length of the prompt, numbers of its sequences) of each distinct prompt, in the order of
    first appearance. Both arguments: one [length] int64 CPU tensor per sequence."""
    found: dict[bytes | int, tuple[int, list[int]]] = {}
    for sequence, (ids, mask) in enumerate(zip(input_ids, completion_mask, strict=True)):
        marked = mask.nonzero()
        length = int(marked[0]) if len(marked) else len(ids)
        # A sequence without prompt has no token that could be repeated: it stays alone.
        key = ids[:length].numpy().tobytes() if length else sequence
        found.setdefault(key, (length, []))[1].append(sequence)
    return list(found.values())


def _row(ids: list[Tensor], completion: list[Tensor], row: Prompt) -> tuple[Tensor, ...]:
    """(ids, positions, completion mask, sequence, branch) of a row's tokens."""
    members, shared = row[1], _encoded_once(row)
    prompt = ids[members[0]][:shared]
    parts = [(prompt, torch.zeros_like(prompt), 0, 0, PROMPT)]
    parts += [
        (ids[member][shared:], completion[member][shared:], shared, member, branch)
        for branch, member in enumerate(members, 1)
    ]
    return (
        torch.cat([tokens for tokens, *_ in parts]),
        torch.cat([torch.arange(start, start + len(tokens)) for tokens, _, start, _, _ in parts]),
        torch.cat([mask for _, mask, *_ in parts]),
        torch.cat([torch.full_like(tokens, member) for tokens, _, _, member, _ in parts]),
        torch.cat([torch.full_like(tokens, branch) for tokens, *_, branch in parts]),
    )


def _mask(branch: Tensor) -> Tensor:
    """[rows, width] -> [rows, width, width]. Padding sees padding: an empty softmax is NaN."""
    query, key = branch[:, :, None], branch[:, None, :]
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device)
    return causal.tril() & ((query == key) | ((key == PROMPT) & (query != PADDING)))


def why_not_shared(model: PreTrainedModel, longest: int | None) -> str | None:
    """What, by the model's config, forbids to share prompts; None if nothing is known to.

    PyTorch's attention (``sdpa``) takes a mask as it comes where every layer looks at the whole
    sequence; a sliding window counts only if it is narrower than the ``longest`` sequence. Flash
    attention takes no such mask.
    """
    config = model.config.get_text_config()
    backend = model.config._attn_implementation
    if backend != "sdpa":
        return f"`attn_implementation: {backend}` takes no mask of one's own"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "the model attends within chunks"
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others:
        return f"the model has layers of another kind ({', '.join(map(str, others))})"
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    if window is not None and (longest is None or longest > window):
        return f"the sliding window of {window} tokens is narrower than `sequence_len`"
    return None
