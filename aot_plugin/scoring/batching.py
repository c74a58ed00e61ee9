"""The sequences of an optimizer step, independent of the micro-batches in which they came.

After the transport stage every sequence has a fixed weight, so any regrouping into micro-batches
gives the same gradient. Which one is best depends on the layout (see ``layout``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .model_input import Batch
from .partition import Block
from .shared_prompts import Prompt, distinct_prompts, unpadded


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

    def prompts(self) -> list[Prompt]:
        return distinct_prompts(self.input_ids, self.completion_mask)

    def by_length(self) -> list[Block]:
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
