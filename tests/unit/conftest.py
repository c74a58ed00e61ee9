"""A model small enough for unit tests, with a tokenizer of a few words."""

import harness
import pytest
from hypothesis import HealthCheck, settings
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# A busy machine is slow, not wrong.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ ' </s>' }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    roles = ["<|user|>", "<|assistant|>"]
    return harness.word_tokenizer(TEMPLATE, [], roles, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tiny_llama(word_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return harness.random_model(
        word_tokenizer,
        hidden_size=32,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
