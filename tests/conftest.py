"""Real, small inputs that all tests share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tensors here are tiny: a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("cuts")

# A busy machine is slow, not wrong.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _saved_in_process() -> Iterator[None]:
    from harness import saved_in_process

    with saved_in_process():
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, dequantized once by the quickstart's own script."""
    sys.path.insert(0, str(ROOT / "example_configs" / "quickstart"))
    from prepare_model import prepare_model

    path = ROOT / "outputs" / "smollm2-135m-instruct"
    prepare_model(path)
    return path


@pytest.fixture(scope="session")
def tiny_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random Llama with SmolLM2's chat template and a small tokenizer of its kind."""
    from harness import WORDS, random_model
    from transformers import AutoTokenizer

    # SmolLM2's own 49,152 tokens take longer to load, five times a run, than a run takes to train.
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    corpus = [tokenizer.chat_template, *(f"{w}, {w}. user assistant system" for w in WORDS)] * 10
    tokenizer = tokenizer.train_new_from_iterator(corpus, 1024)
    model = random_model(tokenizer, max_position_embeddings=512, tie_word_embeddings=True)
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ ' </s>' }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    import harness

    roles = ["<|user|>", "<|assistant|>"]
    return harness.word_tokenizer(TEMPLATE, [], roles, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tiny_llama(word_tokenizer: Any) -> Any:
    import harness

    return harness.random_model(
        word_tokenizer,
        hidden_size=32,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
