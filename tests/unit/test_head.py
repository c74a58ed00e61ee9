"""Chunked log-probabilities against the full log-softmax, and what models do to their logits."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from aot_plugin.scoring import lm_head as head_module
from aot_plugin.scoring.lm_head import token_logps
from aot_plugin.scoring.logps import sequence_logps, weighted_logps_sum
from aot_plugin.scoring.model_input import padded_rows

VOCABULARY, WIDTH, TOKENS = 50, 8, 33
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


@pytest.fixture(params=[1, 7, 1000], ids=lambda tokens: f"chunks of {tokens}")
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", request.param * VOCABULARY)


def head_inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)]
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_gradients_are_those_of_log_softmax(
    weighted: bool, with_bias: bool, chunked: None
) -> None:
    hidden, weight, bias = head_inputs(torch.float32)
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    token_weights = torch.linspace(-1, 2, TOKENS) * 1e-7
    logits = torch.nn.functional.linear(hidden, weight, bias if with_bias else None)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    expected_grads = torch.autograd.grad((token_weights * expected).sum() * 3, inputs)

    args = (hidden, weight, bias if with_bias else None, targets)
    if weighted:
        total = token_logps(*args, token_weights)
    else:
        logps = token_logps(*args)
        torch.testing.assert_close(logps, expected)
        total = (token_weights * logps).sum()
    torch.testing.assert_close(total, (token_weights * expected).sum(), rtol=1e-4, atol=1e-12)
    for found, grad in zip(torch.autograd.grad(total * 3, inputs), expected_grads, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())


def test_fp16_gradients_survive_small_weights() -> None:
    """Unscaled they would lie below 6e-8, the smallest fp16 number, and vanish."""
    hidden, weight, _ = head_inputs(torch.float16)
    targets = torch.arange(TOKENS) % VOCABULARY
    total = token_logps(hidden, weight, None, targets, torch.full((TOKENS,), 1e-9))
    (grad,) = torch.autograd.grad(total * 2.0**16, hidden)
    assert (grad != 0).float().mean() > 0.9


def test_no_tokens() -> None:
    hidden, weight, bias = head_inputs()
    none = torch.zeros(0, dtype=torch.int64)
    assert token_logps(hidden[:0], weight, bias, none).shape == (0,)
    assert token_logps(hidden[:0], weight, bias, none, torch.zeros(0)).item() == 0


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SMALL))
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.05)
    return Gemma2ForCausalLM(config)  # softcapping this strong changes every log-probability


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_what_a_model_does_to_its_logits_counts(kind: str, chunked: None) -> None:
    model = tiny(kind)
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
    completion = (torch.arange(9) >= torch.tensor([[4], [6], [9]])).long()
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": completion,
    }
    logits = model(ids).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * completion[:, 1:]
    expected = tokens.sum(1)
    weights = torch.tensor([0.3, -0.2, 0.5])
    parameters = list(model.parameters())
    expected_grads = torch.autograd.grad((weights * expected).sum(), parameters)

    head = model.get_output_embeddings()
    for _ in range(2):  # the second time what the first one found out is known
        torch.testing.assert_close(sequence_logps(model, head, padded_rows(batch)), expected)
        total = weighted_logps_sum(model, head, padded_rows(batch), weights)
        for found, grad in zip(torch.autograd.grad(total, parameters), expected_grads, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-6)
    assert "forward" not in vars(head)
