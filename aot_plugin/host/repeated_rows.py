"""Rows that accelerate repeats when an epoch's rows do not fill the ranks' last micro-batches.

The micro-batches of an epoch are distributed in turn, b rows to each of R ranks, until the rows run
out. Rows from the start of the epoch fill the rest (``even_batches``), so that every rank makes the
same number of passes. So in the order of the ranks, the repeated rows are the last ones of the last
micro-batches. They are scored, because all ranks must make the same number of passes, and get mass
0 in the loss.
"""

from typing import Any

import torch
from accelerate import Accelerator

from ..step.engine import MicroBatch


def distinct_rows(total: int, size: int, ranks: int) -> list[int]:
    """How many rows of each rank's last micro-batch of an epoch are not repeated.

    Args:
        total: number of rows of an epoch.
        size: number of rows of a micro-batch on one rank.
        ranks: number of ranks.

    Returns:
        One number from 0 to ``size`` for each rank.
    """
    last = total % (size * ranks) or size * ranks
    return [min(max(last - rank * size, 0), size) for rank in range(ranks)]


def refuse_uneven_ranks(accelerator: Accelerator) -> None:
    """Raises ValueError for settings that the host accepts but that don't work on several ranks."""
    if accelerator.num_processes == 1:
        return
    if not accelerator.even_batches:
        raise ValueError(
            "`accelerator_config: {even_batches: false}` would leave a rank without rows at the "
            "end of an epoch, and the others waiting for it; remove it (repeated rows count for "
            "nothing)"
        )
    if accelerator.dispatch_batches:
        raise ValueError(
            "`accelerator_config: {dispatch_batches: true}` cuts micro-batches up without a look "
            "at which sequences belong together; remove it"
        )


def without_repeated_rows(trainer: Any, batch: MicroBatch) -> int:
    """Gives mass 0 to the repeated rows of a step's last micro-batch on this rank.

    Args:
        trainer: one of our trainers.
        batch: the micro-batch; its ``mass`` is updated in place.

    Returns:
        Number of the step's micro-batches, over all ranks, that contain repeated rows only.
    """
    ranks = trainer.accelerator.num_processes
    ends = trainer.accelerator.gradient_state.end_of_dataloader
    if ranks == 1 or not ends or trainer.args.dataloader_drop_last:
        return 0
    per_row = trainer._step_class.sequences_per_row
    size = len(batch) // per_row
    distinct = distinct_rows(trainer._epoch_rows or len(trainer.train_dataset), size, ranks)
    # If a row has several sequences, the batch consists of as many blocks, each with one sequence
    # of every row.
    places = torch.arange(size, device=batch.mass.device).repeat(per_row)
    batch.mass.mul_(places < distinct[trainer.accelerator.process_index])
    return distinct.count(0)
