import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from aot_plugin.data.labels import (
    WORDS,
    Drop,
    label_from_rating,
    level_from_rating,
    parse_label,
    parse_number,
)


@pytest.mark.parametrize("value", [True, 1, 1.0, "good", "Chosen", " TRUE ", "1", "thumbs_up"])
def test_positive(value):
    assert parse_label(value) is True


@pytest.mark.parametrize("value", [False, 0, 0.0, "bad", "Rejected", "false\n", "0", "thumbs_down"])
def test_negative(value):
    assert parse_label(value) is False


@pytest.mark.parametrize("value", [None, "", "  ", math.nan, "N/A"])
def test_missing(value):
    assert parse_label(value) is Drop.UNLABELED
    assert parse_number(value) is Drop.UNLABELED


@pytest.mark.parametrize("value", ["meh", 2, -1, 0.5, ["good"], {"label": 1}])
def test_anything_else_is_refused_with_what_is_accepted(value):
    with pytest.raises(ValueError) as error:
        parse_label(value)
    assert repr(value) in str(error.value)
    assert all(f'"{word}"' in str(error.value) for word in WORDS)
    assert ("positive_min" in str(error.value)) == isinstance(value, int | float)


@pytest.mark.parametrize(
    ("value", "number"), [(3, 3.0), ("4.5", 4.5), (" 7 ", 7.0), (-1, -1.0), (Decimal("2.5"), 2.5)]
)
def test_numbers(value, number):
    assert parse_number(value) == number


@pytest.mark.parametrize("value", ["four", True, [4]])
def test_not_numbers(value):
    with pytest.raises(ValueError, match="is not a number"):
        parse_number(value)


@given(st.floats(allow_nan=False), st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_thresholds_are_inclusive_and_leave_a_gap(rating, low, gap):
    high = low + gap
    assume(rating not in (np.float32(high), np.float32(low)))  # see below
    label = label_from_rating(rating, positive_min=high, negative_max=low)
    assert (label is True) == (rating >= high)
    assert (label is False) == (rating <= low)
    assert (label is Drop.BETWEEN) == (low < rating < high)


@pytest.mark.parametrize("threshold", [0.7, 0.1, 4.35, -2.3, 3.0, 8.0])
def test_a_rating_of_float32_reaches_its_threshold(threshold):
    stored = float(np.float32(threshold))
    assert label_from_rating(stored, positive_min=threshold, negative_max=threshold - 1) is True
    assert label_from_rating(stored, positive_min=threshold + 1, negative_max=threshold) is False
    assert level_from_rating(stored, [threshold - 1, threshold]) == 1
    below = float(np.nextafter(np.float32(threshold), np.float32(-np.inf)))
    assert level_from_rating(below, [threshold - 1, threshold]) == 0.5


def test_a_threshold_may_exceed_float32():
    assert level_from_rating(1.0, [0.5, 1e300]) == 0.5
