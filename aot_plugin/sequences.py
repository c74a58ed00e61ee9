"""The sequences of an optimizer step, freed from the micro-batches in which they came.

After the transport move every sequence has a fixed weight of its own, so any regrouping into
micro-batches gives the same gradient. Grouping by length removes most of the padding, and keeping
the sequences of a prompt together lets the prompt be encoded once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .prompts import distinct_prompts, unpadded

WEIGHT_KEY = "aot_weight"
"""Key of a collated batch that holds dL/dlogp of its sequences."""

LOGPS_KEY = "aot_logps"
"""Key of a collated batch that was scored with gradient: the log-probabilities, with graph."""


@dataclass(frozen=True)
class Sequences:
    """Unpadded rows: ``input_ids`` and ``completion_mask`` are lists of [length] int64 tensors, in
    the CPU's memory, where taking them apart waits for no kernel."""

    input_ids: list[Tensor]
    completion_mask: list[Tensor]

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def from_batches(cls, batches: Sequence[dict[str, Any]]) -> "Sequences":
        """The rows of the host's collated batches, in order, with their padding removed."""
        parts = [unpadded(batch) for batch in batches]
        return cls(
            [row for ids, _ in parts for row in ids],
            [row for _, completion in parts for row in completion],
        )

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.input_ids]

    def by_length(self) -> list[int]:
        """Row numbers from the longest row to the shortest: memory peaks at the first batch, so
        a run that is going to exhaust it does so at once."""
        lengths = self.lengths()
        return sorted(range(len(self)), key=lambda row: -lengths[row])

    def by_prompt(self) -> list[int]:
        """Row numbers with those of equal prompt side by side, from the prompt with the most tokens
        (its own, once, and those of its completions) to that with the fewest."""
        lengths = self.lengths()

        def tokens(prompt: tuple[int, list[int]]) -> int:
            prompt_length, rows = prompt
            return prompt_length + sum(lengths[row] - prompt_length for row in rows)

        prompts = sorted(
            distinct_prompts(self.input_ids, self.completion_mask), key=tokens, reverse=True
        )
        return [row for _, rows in prompts for row in rows]

    def collate(self, rows: Sequence[int], pad_token_id: int, multiple: int = 1) -> dict[str, Any]:
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


def split_evenly(rows: Sequence[int], parts: int) -> Iterator[Sequence[int]]:
    """Consecutive runs of rows, ``parts`` of them, whose sizes differ by at most one."""
    base, extra = divmod(len(rows), parts)
    start = 0
    for part in range(parts):
        end = start + base + (part < extra)
        yield rows[start:end]
        start = end
