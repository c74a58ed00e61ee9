"""Batches that hold all labels, in the proportion of the data or in equal numbers."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

NOTABLE = 1.5
"""A ``variance_ratio`` that is worth a hint: of two labels one has 21 per cent of the rows."""


class StratifiedSampler(Sampler[int]):
    """A random order of all rows in which each run of k rows holds all labels in proportion, or as
    often as each other.

    The rows of each label are shuffled separately and merged so that among the first i rows the
    number of each differs from i p (p: its share of the data) by at most 1 - 1 / (2 (K - 1)), K the
    number of labels. Of positives and negatives it is i p rounded, so that every block of k
    consecutive rows holds floor(k p) or ceil(k p) positives, and a step of k rows has a single
    label only if k p or k (1 - p) is below 1. Within a block the order is random, so that no rank
    or micro-batch gets one label by position.

    Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).

    ``balanced``: p = 1 / K for all labels. They take turns in rounds of K, each in a random order,
    so that a block of fewer rows than labels has others each time. An epoch has each row of the
    most frequent label once. Those of another one, with c rows, come in passes over all of them,
    each in an order of its own, and the last pass is cut short. So a row comes a second time only
    after the others of its label.

    Args:
        labels: one number per row: 1 and 0, or levels.
        block_size: k, the number of rows that are sorted together: those of an optimizer step over
            all ranks, or of a micro-batch with ``aot_batch: micro_batch``.
        seed: determines the order together with the epoch (``set_epoch``), so that a resumed run
            sees the rows in the same order as an uninterrupted one.
        balanced: whether labels come in equal numbers rather than in the proportion of the data.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(
        self,
        labels: Sequence[float] | NDArray[np.float64],
        block_size: int,
        seed: int,
        balanced: bool = False,
    ) -> None:
        if not len(labels):
            raise ValueError("there are no rows to train on: all of the data set was dropped")
        self.labels = torch.as_tensor(labels, dtype=torch.float64)
        self.block_size = block_size
        self.seed = seed
        self.balanced = balanced
        self.epoch = 0
        self._rows = rows_per_epoch(self.labels.numpy(), balanced)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._rows

    @cached_property
    def _parts(self) -> list[torch.Tensor]:
        """The rows of each level, the highest level first."""
        levels, of_level = self.labels.unique(return_inverse=True)
        return [(of_level == level).nonzero()[:, 0] for level in reversed(range(len(levels)))]

    @cached_property
    def _proportional(self) -> torch.Tensor:
        return torch.tensor(_turns([len(part) for part in self._parts]))

    def _levels_in_turn(self, generator: torch.Generator) -> torch.Tensor:
        """The level of each place of an epoch's order, [rows] int64, 0 the highest."""
        if not self.balanced:
            return self._proportional
        count = len(self._parts)
        return torch.rand(len(self) // count, count, generator=generator).argsort(dim=1).flatten()

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.empty(len(self), dtype=torch.int64)
        turns = self._levels_in_turn(generator)
        for level, part in enumerate(self._parts):
            places = turns == level
            count = int(places.sum())
            passes = range(-(-count // len(part)))
            drawn = [torch.randperm(len(part), generator=generator) for _ in passes]
            order[places] = part[torch.cat(drawn)[:count]]
        for block in order.split(self.block_size):
            yield from block[torch.randperm(len(block), generator=generator)].tolist()


def rows_per_epoch(labels: NDArray[np.float64], balanced: bool) -> int:
    """Number of rows that an epoch of ``StratifiedSampler`` reads."""
    if not balanced:
        return len(labels)
    counts = np.unique(labels, return_counts=True)[1]
    return int(len(counts) * counts.max())


def variance_ratio(shares: Sequence[float] | NDArray[np.float64]) -> float:
    """Variance of a step's gradient over that of a step with all labels in equal numbers.

    The gradient is a sum of one mean per label. If the rows of all labels vary alike, the variance
    of a mean of k p rows is proportional to 1 / p, so the ratio is the mean of 1 / (K p) over the K
    labels: 1 if they are equal.

    Args:
        shares: p of each label, all above 0.
    """
    p = np.asarray(shares, dtype=np.float64)
    return float((1.0 / (len(p) * p)).mean())


def _turns(counts: Sequence[int]) -> list[int]:
    """The level of each of n = sum(counts) places, so that the first i places hold each level in
    proportion (Tijdeman's algorithm, in integers).

    A level that has had x of its c places may have the i-th if c i / n - x >= s, and is late if it
    has not before c i / n - x >= 1 - s, where s = 1 / (2 K - 2). Of those that may, the one that is
    late first is next.
    """
    n, m = sum(counts), max(2 * len(counts) - 2, 1)
    opens = [-(-n // (m * c)) for c in counts]
    late = [-(-n * (m - 1) // (m * c)) for c in counts]
    had = [0] * len(counts)
    turns = []
    for i in range(1, n + 1):
        level = min((late[k], k) for k in range(len(counts)) if opens[k] <= i)[1]
        turns.append(level)
        had[level] += 1
        share = m * counts[level]
        opens[level] = -(-n * (1 + m * had[level]) // share)
        late[level] = -(-n * (m - 1 + m * had[level]) // share)
    return turns
