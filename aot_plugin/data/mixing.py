"""Which rows of an entry are read: ``shards`` and ``weight``.

The host reads both keys for SFT only. For weights up to 1 the rows are those that the host's SFT
loader takes for the same seed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def is_mixed(entry: Mapping[str, Any]) -> bool:
    """Whether an entry takes anything but every row once."""
    return bool(entry.get("shards")) or (entry.get("weight") or 1) != 1


def rows_taken(n: int, entry: Mapping[str, Any], seed: int) -> np.ndarray:
    """The numbers of the rows that an entry takes out of n, in the order of reading.

    With ``shards`` s and ``shards_idx`` i (default 0) these are the i-th of s equal parts of the
    shuffled rows, otherwise all rows. ``weight`` w takes floor(m w) of these m rows (at least one):
    as many whole passes as fit, in order, then rows drawn at random without repetition.

    Args:
        n: number of rows in the dataset.
        entry: the entry, of which ``weight`` and the shards are read.
        seed: seed of the shuffles.
    """
    rows = np.arange(n)
    if entry.get("shards"):
        parts = np.array_split(_shuffled(rows, seed), entry["shards"])
        rows = parts[entry.get("shards_idx") or 0]
    if not len(rows):
        return rows
    total = max(1, int(len(rows) * (entry.get("weight") or 1)))
    passes, extra = divmod(total, len(rows))
    return np.concatenate([np.tile(rows, passes), _shuffled(rows, seed)[:extra]])


def _shuffled(rows: np.ndarray, seed: int) -> np.ndarray:
    return rows[np.random.default_rng(seed).permutation(len(rows))]
