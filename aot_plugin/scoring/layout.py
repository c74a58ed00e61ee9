"""How the sequences of a step become micro-batches, and a micro-batch rows of the model's input.

- *padded*: one sequence a row. Every model takes it.
- *shared*: rows under a mask, each of one or several prompts, a prompt once for its completions,
  where that is less work than padded rows.
- *packed*: one row without padding, each prompt once for its completions. Needs a kernel that
  leaves out the pairs of tokens that do not see each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .batching import Sequences
from .cost import Cost
from .masks import Form
from .model_input import Batch, ModelInput, padded_rows
from .partition import balanced, doubled, split_by_tokens
from .shared_prompts import (
    Rows,
    blocks_of,
    cheapest_rows,
    distinct_prompts,
    divided,
    prompts_within,
    rows_of_documents,
    tokens_of,
    unpadded,
    width_of,
)


class Layout(Protocol):
    """See above.

    Attributes:
        name: "padded", "shared" or "packed".
    """

    @property
    def name(self) -> str: ...

    def arrange(self, batch: Batch) -> ModelInput:
        """The model's input for a micro-batch; ``sequence`` is None where its rows are padded."""
        ...

    def shape(self, batch: Batch) -> tuple[int, int]:
        """Rows and width of that input, known without making it."""
        ...

    def one_row(self, batch: Batch) -> ModelInput:
        """The same, in one row in any case: what is probed before the layout is used."""
        ...

    def groups(self, sequences: Sequences, parts: int) -> list[list[int]]:
        """The numbers of the sequences of ``parts`` micro-batches, none empty, those that take
        most memory first, so that a run that is going to exhaust it does so at once."""
        ...


class Padded:
    """One sequence a row. Grouping by length removes most of the padding, and equal shares of the
    tokens lower the peak of memory."""

    name = "padded"

    def arrange(self, batch: Batch) -> ModelInput:
        return padded_rows(batch)

    def shape(self, batch: Batch) -> tuple[int, int]:
        rows, width = batch["input_ids"].shape
        return rows, width

    def one_row(self, batch: Batch) -> ModelInput:
        raise NotImplementedError("padded rows hold one sequence each")

    def groups(self, sequences: Sequences, parts: int) -> list[list[int]]:
        return split_by_tokens(sequences.by_length(), parts)


PADDED = Padded()


@dataclass(frozen=True)
class Shared:
    """Rows under a mask, of one or several prompts, or padded rows, whichever costs less.

    Attributes:
        form: of the mask.
        cost: of the model.
        multiple: what the width of rows is rounded up to.
    """

    form: Form
    cost: Cost
    multiple: int = 1
    name = "shared"

    def arrange(self, batch: Batch) -> ModelInput:
        ids, completion = unpadded(batch)
        found = self._cheapest(ids, completion)
        if found.padded:
            return padded_rows(batch)
        device = batch["input_ids"].device
        return rows_of_documents(ids, completion, found.rows, self.form, device, self.multiple)

    def shape(self, batch: Batch) -> tuple[int, int]:
        ids, completion = unpadded(batch)
        found = self._cheapest(ids, completion)
        if found.padded:
            return PADDED.shape(batch)
        return len(found.rows), width_of(found.rows, list(map(len, ids)), self.multiple)

    def _cheapest(self, ids: Sequence[Tensor], completion: Sequence[Tensor]) -> Rows:
        return cheapest_rows(distinct_prompts(ids, completion), list(map(len, ids)), self.cost)

    def one_row(self, batch: Batch) -> ModelInput:
        return _one_row(batch, self.form)

    def groups(self, sequences: Sequences, parts: int) -> list[list[int]]:
        """Rows of one prompt stay together if that is less work, and if no micro-batch outgrows
        one of equally many rows of the longest."""
        by_length = split_by_tokens(sequences.by_length(), parts)
        lengths, prompts = sequences.lengths(), sequences.prompts()
        rows, longest = -(-len(sequences) // parts), max(lengths)
        blocks = [
            (tokens_of(block, lengths), block[1])
            for prompt in prompts
            for block in blocks_of(prompt, lengths, self.cost, rows * longest)
        ]
        if len(blocks) < parts:
            return by_length
        by_prompt = split_by_tokens(sorted(blocks, key=lambda block: -block[0]), parts)
        apart, together = (
            [cheapest_rows(prompts_within(prompts, group), lengths, self.cost) for group in groups]
            for groups in (by_length, by_prompt)
        )
        most = max(
            self.cost.memory(rows, longest, masked=min(lengths) < longest),
            max(found.memory for found in apart),
        )
        fits = max(found.memory for found in together) <= most
        less = sum(found.work for found in together) < sum(found.work for found in apart)
        return by_prompt if fits and less else by_length


@dataclass(frozen=True)
class Packed:
    """One row without padding. It costs its tokens, so sharing a prompt always pays.

    Attributes:
        form: how attention is told which keys a query sees.
    """

    form: Form
    name = "packed"

    def arrange(self, batch: Batch) -> ModelInput:
        return _one_row(batch, self.form)

    def shape(self, batch: Batch) -> tuple[int, int]:
        ids, completion = unpadded(batch)
        return 1, width_of([distinct_prompts(ids, completion)], list(map(len, ids)))

    def one_row(self, batch: Batch) -> ModelInput:
        return self.arrange(batch)

    def groups(self, sequences: Sequences, parts: int) -> list[list[int]]:
        """The grouping with the fewest tokens, among those whose largest micro-batch is not larger
        than as many padded rows of the longest sequence."""
        lengths, prompts = sequences.lengths(), sequences.prompts()
        room = -(-len(sequences) // parts) * max(lengths)
        found: list[tuple[int, int, list[list[int]]]] = []
        for together in (1, *doubled(max(len(members) for _, members in prompts))):
            documents = [piece for prompt in prompts for piece in divided(prompt, together)]
            if len(documents) < parts:
                break
            tokens = [tokens_of(document, lengths) for document in documents]
            groups = [
                [sequence for index in group for sequence in documents[index][1]]
                for group in balanced(tokens, parts)
            ]
            sizes = [
                sum(tokens_of(prompt, lengths) for prompt in prompts_within(prompts, group))
                for group in groups
            ]
            # With one sequence per document this always holds, since groups are balanced.
            if max(sizes) <= room:
                found.append((sum(sizes), max(sizes), _largest_first(groups, sizes)))
        return min(found, key=lambda grouping: grouping[:2])[2]


def _largest_first(groups: Sequence[list[int]], sizes: Sequence[int]) -> list[list[int]]:
    order = sorted(range(len(groups)), key=lambda number: -sizes[number])
    return [groups[number] for number in order]


def _one_row(batch: Batch, form: Form) -> ModelInput:
    ids, completion = unpadded(batch)
    prompts = distinct_prompts(ids, completion)
    return rows_of_documents(ids, completion, [prompts], form, batch["input_ids"].device)
