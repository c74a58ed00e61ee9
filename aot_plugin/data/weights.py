"""Weights of rows: the column that ``field_weight`` of an entry names.

They become the masses of the atoms in the transport problem. A prepared row carries its weight in a
column of ours; it is null in rows of entries without ``field_weight``, which weigh 1.
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np
from datasets import Dataset, Value

from .levels import LEVEL
from .rows import Row, RowError, cell

WEIGHT = "aot_weight"
"""The column of prepared rows, float64."""


def parse_weight(row: Row, field: str) -> float:
    """The weight in a column of a row; 0 if the row is to be dropped.

    Raises:
        RowError: if there is no such column, or its value is not a finite number of at least 0.
    """
    value = cell(row, field)
    # Databases export numbers as decimals.
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise RowError(
            f"`{field}`: {value!r} is not a weight; write a number above 0 (1 is the weight of "
            "rows without `field_weight`), or 0 to drop the row"
        )
    return float(value)


def weighed(
    dataset: Dataset, entry: Mapping[str, Any], numbers: np.ndarray | None = None
) -> tuple[Dataset, int]:
    """Reads the weights of an entry whose type is not ours.

    Args:
        dataset: the entry's rows.
        entry: the entry as the host gets it.
        numbers: the rows' numbers in their file, for messages; default 0, 1, 2, ...

    Returns:
        The rows with their weights in the column ``WEIGHT``, without those of weight 0, and the
        number of the latter. Without ``field_weight`` the rows as they are, and 0.

    Raises:
        ValueError: if a row has no weight; names dataset, row, field and value.
    """
    ours = [name for name in (WEIGHT, LEVEL) if name in dataset.column_names]
    dataset = dataset.remove_columns(ours) if ours else dataset
    field = entry.get("field_weight")
    if not field:
        return dataset, 0
    column = field if field in dataset.column_names else field.partition(".")[0]
    read = dataset.select_columns([column]) if column in dataset.column_names else dataset
    weights = np.empty(len(dataset))
    for place, row in enumerate(read):
        try:
            weights[place] = parse_weight(row, field)
        except RowError as error:
            number = place if numbers is None else numbers[place]
            raise ValueError(f"{entry['path']}, row {number}: {error}") from None
    kept = weights > 0
    if not kept.all():
        dataset = dataset.select(np.flatnonzero(kept))
    dataset = dataset.add_column(WEIGHT, weights[kept], feature=Value("float64"))
    return dataset, int((~kept).sum())
