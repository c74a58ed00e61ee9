"""Sequences with the same prompt, in one row that holds the prompt once.

The row is ``prompt, completion 1, completion 2, ...``. Each completion sees the prompt and itself
(a mask over the causal one) and has the positions it would have on its own, so its
log-probabilities and their gradients are those of separate rows. A pair of preferences costs
prompt + chosen + rejected tokens in place of twice the prompt and the padding of the shorter one.

The last prompt token predicts the first token of every completion, so it is repeated before each
of them: position t + 1 is then always predicted at position t, as in an ordinary row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

SEQUENCE_KEY = "aot_sequence"
"""Key of a shared batch: [rows, width] int64, which sequence each completion token belongs to."""


PROMPT, PADDING = 0, -1
"""Branch numbers; those of completions count from 1."""


def share_prompts(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with one row for each distinct prompt; unchanged if that would not be smaller.

    Args:
        batch: ``input_ids``, ``attention_mask``, ``completion_mask``, each [sequences, width]
            int64. The prompt of a sequence is what stands before its first completion token.

    Returns:
        ``input_ids``, ``position_ids``, ``completion_mask`` and ``SEQUENCE_KEY``, each
        [rows, width] int64, and ``attention_mask`` [rows, 1, width, width] bool: True where a
        query (third dimension) may look at a key (fourth).
    """
    device = batch["input_ids"].device
    ids, completion = unpadded(batch)
    shared = [_row(ids, completion, *prompt) for prompt in distinct_prompts(ids, completion)]
    if len(shared) * max(len(row[0]) for row in shared) >= batch["input_ids"].numel():
        return batch
    columns = zip(*shared, strict=True)
    input_ids, position_ids, completion_mask, sequence, branch = (
        pad_sequence(list(column), batch_first=True, padding_value=padding).to(device)
        for column, padding in zip(columns, (0, 0, 0, 0, PADDING), strict=True)
    )
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "completion_mask": completion_mask,
        SEQUENCE_KEY: sequence,
        "attention_mask": _mask(branch)[:, None],
    }


def unpadded(batch: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """``input_ids`` and ``completion_mask`` of each sequence, [length] int64, in the CPU's memory:
    taking a batch apart waits for no kernel there."""
    keep = batch["attention_mask"].bool().cpu()
    ids, completion = (
        [row[k] for row, k in zip(batch[name].cpu(), keep, strict=True)]
        for name in ("input_ids", "completion_mask")
    )
    return ids, completion


def distinct_prompts(
    input_ids: Sequence[Tensor], completion_mask: Sequence[Tensor]
) -> list[tuple[int, list[int]]]:
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


def _row(
    ids: list[Tensor], completion: list[Tensor], prompt_length: int, members: list[int]
) -> tuple[Tensor, ...]:
    """(ids, positions, completion mask, sequence, branch) of the sequences of one prompt."""
    shared = prompt_length - 1 if len(members) > 1 else 0
    prompt = ids[members[0]][:shared]
    parts = [(prompt, torch.zeros_like(prompt), 0, 0, PROMPT)]
    parts += [
        (ids[member][shared:], completion[member][shared:], shared, member, branch)
        for branch, member in enumerate(members, 1)
    ]
    return (
        torch.cat([row for row, *_ in parts]),
        torch.cat([torch.arange(start, start + len(row)) for row, _, start, _, _ in parts]),
        torch.cat([mask for _, mask, *_ in parts]),
        torch.cat([torch.full_like(row, member) for row, _, _, member, _ in parts]),
        torch.cat([torch.full_like(row, branch) for row, *_, branch in parts]),
    )


def _mask(branch: Tensor) -> Tensor:
    """[rows, width] -> [rows, width, width]. Padding sees padding: an empty softmax is NaN."""
    query, key = branch[:, :, None], branch[:, None, :]
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device)
    return causal.tril() & ((query == key) | ((key == PROMPT) & (query != PADDING)))


def may_share_prompts(model: PreTrainedModel, longest: int | None) -> bool:
    """Whether the architecture is known to take an attention mask and positions as they come.

    That is so for PyTorch's attention (``sdpa``) where every layer looks at the whole sequence; a
    sliding window counts only if it is narrower than the ``longest`` sequence. Flash attention
    takes no such mask.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        (window is None or (longest is not None and longest <= window))
        and model.config._attn_implementation == "sdpa"
        and getattr(config, "attention_chunk_size", None) is None
        and kinds <= {"full_attention", "sliding_attention"}
    )


def probe(vocabulary: int) -> dict[str, Tensor]:
    """A batch of two sequences with one prompt, to see whether a model gives them the same
    log-probabilities when it is shared."""
    prompt, completions = 16, (24, 8)
    tokens = torch.arange(3, 3 + prompt + sum(completions)) * 7919 % vocabulary
    heads, (first, second) = tokens[:prompt], tokens[prompt:].split(completions)
    rows = [torch.cat([heads, first]), torch.cat([heads, second])]
    input_ids = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    position = torch.arange(input_ids.shape[1])[None]
    return {
        "input_ids": input_ids,
        "attention_mask": (position < lengths).long(),
        "completion_mask": ((position >= prompt) & (position < lengths)).long(),
    }
