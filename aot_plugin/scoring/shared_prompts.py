"""Sequences with the same prompt, in one row that holds the prompt once.

A document is ``prompt, completion 1, completion 2, ...``; a row holds one or several documents.
Each completion sees its prompt and itself (see ``masks``) and has the positions it would have on
its own, so its log-probabilities and their gradients are those of separate rows. A pair of
preferences costs prompt + chosen + rejected tokens in place of twice the prompt and the padding of
the shorter one.

The last prompt token predicts the first token of every completion, so it is repeated before each
of them: position t + 1 is then always predicted at position t, as in an ordinary row.

With a mask, attention looks at every pair of tokens of a row, those that the mask hides included.
Long completions of a short prompt are therefore cheaper in separate rows, and many completions in
several. Of the arrangements that need no more memory than separate rows, a batch takes the one with
the least work.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cost import Cost
from .masks import PADDING, PROMPT, Form, Places
from .model_input import Batch, ModelInput
from .partition import balanced, doubled

Prompt = tuple[int, list[int]]
"""Length of a prompt, and the numbers of the sequences that begin with it: a document."""

Row = list[Prompt]
"""The documents of a row."""


@dataclass(frozen=True)
class Rows:
    """Rows of the model's input, whether they are one sequence each, padded, and what they cost
    (see ``Cost``)."""

    rows: list[Row]
    padded: bool
    work: float
    memory: float


def cheapest_rows(prompts: Sequence[Prompt], lengths: Sequence[int], cost: Cost) -> Rows:
    """Of the rows that take no more memory than separate ones, those with the least work.

    Args:
        prompts: those of the sequences of one batch.
        lengths: of all sequences, prompt included.
    """
    apart = [piece for prompt in prompts for piece in divided(prompt, 1)]
    widths = [tokens_of(document, lengths) for document in apart]
    # Rows of one length need no mask, so PyTorch's causal kernel takes them.
    sizes = len(apart), max(widths), min(widths) < max(widths)
    best = Rows([[document] for document in apart], True, cost.work(*sizes), cost.memory(*sizes))
    most = best.memory
    for together in (1, *doubled(max(len(members) for _, members in prompts))):
        documents = [piece for prompt in prompts for piece in divided(prompt, together)]
        tokens = [tokens_of(document, lengths) for document in documents]
        for count in {1, len(documents), *doubled(len(documents))[:-1]}:
            groups = balanced(tokens, count)
            width = max(sum(tokens[index] for index in group) for group in groups)
            work, memory = cost.work(count, width, True), cost.memory(count, width, True)
            if work < best.work and memory <= most:
                rows = [[documents[index] for index in group] for group in groups]
                best = Rows(rows, False, work, memory)
    return best


def divided(prompt: Prompt, together: int) -> list[Prompt]:
    """A prompt's sequences in documents of at most ``together``."""
    length, members = prompt
    return [
        (length, members[start : start + together]) for start in range(0, len(members), together)
    ]


def tokens_of(document: Prompt, lengths: Sequence[int]) -> int:
    once = _encoded_once(document)
    return once + sum(lengths[member] - once for member in document[1])


def width_of(rows: Sequence[Row], lengths: Sequence[int], multiple: int = 1) -> int:
    """Width of rows of documents, rounded up to a multiple."""
    width = max(sum(tokens_of(document, lengths) for document in row) for row in rows)
    return width + -width % multiple


def _encoded_once(document: Prompt) -> int:
    """Tokens that the sequences of a document share: the prompt without its last one, which is
    repeated."""
    length, members = document
    return length - 1 if len(members) > 1 else 0


def blocks_of(prompt: Prompt, lengths: Sequence[int], cost: Cost, most: int) -> list[Prompt]:
    """The sequences of one prompt in documents of at most ``most`` tokens, with the least work
    where each has a row of its own."""

    def work(documents: list[Prompt]) -> float:
        sizes = [(tokens_of(document, lengths), len(document[1]) > 1) for document in documents]
        return sum(cost.work(1, tokens, masked) for tokens, masked in sizes)

    def fits(documents: list[Prompt]) -> bool:
        return max(tokens_of(document, lengths) for document in documents) <= most

    choices = [divided(prompt, together) for together in doubled(len(prompt[1]))]
    return min([divided(prompt, 1), *filter(fits, choices)], key=work)


def rows_of_documents(
    ids: Sequence[Tensor],
    completion: Sequence[Tensor],
    rows: Sequence[Row],
    form: Form,
    device: torch.device,
    multiple: int = 1,
) -> ModelInput:
    """Sequences in these rows, which hold a prompt once.

    Args:
        ids, completion: of each sequence, [length] int64, on the CPU.
        form: how attention is told which keys a query sees.
        multiple: what the width of rows is rounded up to.
    """
    columns = list(zip(*(_row(ids, completion, row) for row in rows), strict=True))
    width = width_of(rows, list(map(len, ids)), multiple)
    input_ids, position_ids, completion_mask, sequence, document, branch = (
        torch.stack([F.pad(row, (0, width - len(row)), value=padding) for row in column]).to(device)
        for column, padding in zip(columns, (0, 0, 0, 0, PADDING, PROMPT), strict=True)
    )
    return ModelInput(
        input_ids=input_ids,
        attention=form(Places(document, branch)),
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


def prompts_within(prompts: Iterable[Prompt], sequences: Iterable[int]) -> list[Prompt]:
    """The prompts of these sequences, with these sequences only."""
    chosen = set(sequences)
    found = [(length, [m for m in members if m in chosen]) for length, members in prompts]
    return [prompt for prompt in found if prompt[1]]


def _row(ids: Sequence[Tensor], completion: Sequence[Tensor], row: Row) -> tuple[Tensor, ...]:
    """(ids, positions, completion mask, sequence, document, branch) of a row's tokens."""
    parts: list[tuple[Tensor, Tensor, int, tuple[int, int, int]]] = []
    for number, document in enumerate(row):
        members, shared = document[1], _encoded_once(document)
        prompt = ids[members[0]][:shared]
        parts.append((prompt, torch.zeros_like(prompt), 0, (0, number, PROMPT)))
        for branch, member in enumerate(members, 1):
            # The token before a part in the row is not the one that predicts its first token.
            mask = completion[member][shared:].clone()
            mask[:1] = 0
            parts.append((ids[member][shared:], mask, shared, (member, number, branch)))
    return (
        torch.cat([tokens for tokens, *_ in parts]),
        torch.cat([torch.arange(start, start + len(tokens)) for tokens, _, start, _ in parts]),
        torch.cat([mask for _, mask, *_ in parts]),
        *(
            torch.cat([torch.full_like(tokens, place[column]) for tokens, *_, place in parts])
            for column in range(3)
        ),
    )
