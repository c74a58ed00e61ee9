"""Sequences as rows of a model's input."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Batch = dict[str, Any]
"""Padded sequences, one a row: ``input_ids``, ``attention_mask`` and ``completion_mask``, each
[sequences, width] int64. The prompt of a sequence is what stands before its first completion
token. In ``completion_mask`` 0 is no completion token; ``excess`` tells two kinds of others. A
batch with images also has ``MORE``."""

FIELDS = ("input_ids", "attention_mask", "completion_mask")
"""Names of a batch's tensors."""

MORE = "more"
"""Name of further arguments of the model's forward pass (pixel values, and what a processor makes
beside them), a dictionary. They belong to the batch as a whole, so its rows stay together."""


def is_divisible(batch: Batch) -> bool:
    """Whether the rows of a batch can be scored in other company."""
    return len(batch["input_ids"]) > 1 and MORE not in batch


@dataclass(frozen=True)
class ModelInput:
    """Rows that hold one or several sequences each.

    Attributes:
        input_ids, completion_mask: [rows, width] int64.
        attention: keyword arguments of the model's forward pass that say which keys a query sees:
            ``attention_mask``, [rows, width] int64 where each row is one sequence; see ``masks``
            for other forms.
        position_ids: [rows, width] int64; None where the model counts them itself.
        sequence: [rows, width] int64, the sequence that each completion token belongs to; None
            where each row is one.
        sequences: how many there are.
        more: further arguments of the model's forward pass.
    """

    input_ids: Tensor
    attention: dict[str, Any]
    completion_mask: Tensor
    sequences: int
    position_ids: Tensor | None = None
    sequence: Tensor | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """What the model's forward pass is called with."""
        found = {"input_ids": self.input_ids, **self.attention, **self.more}
        if self.position_ids is not None:
            found["position_ids"] = self.position_ids
        return found


def padded_rows(batch: Batch) -> ModelInput:
    """The batch as it is: one sequence per row."""
    ids, attention, completion = (batch[name] for name in FIELDS)
    return ModelInput(
        ids, {"attention_mask": attention}, completion, len(ids), more=batch.get(MORE, {})
    )
