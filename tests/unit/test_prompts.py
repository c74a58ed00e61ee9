"""A prompt encoded once for its completions: the numbers are those of separate rows."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from harness import random_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config
from transformers.integrations.flex_attention import WrappedFlexAttention

from aot_plugin.scoring.cost import Cost
from aot_plugin.scoring.layout import PADDED, Packed, Padded, Shared
from aot_plugin.scoring.logps import sequence_logps, weighted_logps_sum
from aot_plugin.scoring.masks import (
    VARIANTS,
    additive_mask,
    block_mask,
    boolean_mask,
    permit_variants,
)
from aot_plugin.scoring.model_input import padded_rows
from aot_plugin.scoring.settle import possible_layouts
from aot_plugin.scoring.shared_prompts import (
    blocks_of,
    cheapest_rows,
    distinct_prompts,
    rows_of_documents,
    tokens_of,
    unpadded,
)

TOKENS = st.integers(6, 20)

BY_TOKENS = Cost(pair=0.0, token=1.0, mask=0.0)
"""Of a model whose attention and masks cost nothing."""

SHARED = Shared(boolean_mask, BY_TOKENS)

SMOLLM2 = Cost.of(
    LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    itemsize=4,
    checkpointing=True,
)


def batch_of(rows: list[tuple[list[int], list[int]]], side: str = "right") -> dict[str, Tensor]:
    """(prompt, completion) rows as the host's collator makes them."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    columns: dict[str, list[list[int]]] = {
        "input_ids": [],
        "attention_mask": [],
        "completion_mask": [],
    }
    for prompt, completion in rows:
        padding = [0] * (width - len(prompt) - len(completion))
        mask = [0] * len(prompt) + [1] * len(completion)
        for name, values in (
            ("input_ids", prompt + completion),
            ("attention_mask", [1] * len(mask)),
            ("completion_mask", mask),
        ):
            columns[name].append(padding + values if side == "left" else values + padding)
    return {name: torch.tensor(values) for name, values in columns.items()}


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Tensor]:
    side = draw(st.sampled_from(["right", "left"]))
    # Without prompt, a first token behind padding would be predicted from padding.
    shortest = 1 if side == "left" else 0
    prompts = draw(
        st.lists(st.lists(TOKENS, min_size=shortest, max_size=9), min_size=1, max_size=3)
    )
    rows = draw(
        st.lists(
            st.tuples(st.sampled_from(prompts), st.lists(TOKENS, max_size=9)).filter(
                lambda row: row[0] + row[1]
            ),
            min_size=1,
            max_size=6,
        )
    )
    return batch_of(rows, side)


@pytest.fixture(scope="module")
def model(word_tokenizer) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "sliding_window": None}
    return random_model(word_tokenizer, "Mistral", **sizes).double()


@given(batch=batches())
def test_log_probabilities_and_gradients_are_those_of_separate_rows(model, batch):
    head = model.get_output_embeddings()
    weights = torch.linspace(-1, 1, len(batch["input_ids"])).double()
    found = {}
    for share in (False, True):
        model.zero_grad()
        layout = SHARED if share else PADDED
        inputs = layout.arrange(batch)
        assert layout.shape(batch) == inputs.input_ids.shape
        logps = sequence_logps(model, head, inputs)
        (weights * logps).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        weighted_logps_sum(model, head, inputs, weights.float()).backward()
        fused = [p.grad.clone() for p in model.parameters()]
        found[share] = (logps.detach(), gradients, fused)
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-5)
    for kind in (1, 2):
        for shared, apart in zip(found[True][kind], found[False][kind], strict=True):
            torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-5)


def test_a_pair_takes_one_row_and_the_prompt_once():
    prompt, chosen, rejected = [6, 7, 8, 9], [10, 11, 12], [13, 14]
    shared = SHARED.arrange(batch_of([(prompt, chosen), (prompt, rejected)]))
    assert shared.input_ids.tolist() == [[6, 7, 8, 9, 10, 11, 12, 9, 13, 14]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 3, 4, 5]]
    assert shared.completion_mask.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 1, 1]]
    marked = shared.completion_mask.bool()
    assert shared.sequence[marked].tolist() == [0, 0, 0, 1, 1]
    sees = shared.attention["attention_mask"][0, 0]
    assert sees[9].nonzero()[:, 0].tolist() == [0, 1, 2, 7, 8, 9]
    assert sees[6].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_batch_that_would_grow_is_left_alone():
    """Rows of one prompt each, and a short prompt whose completions are longer in one row."""
    apart = batch_of([([6, 7], [8, 9]), ([6, 8], [8, 9])])
    assert SHARED.arrange(apart) == padded_rows(apart)
    short = batch_of([([6], [8, 9]), ([6], [9, 8])])
    assert SHARED.arrange(short) == padded_rows(short)


@given(batch=batches(), most=st.integers(1, 60), pair=st.sampled_from([0.0, 0.01, 1.0]))
def test_rows_of_a_prompt_stand_in_blocks_that_fit(batch, most, pair):
    ids, completion = unpadded(batch)
    lengths = list(map(len, ids))
    cost = Cost(pair, token=1.0, mask=0.0)
    for prompt in distinct_prompts(ids, completion):
        blocks = blocks_of(prompt, lengths, cost, most)
        assert [row for _, rows in blocks for row in rows] == prompt[1]
        for block in blocks:
            assert len(block[1]) == 1 or tokens_of(block, lengths) <= most
            rows = rows_of_documents(ids, completion, [[block]], boolean_mask, torch.device("cpu"))
            assert rows.input_ids.shape == (1, tokens_of(block, lengths))


def layout(rows: list[tuple[int, list[int]]], cost: Cost = SMOLLM2):
    """The cheapest one of prompts of these lengths, with completions of these."""
    lengths = [prompt + n for prompt, completions in rows for n in completions]
    numbers = iter(range(len(lengths)))
    prompts = [(prompt, [next(numbers) for _ in completions]) for prompt, completions in rows]
    return cheapest_rows(prompts, lengths, cost)


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([(200, [200, 180])], True),  # a pair as they come
        ([(30, [30, 20]), (40, [30, 30])], True),
        # Measured when prompts were shared wherever that saves a token: 12.5 s in place of 5.3 s,
        # 1,986 MB in place of 1,082 MB,
        ([(30, [3000, 3000])], False),
        # and 15.2 s in place of 3.5 s.
        ([(20, [200] * 32)], False),
        ([(1000, [200] * 32)], True),
    ],
)
def test_prompts_are_shared_where_that_is_less_work(rows, shared):
    assert layout(rows).padded is not shared


def test_attention_and_the_mask_decide():
    """Each on its own: with the other free of cost the long responses are shared."""
    pair = [(30, [3000, 3000])]
    assert not layout(pair, BY_TOKENS).padded
    assert layout(pair, Cost(SMOLLM2.pair, token=1.0, mask=0.0)).padded
    assert layout(pair, Cost(0.0, SMOLLM2.token, SMOLLM2.mask)).padded


@pytest.mark.parametrize("completions", [2, 3, 5, 32])
def test_a_layout_needs_no_more_than_separate_rows(completions):
    for prompt in (10, 300, 2000):
        for length in (10, 300, 1000):
            found = layout([(prompt, [length] * completions)])
            apart = (completions, prompt + length, False)
            assert found.work <= SMOLLM2.work(*apart)
            assert found.memory <= SMOLLM2.memory(*apart)


def test_many_completions_are_divided_among_rows():
    rows = layout([(1000, [200] * 32)]).rows
    assert 1 < len(rows) < 32
    members = [member for row in rows for _, members in row for member in members]
    assert sorted(members) == list(range(32))


def test_short_rows_of_many_lengths_stand_in_fewer_rows():
    """Where padding costs more than the mask does; not where rows are long."""
    rows = layout([(10, [20]), (12, [40]), (9, [60]), (8, [80])]).rows
    assert sorted(rows) == [[(8, [3]), (10, [0])], [(9, [2]), (12, [1])]]
    assert layout([(1000, [2000]), (1000, [4000])]).padded


def test_work_is_that_of_the_formula():
    """Two heads of 8, one for the keys; feed-forward layers of 32 on a width of 16."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    cost = Cost.of(config, itemsize=2, checkpointing=False)
    linear = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32)  # operations per token and layer
    assert cost.pair == pytest.approx(4 * 16 / linear)
    assert cost.work(2, 10, masked=True) == pytest.approx(20 + 1.5 * 2 * 10 * 10 * cost.pair)
    assert cost.work(2, 10, masked=False) == pytest.approx(20 + 0.75 * 2 * 10 * 10 * cost.pair)
    assert cost.memory(2, 10, masked=True) - cost.memory(2, 10, masked=False) == 200 * (1 + 2 * 3)


@pytest.mark.parametrize(
    ("settings", "longest", "expected"),
    [
        ({}, None, "shared"),
        ({"sliding_window": 64}, 64, "shared"),
        ({"sliding_window": 64}, 65, "sliding window of 64 tokens"),
        ({"sliding_window": 64}, None, "sliding window of 64 tokens"),
        ({"attn_implementation": "eager"}, None, "shared"),
        ({"attn_implementation": "eager", "sliding_window": 64}, None, "sliding window of 64"),
        ({"attn_implementation": "flex_attention"}, None, "packed"),
        ({"attn_implementation": "flex_attention", "sliding_window": 64}, 65, "sliding window"),
        ({"attn_implementation": "flash_attention_3", "sliding_window": 64}, 65, "packed"),
        ({"attn_implementation": "sage"}, None, "attn_implementation: sage"),
        ({"layer_types": ["full_attention", "linear_attention"]}, None, "linear_attention"),
    ],
)
def test_architectures_that_may_share(model, settings, longest, expected):
    config = MistralConfig(**{**model.config.to_dict(), **settings})
    config._attn_implementation = settings.get("attn_implementation", "sdpa")
    found, why_not = possible_layouts(Carrier(config), longest, torch.device("cpu"), False)
    assert expected in why_not if not found else [layout.name for layout in found] == [expected]


class Carrier(torch.nn.Module):
    """A model as far as its config goes."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config


def test_a_window_that_is_switched_off_is_none():
    config = Qwen2Config(use_sliding_window=False, sliding_window=16)
    config._attn_implementation = "sdpa"
    (found,), _ = possible_layouts(Carrier(config), 4096, torch.device("cpu"), False)
    assert found.name == "shared"


def test_a_model_with_a_mask_of_its_own_is_left_alone(word_tokenizer):
    """GPT-Neo's layers look at 256 tokens, more than a short probe has and fewer than a long row.
    Nothing else in its config says so."""
    layers = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}
    model = random_model(word_tokenizer, "GPTNeo", **layers)
    model.config._attn_implementation = "eager"
    found, why_not = possible_layouts(model, 64, torch.device("cpu"), False)
    assert not found
    assert why_not == "the model has a mask of its own"


@given(batch=batches())
def test_eager_attention_takes_a_mask_of_numbers(batch, word_tokenizer):
    model = random_model(word_tokenizer, hidden_size=32, intermediate_size=64)
    model.config._attn_implementation = "eager"
    head = model.get_output_embeddings()
    form = additive_mask(torch.float32)
    for layout in (Shared(form, BY_TOKENS), Packed(form)):
        with torch.no_grad():
            found = sequence_logps(model, head, layout.arrange(batch))
            apart = sequence_logps(model, head, padded_rows(batch))
        torch.testing.assert_close(found, apart, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # eager attention adds what it is given: a bool mask hides nothing
        wrong = sequence_logps(model, head, Packed(boolean_mask).arrange(batch))
    if len(batch["input_ids"]) > 1 and batch["completion_mask"].sum() > 10:
        assert (wrong - apart).abs().max() > 1e-3


@pytest.mark.slow
def test_flex_attention_is_compiled_for_every_state_of_a_run(word_tokenizer, monkeypatch):
    """More often than PyTorch permits by itself, after which it computes all scores of a row.

    By PyTorch's own guards; what is compiled runs uncompiled, for speed.
    """
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend="eager"))
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    model = random_model(word_tokenizer, hidden_size=64, max_position_embeddings=1024).eval()
    model.requires_grad_(False)  # there is no backward pass on a CPU
    model.config._attn_implementation = "flex_attention"

    def run() -> None:
        for autocast, gradients, training, length in product(*[(False, True)] * 3, (20, 300, 400)):
            batch = batch_of([([6, 7], [8] * length), ([6, 7], [9, 10])])
            with torch.autocast("cpu", enabled=autocast), torch.set_grad_enabled(gradients):
                model.train(training)
                for layout in (Packed(block_mask), Padded()):
                    sequence_logps(model, model.get_output_embeddings(), layout.arrange(batch))

    torch._dynamo.reset()
    try:
        with dynamo.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
            with pytest.raises(FailOnRecompileLimitHit):
                run()
            permit_variants()
            run()
    finally:
        torch._dynamo.reset()
    # Backward passes on a GPU have a thread of their own.
    with ThreadPoolExecutor() as pool:
        assert pool.submit(lambda: dynamo.recompile_limit).result() >= VARIANTS


@pytest.mark.slow  # it is compiled
def test_flex_attention_takes_blocks(word_tokenizer):
    """Its forward pass only: on a CPU it has no backward pass."""
    batch = batch_of(
        [([6, 7, 8, 9], [10, 11]), ([6, 7, 8, 9], [13, 14, 9]), ([5], [7, 7]), ([5], [8] * 150)]
    )
    expected = Packed(boolean_mask).arrange(batch)
    inputs = Packed(block_mask).arrange(batch)
    sees = expected.attention["attention_mask"]
    blocks = inputs.attention["attention_mask"]
    width = inputs.input_ids.shape[1]
    at = torch.arange(width)
    zero = torch.zeros((), dtype=torch.int64)
    found = blocks.mask_mod(zero, zero, at[:, None], at[None, :])
    assert torch.equal(found, sees[0, 0])
    # Blocks of 128 tokens: the last sequence reaches into the second one.
    assert blocks.to_dense().shape == (1, 1, 2, 2)
    model = random_model(word_tokenizer, hidden_size=64).eval()
    model.config._attn_implementation = "flex_attention"
    with torch.no_grad():
        shared = sequence_logps(model, model.get_output_embeddings(), inputs)
        model.config._attn_implementation = "eager"
        apart = sequence_logps(model, model.get_output_embeddings(), padded_rows(batch))
    torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-4)
