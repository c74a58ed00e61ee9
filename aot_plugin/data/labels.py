"""Labels from the cells of a label column."""

import math
import re
import struct
from bisect import bisect_right
from collections.abc import Sequence
from decimal import Decimal
from enum import StrEnum
from functools import cache
from itertools import pairwise
from typing import Any

Label = bool | float
"""True for positive, False for negative; with ``grades`` the level of a response, from 0 (the
lowest) to 1 (the highest)."""


class Drop(StrEnum):
    """Why a row is dropped; the values are column headings of the table in the log."""

    EMPTY = "empty"
    UNASKED = "unasked"
    IDENTICAL = "identical"
    OTHER_PROMPT = "other prompt"
    UNLABELED = "unlabeled"
    WEIGHTLESS = "weight 0"
    BETWEEN = "between thresholds"
    TOO_LONG = "too long"
    DUPLICATE = "duplicate"


WORDS = {
    "good": True,
    "bad": False,
    "chosen": True,
    "rejected": False,
    "true": True,
    "false": False,
    "positive": True,
    "negative": False,
    "desirable": True,
    "undesirable": False,
    "thumbs_up": True,
    "thumbs_down": False,
    "1": True,
    "0": False,
}
"""Label strings; case and surrounding white space are ignored."""

MISSING = ("", "n/a", "na", "nan", "none", "null")
"""Strings that stand for an absent label (UltraFeedback writes N/A)."""


def is_missing(value: Any) -> bool:
    """Whether a cell holds no label or rating."""
    if isinstance(value, str):
        return value.strip().lower() in MISSING
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def parse_label(value: Any) -> bool | Drop:
    """Parses a label.

    Returns:
        True for positive, False for negative, ``Drop.UNLABELED`` for a missing value.

    Raises:
        ValueError: if the value is neither a label nor missing; names the accepted ones.
    """
    if is_missing(value):
        return Drop.UNLABELED
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in WORDS:
        return WORDS[value.strip().lower()]
    hint = "; rewrite the column with one of these"
    if isinstance(value, int | float):
        hint = "; for a rating, set `positive_min` and `negative_max`, or `grades`"
    accepted = ", ".join(f'"{word}"' for word in WORDS)
    raise ValueError(f"{value!r} is not a label; accepted are true/false, 1/0, {accepted}{hint}")


def parse_number(value: Any) -> float | Drop:
    """Parses a rating, which datasets store as a number or as a string.

    Returns:
        The number, or ``Drop.UNLABELED`` for a missing value.

    Raises:
        ValueError: if the value is neither a number nor missing.
    """
    if is_missing(value):
        return Drop.UNLABELED
    # Databases export numbers as decimals.
    if isinstance(value, int | float | str | Decimal) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    comma = isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+,\d+\s*", value)
    raise ValueError(f"{value!r} is not a number{'; write a decimal point' if comma else ''}")


def label_from_rating(rating: float, positive_min: float, negative_max: float) -> bool | Drop:
    """True from ``positive_min`` up, False from ``negative_max`` down, else ``Drop.BETWEEN``."""
    if rating >= min(_both(positive_min)):
        return True
    if rating <= max(_both(negative_max)):
        return False
    return Drop.BETWEEN


def are_rising(grades: Sequence[float]) -> bool:
    """Whether thresholds are strictly increasing."""
    return all(a < b for a, b in pairwise(grades))


def level_from_rating(rating: float, grades: Sequence[float]) -> float:
    """The level of a rating: how many of the thresholds ``grades`` it reaches, as a share of all.

    Args:
        rating: the rating.
        grades: the lowest rating of each level but the lowest one, increasing.
    """
    return bisect_right([min(_both(grade)) for grade in grades], rating) / len(grades)


@cache  # asked for every rating
def _both(threshold: float) -> tuple[float, float]:
    """A threshold, and the number that a column of float32 holds in its place: in such a column 0.7
    is 0.699999988."""
    try:
        return threshold, struct.unpack("f", struct.pack("f", threshold))[0]
    except OverflowError:
        return threshold, threshold
