"""Taking batches apart and regrouping their rows."""

from itertools import accumulate, combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from aot_plugin.scoring.batching import Sequences
from aot_plugin.scoring.cost import Cost
from aot_plugin.scoring.layout import Packed, Padded, Shared
from aot_plugin.scoring.logps import sequence_logps
from aot_plugin.scoring.masks import boolean_mask
from aot_plugin.scoring.model_input import padded_rows
from aot_plugin.scoring.partition import balanced, split_by_tokens
from aot_plugin.scoring.shared_prompts import cheapest_rows, distinct_prompts

PAD = 7
rows_of_tokens = st.lists(
    # Ids may equal the padding id: only the attention mask says what is padding.
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12),
    min_size=1,
    max_size=10,
)


def host_batch(rows: list, side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    """A collated batch as the host's collators make it, padded by hand."""
    width = max(map(len, rows)) + extra
    columns: dict[str, list] = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for row in rows:
        empty = width - len(row)
        for key, values, fill in (
            ("input_ids", [token for token, _ in row], PAD),
            ("attention_mask", [1] * len(row), 0),
            ("completion_mask", [int(completion) for _, completion in row], 0),
        ):
            padding = [fill] * empty
            columns[key].append(padding + values if side == "left" else values + padding)
    return {key: torch.tensor(values) for key, values in columns.items()}


def sequences_of(rows: list) -> Sequences:
    return Sequences.from_batches([host_batch([row]) for row in rows])


@given(rows_of_tokens, st.integers(1, 4), st.sampled_from(["left", "right"]), st.integers(0, 3))
def test_batches_give_back_their_rows(rows: list, size: int, side: str, extra: int):
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    sequences = Sequences.from_batches([host_batch(group, side, extra) for group in groups])
    assert len(sequences) == len(rows)
    assert sequences.lengths() == [len(row) for row in rows]
    for row, ids, mask in zip(rows, sequences.input_ids, sequences.completion_mask, strict=True):
        assert ids.tolist() == [token for token, _ in row]
        assert mask.bool().tolist() == [completion for _, completion in row]


@given(rows_of_tokens, st.sampled_from([1, 2, 8, 64]), st.randoms())
def test_collate_equals_padding_by_hand(rows: list, multiple: int, rng):
    chosen = rng.sample(range(len(rows)), rng.randint(1, len(rows)))
    batch = sequences_of(rows).collate(chosen, PAD, multiple)
    longest = max(len(rows[row]) for row in chosen)
    extra = next(e for e in range(multiple) if (longest + e) % multiple == 0)
    expected = host_batch([rows[row] for row in chosen], "right", extra)
    assert batch.keys() == expected.keys()
    for key, values in expected.items():
        assert torch.equal(batch[key], values)
        assert batch[key].dtype == torch.int64


@given(rows_of_tokens)
def test_collating_and_taking_apart_is_a_roundtrip(rows: list):
    sequences = sequences_of(rows)
    again = Sequences.from_batches([sequences.collate(range(len(rows)), PAD, multiple=8)])
    for before, after in (
        (sequences.input_ids, again.input_ids),
        (sequences.completion_mask, again.completion_mask),
    ):
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@given(rows_of_tokens)
def test_by_length_is_a_permutation_from_long_to_short(rows: list):
    blocks = sequences_of(rows).by_length()
    assert sorted(row for _, block in blocks for row in block) == list(range(len(rows)))
    assert [tokens for tokens, _ in blocks] == [len(rows[row]) for _, (row,) in blocks]
    assert [tokens for tokens, _ in blocks] == sorted(map(len, rows), reverse=True)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.data())
def test_no_other_cut_has_a_smaller_largest_part(tokens: list[int], data: st.DataObject):
    tokens.sort(reverse=True)
    parts = data.draw(st.integers(1, len(tokens)))

    def largest(sizes: list[int]) -> int:
        starts = list(accumulate(sizes, initial=0))
        return max(size * tokens[start] for size, start in zip(sizes, starts[:-1], strict=True))

    groups = split_by_tokens([(n, [row]) for row, n in enumerate(tokens)], parts)
    costs = [len(group) * tokens[group[0]] for group in groups]
    assert costs == sorted(costs, reverse=True)
    groups.sort()
    assert len(groups) == parts
    assert all(groups)
    assert [row for group in groups for row in group] == list(range(len(tokens)))
    cuts = combinations(range(1, len(tokens)), parts - 1)
    sizes = [[b - a for a, b in pairwise([0, *cut, len(tokens)])] for cut in cuts]
    assert largest(list(map(len, groups))) == min(map(largest, sizes))


def pairs(prompts: list[tuple[int, list[int]]]) -> Sequences:
    """Prompts of these lengths, each with completions of these lengths."""
    rows = [
        [(number % 10, False)] * prompt + [(number % 10, True)] * completion
        for number, (prompt, completions) in enumerate(prompts)
        for completion in completions
    ]
    return sequences_of(rows)


BY_TOKENS = Cost(pair=0.0, token=1.0, mask=0.0)
SHARED = Shared(boolean_mask, BY_TOKENS)
PACKED = Packed(boolean_mask)


def test_a_prompt_with_more_rows_than_micro_batches_is_divided():
    rows = [[(1, False), (2, True)]] * 4
    assert sorted(map(len, SHARED.groups(sequences_of(rows), 3))) == [1, 1, 2]


def test_rows_of_a_prompt_meet_where_it_pays():
    sequences = pairs([(8, [4, 4]), (8, [4, 4]), (8, [4, 4]), (8, [4, 4])])
    for layout in (SHARED, PACKED):
        groups = layout.groups(sequences, 4)
        assert sorted(map(sorted, groups)) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("popular", [2, 8, 24])
def test_a_popular_prompt_does_not_outgrow_a_micro_batch(popular: int):
    """32 rows in 8 micro-batches: none holds more than 4 rows of the longest would."""
    sequences = pairs([(20, [10] * popular)] + [(20, [10])] * (32 - popular))
    lengths, ids, completion = (
        sequences.lengths(),
        sequences.input_ids,
        sequences.completion_mask,
    )
    groups = SHARED.groups(sequences, 8)
    assert sorted(row for group in groups for row in group) == list(range(32))
    for group in groups:
        prompts = distinct_prompts([ids[r] for r in group], [completion[r] for r in group])
        layout = cheapest_rows(prompts, [lengths[row] for row in group], BY_TOKENS)
        assert layout.memory <= 4 * 30


prompts_of_lengths = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=9)),
    min_size=1,
    max_size=6,
)


@given(prompts_of_lengths, st.data())
def test_packed_micro_batches(prompts: list[tuple[int, list[int]]], data: st.DataObject):
    """None is empty, none is larger than equally many of the longest rows, and the first is the
    largest; all in all they take no more tokens than rows apart."""
    sequences = pairs(prompts)
    parts = data.draw(st.integers(1, len(sequences)))
    groups = PACKED.groups(sequences, parts)
    assert len(groups) == parts
    assert sorted(row for group in groups for row in group) == list(range(len(sequences)))
    batches = [sequences.collate(group, PAD) for group in groups]
    shapes = [PACKED.arrange(batch).input_ids.shape for batch in batches]
    assert [PACKED.shape(batch) for batch in batches] == shapes
    sizes = [shape.numel() for shape in shapes]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= -(-len(sequences) // parts) * max(sequences.lengths())
    assert min(map(len, groups)) > 0
    assert sum(sizes) <= sum(sequences.lengths())


def test_packed_micro_batches_hold_equal_shares():
    groups = PACKED.groups(pairs([(2, [n, n]) for n in (40, 30, 20, 10)]), 2)
    assert sorted(map(sorted, groups)) == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_packed_micro_batches_divide_a_prompt_where_they_must():
    """Three pairs in two micro-batches: two pairs are more than three rows of the longest."""
    sequences = pairs([(2, [50, 50])] * 3)
    groups = PACKED.groups(sequences, 2)
    assert sorted(map(len, groups)) == [3, 3]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.data())
def test_balanced_groups(sizes: list[int], data: st.DataObject):
    parts = data.draw(st.integers(1, len(sizes)))
    groups = balanced(sizes, parts)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    sums = [sum(sizes[index] for index in group) for group in groups]
    assert all(groups)
    assert sums == sorted(sums, reverse=True)
    # What every partition takes at least, and Graham's bound above it.
    assert sums[0] <= max(sizes, default=0) * (1 - 1 / parts) + sum(sizes) / parts


@pytest.mark.parametrize("seed", range(3))
def test_any_grouping_gives_the_same_gradient(tiny_llama: LlamaForCausalLM, seed: int):
    """Moves 1 to 3 in small: with a weight per sequence fixed, the sum over any micro-batches, in
    any order and with any padding, has the gradient of one batch with all rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 15, (11,), generator=generator).tolist()
    tokens = [torch.randint(3, 20, (n,), generator=generator).tolist() for n in lengths]
    rows = [[(token, i >= 2) for i, token in enumerate(row)] for row in tokens]
    weights = torch.randn(len(rows), generator=generator)
    sequences = sequences_of(rows)

    def gradient(groups: list, multiple: int) -> Tensor:
        tiny_llama.zero_grad()
        for group in groups:
            batch = sequences.collate(group, 0, multiple)
            logps = sequence_logps(
                tiny_llama, tiny_llama.get_output_embeddings(), padded_rows(batch)
            )
            (weights[list(group)] * logps).sum().backward()
        return torch.cat([p.grad.flatten() for p in tiny_llama.parameters()])

    expected = gradient([range(len(rows))], multiple=1)
    shuffled = torch.randperm(len(rows), generator=generator).tolist()
    assert expected.norm() > 1
    for groups, multiple in (
        (Padded().groups(sequences, 4), 1),
        (PACKED.groups(sequences, 4), 1),
        ([shuffled[::3], shuffled[1::3], shuffled[2::3]], 8),
        ([[row] for row in shuffled], 1),
    ):
        error = (gradient(groups, multiple) - expected).norm() / expected.norm()
        assert error < 1e-5
    wrong = gradient([shuffled[:5]], multiple=1)  # control: rows that are left out are missed
    assert (wrong - expected).norm() > 0.1 * expected.norm()
