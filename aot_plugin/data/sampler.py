"""Batches that hold both labels in the proportion of the data."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class StratifiedSampler(Sampler[int]):
    """A random order of all rows in which each run of k rows holds both labels in proportion.

    Positives and negatives are shuffled separately and merged so that among the first i rows the
    number of positives is i p rounded (p: their share of the data). Every block of k consecutive
    rows then holds floor(k p) or ceil(k p) positives, so a step of k rows has a single label only
    if k p or k (1 - p) is below 1. Within a block the order is random, so that no rank or
    micro-batch gets one label by position.

    Args:
        labels: one bool per row.
        block_size: k, the number of rows of one optimizer step over all ranks.
        seed: determines the order together with the epoch (``set_epoch``, called by accelerate), so
            a resumed run sees the rows in the same order as an uninterrupted one.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(self, labels: Sequence[bool], block_size: int, seed: int) -> None:
        if not len(labels):
            raise ValueError("there are no rows to train on: all of the data set was dropped")
        self.labels = torch.as_tensor(labels, dtype=torch.bool)
        self.block_size = block_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        n = len(self.labels)
        positives, negatives = self.labels.nonzero()[:, 0], (~self.labels).nonzero()[:, 0]
        # Integer arithmetic: floor((2 i P + N) / 2N) is i P / N rounded, without rounding errors.
        count = (2 * torch.arange(n + 1) * len(positives) + n) // (2 * n)
        takes_positive = torch.diff(count).bool()
        order = torch.empty(n, dtype=torch.int64)
        order[takes_positive] = positives[torch.randperm(len(positives), generator=generator)]
        order[~takes_positive] = negatives[torch.randperm(len(negatives), generator=generator)]
        for block in order.split(self.block_size):
            yield from block[torch.randperm(len(block), generator=generator)].tolist()
