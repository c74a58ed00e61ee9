"""Models that do not give a sequence the same log-probabilities wherever it stands."""

from typing import Any

import pytest
import torch
from harness import random_model
from torch import nn

from aot_plugin.scoring.cost import Cost
from aot_plugin.scoring.layout import Shared
from aot_plugin.scoring.masks import boolean_mask
from aot_plugin.scoring.probe import MEDIAN, Found, probe, probed_length
from aot_plugin.scoring.settle import settle_layout

CPU = torch.device("cpu")
LENGTH = 128
SHARED = Shared(boolean_mask, Cost(pair=0.0, token=1.0, mask=0.0))


class Few(nn.Module):
    """A layer whose output at every fifth token depends on how wide the row is, as that of sparse
    attention does where scores are equal."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = self.inner(hidden)
        found[:, ::5] += 4.0 * hidden.shape[1] / LENGTH
        return found


class Untold(nn.Module):
    """A model that does not do what it is told, or looks at who is there."""

    def __init__(self, model: nn.Module, fault: str | None) -> None:
        super().__init__()
        self.model, self.fault = model, fault

    def forward(self, **inputs: Any) -> Any:
        shared = inputs["attention_mask"].ndim == 4
        if self.fault == "mask" and shared:
            inputs["attention_mask"] = inputs["attention_mask"].any(dim=2)[:, 0].long()
        if self.fault == "positions":
            inputs.pop("position_ids", None)
        if self.fault == "raises" and shared:
            raise ValueError("a mask of two dimensions, please")
        if self.fault == "longest":
            width = inputs["input_ids"].shape[1]
            scale = 1.0 if width < LENGTH else 8.0
            positions = inputs.pop("position_ids", torch.arange(width)[None])
            inputs["position_ids"] = (positions * scale).long()
        return self.model(**inputs)


@pytest.fixture(scope="module")
def model(word_tokenizer: Any) -> Any:
    return random_model(word_tokenizer, max_position_embeddings=512).eval()


def found(model: Any, fault: str | None, dtype: torch.dtype) -> Found:
    own = model.to(dtype)
    try:
        return probe(Untold(own, fault), own, LENGTH, CPU, [SHARED])
    finally:
        model.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [None, "mask", "positions"])
def test_a_model_is_asked_before_prompts_are_shared(model, fault, dtype):
    why = found(model, fault, dtype).why_not()[0]
    assert (why is None) if fault is None else "other log-probabilities" in why


@pytest.mark.parametrize("fault", ["mask", "positions"])
def test_a_weak_fault_is_no_rounding_in_bf16(word_tokenizer, fault):
    """A model that hardly looks at its context: the fault makes hundredths of a nat a token, which
    add up over a sequence."""
    weak = random_model(word_tokenizer, scale=1.5, max_position_embeddings=512).eval()
    seen = found(weak, fault, torch.bfloat16)
    assert seen.trials[0].difference.found[MEDIAN] < 0.1  # nats, the tolerance of old
    assert seen.why_not()[0] is not None
    assert found(weak, None, torch.bfloat16).why_not() == [None]


def test_an_exception_means_apart(model):
    why = found(model, "raises", torch.float32).why_not()[0]
    assert why == "the probe raised ValueError: a mask of two dimensions, please"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [None, "longest"])
def test_a_row_that_depends_on_its_company(model, fault, dtype):
    assert found(model, fault, dtype).depends_on_company is (fault is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_tokens_that_depend_on_their_company(word_tokenizer, dtype):
    model = random_model(word_tokenizer, max_position_embeddings=512).eval()
    model.model.norm = Few(model.model.norm)
    seen = found(model, None, dtype)
    assert seen.company.found[MEDIAN] <= seen.company.rounding[MEDIAN]
    assert seen.depends_on_company


def test_noise_of_the_size_of_rounding_hides_no_dependence(word_tokenizer):
    """Kernels that add in any order do not give the same bits twice."""

    class Noisy(Untold):
        def forward(self, **inputs: Any) -> Any:
            result = super().forward(**inputs)
            return type(result)(logits=result.logits * (1 + 1e-7 * torch.randn(1)))

    model = random_model(word_tokenizer, max_position_embeddings=512).eval()
    for fault in (None, "longest"):
        seen = probe(Noisy(model, fault), model, LENGTH, CPU, [SHARED])
        assert not seen.random
        assert seen.depends_on_company is (fault is not None)


@pytest.mark.parametrize(
    ("keys", "longest", "expected"),
    [
        ({}, 4096, 1024),
        ({"sliding_window": 2048}, 4096, 4096),
        ({"sliding_window": 2048}, 1500, 1024),
        ({"sliding_window": 2048}, None, 1024),
    ],
)
def test_a_probe_is_as_long_as_what_the_config_names(keys, longest, expected):
    from transformers import MistralConfig

    config = MistralConfig(**{"sliding_window": None} | keys)
    assert probed_length(config, longest) == expected


def test_a_random_model_is_told_from_one_that_looks_aside(word_tokenizer):
    model = random_model(word_tokenizer, attention_dropout=0.1, max_position_embeddings=512).train()
    seen = probe(model, model, LENGTH, CPU, [SHARED])
    assert seen.random
    assert not seen.depends_on_company
    assert seen.why_not() == ["the model's forward pass is random"]


def test_a_model_of_nan_is_left_to_the_step(word_tokenizer):
    """Whose error says what it is, and on every rank."""
    model = random_model(word_tokenizer, max_position_embeddings=512).eval()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert not probe(model, model, LENGTH, CPU, [SHARED]).depends_on_company


def test_the_runs_random_numbers_stay_what_they_are(model):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    probe(model, model, LENGTH, CPU, [SHARED])
    assert torch.equal(torch.rand(3), expected)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "positions", "longest", "refused"),
    [
        (LONGROPE, 256, 65, "`rope_type: longrope`.*longer than 64 tokens.*`sequence_len: 64`"),
        (LONGROPE, 256, None, "`sequence_len: 64`"),
        (LONGROPE, 256, 64, None),
        (LONGROPE | {"short_factor": [4.0] * 8}, 256, 128, None),
        (DYNAMIC, 64, 65, "`rope_type: dynamic`.*`sequence_len: 64`"),
        (DYNAMIC, 64, 64, None),
    ],
)
def test_rope_of_the_longest_row(word_tokenizer, rope, positions, longest, refused):
    model = random_model(
        word_tokenizer,
        "Phi3" if rope["rope_type"] == "longrope" else "Llama",
        rope_parameters=dict(rope),
        max_position_embeddings=positions,
        original_max_position_embeddings=64,
    ).eval()

    def settle(regrouped: bool) -> Any:
        return settle_layout(model, model, longest, CPU, checkpointing=False, regrouped=regrouped)

    if refused is None:
        settle(regrouped=True)
        return
    with pytest.raises(ValueError, match=refused):
        settle(regrouped=True)
    settle(regrouped=False)
    if positions > 128:  # the model, asked about rows of that length, says the same
        assert probe(model, model, 128, CPU, []).depends_on_company
