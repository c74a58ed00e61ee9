"""The sequences of an optimizer step, freed from the micro-batches in which they came.

After the transport stage every sequence has a fixed weight, so any regrouping into
micro-batches gives the same gradient. Grouping by length removes most of the padding, equal shares
of the tokens lower the peak of memory, and keeping the sequences of a prompt together lets the
prompt be encoded once, where that is less work.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .cost import Cost
from .model_input import Batch
from .shared_prompts import (
    Layout,
    blocks_of,
    cheapest_layout,
    distinct_prompts,
    tokens_of,
    unpadded,
)


@dataclass(frozen=True)
class Sequences:
    """Unpadded rows: ``input_ids`` and ``completion_mask`` are lists of [length] int64 tensors, in
    CPU memory, so that slicing does not synchronize with the GPU."""

    input_ids: list[Tensor]
    completion_mask: list[Tensor]

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def from_batches(cls, batches: Sequence[Batch]) -> "Sequences":
        """The rows of the host's collated batches, in order, with their padding removed."""
        parts = [unpadded(batch) for batch in batches]
        return cls(
            [row for ids, _ in parts for row in ids],
            [row for _, completion in parts for row in completion],
        )

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.input_ids]

    def groups(self, parts: int, cost: Cost | None = None) -> list[list[int]]:
        """The row numbers of ``parts`` micro-batches, none empty, whose largest is as small as
        it can be.

        Where prompts may be shared (a ``cost`` is given), rows of one prompt stay together if
        that is less work, and if no micro-batch outgrows one of equally many rows of the longest.
        """
        by_length = split_by_tokens(self.by_length(), parts)
        if cost is None:
            return by_length
        lengths = self.lengths()
        prompts = distinct_prompts(self.input_ids, self.completion_mask)
        rows, longest = -(-len(self) // parts), max(lengths)
        blocks = [
            (tokens_of(block, lengths), block[1])
            for prompt in prompts
            for block in blocks_of(prompt, lengths, cost, rows * longest)
        ]
        if len(blocks) < parts:
            return by_length
        by_prompt = split_by_tokens(sorted(blocks, key=lambda block: -block[0]), parts)

        prompt_of = {row: number for number, (_, members) in enumerate(prompts) for row in members}

        def layouts(groups: list[list[int]]) -> list[Layout]:
            found = []
            for group in groups:
                members: dict[int, list[int]] = {}
                for row in group:
                    members.setdefault(prompt_of[row], []).append(row)
                of_group = [(prompts[number][0], same) for number, same in members.items()]
                found.append(cheapest_layout(of_group, lengths, cost))
            return found

        apart, together = layouts(by_length), layouts(by_prompt)
        most = max(
            cost.memory(rows, longest, masked=min(lengths) < longest),
            max(layout.memory for layout in apart),
        )
        fits = max(layout.memory for layout in together) <= most
        less = sum(layout.work for layout in together) < sum(layout.work for layout in apart)
        return by_prompt if fits and less else by_length

    def by_length(self) -> list["Block"]:
        """Each row alone, from the longest to the shortest: memory peaks at the first batch, so
        a run that is going to exhaust it does so at once."""
        blocks = [(tokens, [row]) for row, tokens in enumerate(self.lengths())]
        return sorted(blocks, key=lambda block: -block[0])

    def collate(self, rows: Sequence[int], pad_token_id: int, multiple: int = 1) -> Batch:
        """A right-padded batch of these rows, its width rounded up to a multiple."""
        ids = [self.input_ids[row] for row in rows]
        completion = [self.completion_mask[row] for row in rows]
        width = max(len(row) for row in ids)
        width += -width % multiple
        template = ids[0].new_zeros(width)  # pads every row to the rounded width, dropped below

        def padded(values: list[Tensor], value: int) -> Tensor:
            return pad_sequence([*values, template], batch_first=True, padding_value=value)[:-1]

        return {
            "input_ids": padded(ids, pad_token_id),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
            "completion_mask": padded(completion, 0),
        }


Block = tuple[int, list[int]]
"""Tokens of a row of the model's input, and the numbers of the sequences that it holds."""


def split_by_tokens(blocks: Sequence[Block], parts: int) -> list[list[int]]:
    """Cut blocks, ordered from long to short, into ``parts`` runs that hold at least one each.

    A run costs what it takes padded: its number of blocks times the tokens of its longest. The
    cost of the most expensive run, which sets the peak of memory, is minimal: few long rows share
    a batch, many short ones another. The most expensive runs first, so that what one batch
    frees has room for the next.
    """

    def runs(limit: int) -> list[list[Block]]:
        """From the left, each as long as the limit lets it be and the others need no block."""
        found: list[list[Block]] = []
        start = 0
        for waiting in reversed(range(parts)):
            fits = limit // max(blocks[start][0], 1) if waiting else len(blocks)
            end = min(start + max(fits, 1), len(blocks) - waiting)
            found.append(list(blocks[start:end]))
            start = end
        return found

    def cost(run: list[Block]) -> int:
        return len(run) * run[0][0]

    most = len(blocks) * blocks[0][0]
    limit = bisect_left(range(most), True, key=lambda limit: max(map(cost, runs(limit))) <= limit)
    return [[row for _, rows in run for row in rows] for run in sorted(runs(limit), key=cost)[::-1]]
