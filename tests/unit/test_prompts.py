"""A prompt encoded once for its completions: the numbers are those of separate rows."""

import pytest
import torch
from harness import random_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM, MistralConfig, Qwen2Config

from aot_plugin.logps import sequence_logps, sharing_is_exact, weighted_logps_sum
from aot_plugin.prompts import SEQUENCE_KEY, may_share_prompts, probe, share_prompts
from aot_plugin.sequences import Sequences

TOKENS = st.integers(6, 20)


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
        logps = sequence_logps(model, head, batch, share)
        (weights * logps).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        weighted_logps_sum(model, head, batch, weights.float(), share).backward()
        fused = [p.grad.clone() for p in model.parameters()]
        found[share] = (logps.detach(), gradients, fused)
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-5)
    for kind in (1, 2):
        for shared, apart in zip(found[True][kind], found[False][kind], strict=True):
            torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-5)


def test_a_pair_takes_one_row_and_the_prompt_once():
    prompt, chosen, rejected = [6, 7, 8, 9], [10, 11, 12], [13, 14]
    shared = share_prompts(batch_of([(prompt, chosen), (prompt, rejected)]))
    assert shared["input_ids"].tolist() == [[6, 7, 8, 9, 10, 11, 12, 9, 13, 14]]
    assert shared["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 3, 4, 5]]
    assert shared["completion_mask"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 1, 1]]
    marked = shared["completion_mask"].bool()
    assert shared[SEQUENCE_KEY][marked].tolist() == [0, 0, 0, 1, 1]
    sees = shared["attention_mask"][0, 0]
    assert sees[9].nonzero()[:, 0].tolist() == [0, 1, 2, 7, 8, 9]
    assert sees[6].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_batch_that_would_grow_is_left_alone():
    """Rows of one prompt each, and a short prompt whose completions are longer in one row."""
    apart = batch_of([([6, 7], [8, 9]), ([6, 8], [8, 9])])
    assert share_prompts(apart) is apart
    short = batch_of([([6], [8, 9]), ([6], [9, 8])])
    assert share_prompts(short) is short


@given(batch=batches())
def test_rows_of_a_prompt_stand_side_by_side(batch):
    sequences = Sequences.from_batches([batch])
    order = [row for _, rows in sequences.by_prompt() for row in rows]
    assert sorted(order) == list(range(len(sequences)))
    prompts = []
    for row in order:
        ids, mask = sequences.input_ids[row], sequences.completion_mask[row]
        prompts.append(ids[: int(mask.argmax()) if mask.any() else len(ids)].tolist())
    for row, prompt in enumerate(prompts):
        if prompt:
            first = prompts.index(prompt)
            assert all(other == prompt for other in prompts[first : row + 1])


class Untold(torch.nn.Module):
    """A model that does not do what it is told: it drops one of the arguments."""

    def __init__(self, model: torch.nn.Module, ignores: str) -> None:
        super().__init__()
        self.model, self.ignores = model, ignores

    def forward(self, **inputs):
        if self.ignores == "mask" and inputs["attention_mask"].ndim == 4:
            inputs["attention_mask"] = inputs["attention_mask"].any(dim=2)[:, 0].long()
        if self.ignores == "positions":
            inputs.pop("position_ids", None)
        return self.model(**inputs)


@pytest.mark.parametrize("ignores", [None, "mask", "positions"])
def test_a_model_is_asked_before_it_is_trusted(model, ignores):
    head, vocabulary = model.get_output_embeddings(), model.config.vocab_size
    told = sharing_is_exact(Untold(model, ignores), head, vocabulary, torch.device("cpu"))
    assert told is (ignores is None)


def test_the_probe_is_shared():
    assert SEQUENCE_KEY in share_prompts(probe(1000))


@pytest.mark.parametrize(
    ("settings", "longest", "expected"),
    [
        ({}, None, True),
        ({"sliding_window": 64}, 64, True),
        ({"sliding_window": 64}, 65, False),
        ({"sliding_window": 64}, None, False),
        ({"attn_implementation": "eager"}, None, False),
    ],
)
def test_architectures_that_may_share(model, settings, longest, expected):
    config = MistralConfig(**{**model.config.to_dict(), **settings})
    config._attn_implementation = settings.get("attn_implementation", "sdpa")

    class Carrier:
        pass

    carrier = Carrier()
    carrier.config = config
    assert may_share_prompts(carrier, longest) is expected


def test_a_window_that_is_switched_off_is_none():
    class Carrier:
        config = Qwen2Config(use_sliding_window=False, sliding_window=16)

    Carrier.config._attn_implementation = "sdpa"
    assert may_share_prompts(Carrier(), 4096)
