"""Batches that hold all labels in the proportion of the data."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler


class StratifiedSampler(Sampler[int]):
    """A random order of all rows in which each run of k rows holds all labels in proportion.

    Positives and negatives are shuffled separately and merged so that among the first i rows the
    number of positives is i p rounded (p: their share of the data). Every block of k consecutive
    rows then holds floor(k p) or ceil(k p) positives, so a step of k rows has a single label only
    if k p or k (1 - p) is below 1. Within a block the order is random, so that no rank or
    micro-batch gets one label by position.

    Of several levels, the highest is merged with the rest in this way, and the rest is such an
    order itself.

    Args:
        labels: one number per row: 1 and 0, or levels.
        block_size: k, the number of rows of one optimizer step over all ranks.
        seed: determines the order together with the epoch (``set_epoch``, called by accelerate), so
            a resumed run sees the rows in the same order as an uninterrupted one.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(
        self, labels: Sequence[float] | NDArray[np.float64], block_size: int, seed: int
    ) -> None:
        if not len(labels):
            raise ValueError("there are no rows to train on: all of the data set was dropped")
        self.labels = torch.as_tensor(labels, dtype=torch.float64)
        self.block_size = block_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.empty(len(self.labels), dtype=torch.int64)
        places = torch.arange(len(self.labels))  # of the levels that are not placed yet
        for level in self.labels.unique().flip(0):
            rows = (self.labels == level).nonzero()[:, 0]
            n = len(places)
            # Integer arithmetic: floor((2 i R + n) / 2n) is i R / n rounded, without rounding
            # errors.
            count = (2 * torch.arange(n + 1) * len(rows) + n) // (2 * n)
            taken = torch.diff(count).bool()
            order[places[taken]] = rows[torch.randperm(len(rows), generator=generator)]
            places = places[~taken]
        for block in order.split(self.block_size):
            yield from block[torch.randperm(len(block), generator=generator)].tolist()
