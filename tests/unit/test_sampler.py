"""Orders of rows in which every optimizer step holds both labels: in proportion, or balanced."""

from collections import Counter
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aot_plugin.data.sampler import StratifiedSampler, variance_ratio

label_lists = st.lists(st.booleans(), min_size=1, max_size=60)
block_sizes = st.integers(1, 70)
seeds = st.integers(0, 2**31)


def order(labels: list[bool], block_size: int, seed: int, epoch: int = 0) -> list[int]:
    sampler = StratifiedSampler(labels, block_size, seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(labels)
    return list(sampler)


@given(label_lists, block_sizes, seeds)
def test_every_row_comes_once(labels: list[bool], block_size: int, seed: int):
    assert sorted(order(labels, block_size, seed)) == list(range(len(labels)))


@given(label_lists, block_sizes, seeds)
def test_blocks_hold_their_share_of_positives(labels: list[bool], block_size: int, seed: int):
    """floor or ceil of (rows of the block) x (share of positives), the short last block included,
    and never further than one row from it over any number of whole blocks."""
    share = Fraction(sum(labels), len(labels))
    rows = order(labels, block_size, seed)
    for start in range(0, len(rows), block_size):
        block = rows[start : start + block_size]
        positives = sum(labels[row] for row in block)
        assert floor(len(block) * share) <= positives <= ceil(len(block) * share)
        so_far = rows[: start + len(block)]
        assert abs(sum(labels[row] for row in so_far) - len(so_far) * share) <= Fraction(1, 2)


@given(label_lists, block_sizes, seeds, st.integers(0, 5))
def test_seed_and_epoch_determine_the_order(labels, block_size: int, seed: int, epoch: int):
    """A resumed run makes a new sampler and must see the rows of the unbroken one."""
    sampler = StratifiedSampler(labels, block_size, seed)
    sampler.set_epoch(epoch)
    assert list(sampler) == list(sampler) == order(labels, block_size, seed, epoch)


def test_epochs_and_seeds_differ():
    labels = [i % 3 == 0 for i in range(60)]
    orders = [order(labels, 8, seed=1, epoch=epoch) for epoch in range(4)] + [order(labels, 8, 99)]
    assert len({tuple(rows) for rows in orders}) == 5


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    order([True, False] * 10, 4, seed=3)
    assert torch.rand(1) == expected


def test_place_in_the_block_says_nothing_about_the_label():
    """Over many epochs each place of a block of 4 is positive in about 1 of 4 cases: a rank or a
    micro-batch that always takes the same place is not given one label."""
    labels = [i % 4 == 0 for i in range(40)]
    epochs = [order(labels, 4, seed=0, epoch=epoch) for epoch in range(100)]
    by_place = torch.tensor([[labels[row] for row in rows] for rows in epochs]).reshape(-1, 4)
    shares = by_place.double().mean(0)
    assert (shares - 0.25).abs().max() < 0.07  # 5 standard errors of 1000 draws


def test_rows_of_one_label_are_shuffled_over_the_whole_data():
    """A row can land in any block: the order of the file does not survive."""
    labels = [True, False] * 20
    blocks = {order(labels, 4, seed=0, epoch=epoch).index(0) // 4 for epoch in range(200)}
    assert blocks == set(range(10))


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="there are no rows to train on"):
        StratifiedSampler([], 4, seed=0)


level_lists = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@given(level_lists, block_sizes, seeds, st.integers(0, 3))
def test_balanced_blocks_hold_equal_numbers(
    levels: list[int], block_size: int, seed: int, epoch: int
) -> None:
    sampler = StratifiedSampler(levels, block_size, seed, balanced=True)
    sampler.set_epoch(epoch)
    rows, kinds, most = list(sampler), len(set(levels)), max(Counter(levels).values())
    assert len(rows) == len(sampler) == kinds * most
    for level, count in Counter(levels).items():
        drawn = [row for row in rows if levels[row] == level]
        assert len(drawn) == most
        # Pass after pass: before a row comes again, all others of its label have come.
        passes = Counter(drawn)
        assert set(passes.values()) <= {most // count, -(-most // count)}
    for start in range(0, len(rows), block_size):
        block = Counter(levels[row] for row in rows[start : start + block_size])
        expected = Fraction(block.total(), kinds)
        slack = 2 if kinds > 2 else 1  # the guarantee of Tijdeman's order, at both ends of a block
        assert all(abs(block[level] - expected) < slack for level in set(levels))


def test_a_row_is_not_repeated_before_all_of_its_label_came() -> None:
    labels = [i < 5 for i in range(45)]
    rows = list(StratifiedSampler(labels, 2, seed=0, balanced=True))
    positives = [row for row in rows if labels[row]]
    for start in range(0, 40, 5):
        assert sorted(positives[start : start + 5]) == list(range(5))


def test_a_block_of_fewer_rows_than_levels_has_others_each_time() -> None:
    """In rounds of a fixed order, blocks of 2 would pair the same levels for ever."""
    levels = [i % 4 for i in range(400)]
    rows = list(StratifiedSampler(levels, 2, seed=0, balanced=True))
    pairs = Counter(frozenset(levels[row] for row in rows[i : i + 2]) for i in range(0, 400, 2))
    assert len(pairs) == 6


def test_the_ratio_of_variances_is_that_of_simulated_steps() -> None:
    """The gradient of a step is the difference of the labels' means, of rows that vary alike."""
    random, rows, share = np.random.default_rng(0), 40, 0.1

    def variance(positives: int) -> float:
        samples = [random.normal(size=(20_000, n)).mean(1) for n in (positives, rows - positives)]
        return float((samples[0] - samples[1]).var())

    simulated = variance(int(share * rows)) / variance(rows // 2)
    assert variance_ratio([share, 1 - share]) == pytest.approx(simulated, rel=0.05)
    assert variance_ratio([1 / 3] * 3) == pytest.approx(1.0)
