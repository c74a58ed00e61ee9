"""Levels of graded rows: ratings divided by the thresholds in ``grades``.

A prepared row has its level in a column of ours, from 0 (the lowest) to 1 (the highest). It is null
in rows of entries without ``grades``, whose level is that of their label: 1 if positive, else 0.
"""

from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

LEVEL = "aot_level"
"""The column of prepared rows, float64."""


def level_of(row: dict[str, Any]) -> float:
    """The level of a prepared row."""
    level = row.get(LEVEL)
    return float(row["label"] if level is None else level)


def label_in_words(row: dict[str, Any]) -> str:
    """What a prepared row is called: "positive", "negative" or its level."""
    return level_in_words(level_of(row))


def level_in_words(level: float) -> str:
    return {0.0: "negative", 1.0: "positive"}.get(level, f"level {level:.2g}")


def levels(dataset: Dataset) -> NDArray[np.float64]:
    """The levels of all rows of a prepared dataset, [rows]."""
    labels = np.asarray(dataset["label"], dtype=np.float64)
    if LEVEL not in dataset.column_names:
        return labels
    found = dataset.with_format("arrow")[LEVEL].to_numpy(zero_copy_only=False).astype(np.float64)
    return np.where(np.isnan(found), labels, found)
