"""Weights and levels of rows on their way from the prepared columns into a batch.

TRL's collators build a batch out of the columns that they know. As with cached reference
log-probabilities, a further one becomes a tensor of the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor
from transformers import Trainer

from ..data import LEVEL, WEIGHT, level_of
from ..scoring.model_input import Batch

LOG = get_logger("axolotl.aot_plugin.weights")


class ColumnsCollator:
    """A collator that adds the rows' weights and levels, each [rows] float64, to the batches of
    another one.

    Args:
        collate: TRL's collator.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Batch]) -> None:
        self._collate = collate
        self.pad_to_multiple_of = getattr(collate, "pad_to_multiple_of", None)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        batch = self._collate(rows)
        if WEIGHT in rows[0]:
            # Null in rows of entries without `field_weight`.
            weights = [1.0 if row[WEIGHT] is None else row[WEIGHT] for row in rows]
            batch[WEIGHT] = torch.tensor(weights, dtype=torch.float64)
        if LEVEL in rows[0]:
            batch[LEVEL] = torch.tensor([level_of(row) for row in rows], dtype=torch.float64)
        return batch


def masses(batch: Batch) -> Tensor:
    """The mass of each sequence of a batch, [sequences] float64: the weight of its row, or 1."""
    ids = batch["input_ids"]
    if WEIGHT not in batch:
        return torch.ones(len(ids), dtype=torch.float64, device=ids.device)
    weights = batch[WEIGHT]
    # If a row has several sequences, the batch consists of as many blocks, each with one sequence
    # of every row.
    return weights.repeat(len(ids) // len(weights))


class RowColumnsMixin(Trainer):
    """Takes the rows' weights and levels into a trainer's batches, if its datasets have any."""

    args: Any
    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any
    _is_graded = False
    _is_weighted = False

    def _read_columns(self) -> None:
        """To be called when the trainer is built."""
        evaluated = self.eval_dataset
        parts = list(evaluated.values()) if isinstance(evaluated, dict) else [evaluated]
        datasets = [part for part in (self.train_dataset, *parts) if part is not None]
        found = {name for dataset in datasets for name in dataset.column_names} & {WEIGHT, LEVEL}
        self._is_weighted, self._is_graded = WEIGHT in found, LEVEL in found
        if found:
            self.data_collator: Any = ColumnsCollator(self.data_collator)
        if self._is_weighted:
            LOG.info("the rows have weights (`field_weight`)")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if WEIGHT not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, WEIGHT, LEVEL]
