"""What the benchmarks of a step train on: models, and rows with given lengths."""

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
DATA = ROOT / "example_configs" / "quickstart" / "data" / "paired_train.jsonl"
SMOLLM2 = ROOT / "outputs" / "smollm2-135m-instruct"

PROPORTIONS_7B = "proportions-7b"
SEQUENCE_LEN = 1024

SCALE = 0.5
"""Tokens of a benchmark's row in those of UltraFeedback's, so that rows fit ``SEQUENCE_LEN`` and a
step takes seconds on a CPU."""
MEANS = {"prompt": 165, "chosen": 310, "rejected": 280}
SPREADS = {"prompt": 1.0, "chosen": 0.8, "rejected": 0.8}
CORRELATION = 0.6
"""Of UltraFeedback's lengths (see ``ultrafeedback_lengths``)."""


def model_path(name: str) -> Path:
    """The folder of a model: ``PROPORTIONS_7B``, made on first use, or any other."""
    if name == PROPORTIONS_7B:
        return proportions_7b(ROOT / "outputs" / PROPORTIONS_7B)
    return Path(name)


def proportions_7b(path: Path) -> Path:
    """A random Llama in the proportions of models of 7B parameters (16M here), written once.

    Its LM head holds 5 per cent of the weights (Mistral-7B 2, Llama-3-8B 7; SmolLM2-135M 21), so
    what a step saves at the head counts as little as it does there. The vocabulary of 2,000 is
    trained on the quickstart's text; the chat template is SmolLM2's.
    """
    if path.is_dir():
        return path
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    start, end, unknown = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
    trained = ByteLevelBPETokenizer()
    # The text alone: a vocabulary trained on JSON would spend itself on names of keys.
    trained.train_from_iterator(
        _texts(), vocab_size=2000, special_tokens=[unknown, start, end], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=unknown,
        chat_template=(SMOLLM2 / "chat_template.jinja").read_text(),
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        max_position_embeddings=2 * SEQUENCE_LEN,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    whole.rename(path)
    return path


def head_share(model: Any) -> float:
    """Weights of the LM head as a share of the model's, adapters aside."""
    named = model.named_parameters()
    total = sum(parameter.numel() for name, parameter in named if "lora_" not in name)
    return model.get_output_embeddings().weight.numel() / total


def short_rows(n: int) -> list[dict[str, Any]]:
    """The quickstart's own rows."""
    return [json.loads(line) for line in DATA.read_text().splitlines()[:n]]


def long_rows(n: int) -> list[dict[str, Any]]:
    """Prompts and responses of 15 to 300 words (log-uniform), cut out of the quickstart's text."""
    rng = random.Random(0)
    stock = " ".join(_texts()).split()

    def text() -> str:
        length = round(20 * 20 ** rng.random() * 0.75)  # 0.75 words a token
        start = rng.randrange(len(stock) - length)
        return " ".join(stock[start : start + length])

    return [_row(text(), text(), text()) for _ in range(n)]


def ultrafeedback_rows(n: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Pairs of as many tokens as ``ultrafeedback_lengths`` says, cut out of the quickstart's text.

    The tokens of the chat template count as the prompt's, which is never shorter than they are.
    """
    rng = random.Random(0)
    stock = tokenizer(" ".join(_texts()), add_special_tokens=False)["input_ids"]
    system = {"role": "system", "content": "Answer."}  # shorter than the template's own
    empty = [system, {"role": "user", "content": ""}]
    template = tokenizer.apply_chat_template(empty, add_generation_prompt=True, tokenize=False)
    overhead = len(tokenizer(template, add_special_tokens=False)["input_ids"])

    def text(tokens: int) -> str:
        start = rng.randrange(len(stock) - tokens)
        return tokenizer.decode(stock[start : start + tokens])

    found = []
    for prompt, *responses in ultrafeedback_lengths(n):
        row = _row(text(max(prompt - overhead, 1)), *map(text, responses))
        found.append({**row, "messages": [system, *row["messages"]]})
    return found


def ultrafeedback_lengths(
    n: int, scale: float = SCALE, longest: int = SEQUENCE_LEN
) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected of n pairs: UltraFeedback's lengths times ``scale``.

    The means follow from what dataset cards publish (splits of 61,135 to 63,966 rows):
    HuggingFaceH4/ultrafeedback_binarized has 6,636 bytes a row with four copies of the prompt, two
    of the chosen and one of the rejected response, and 5,317 where one copy of the chosen response
    is left out; argilla/ultrafeedback-binarized-preferences has 3,199 with one copy of each. Less
    ids, roles and offsets that makes some 1,300 bytes for the chosen response, 1,150 for the
    rejected one and 670 for the prompt; at 4.1 bytes a token, which is an assumption, ``MEANS``.

    No source was found for the rest, so it is an assumption: log-normal, the standard deviations
    of the logarithms are ``SPREADS``, and the two responses to a prompt correlate by
    ``CORRELATION``.

    Each length takes the n middle quantiles of its distribution, shuffled, so that a single step of
    few pairs has all of it, its long rows too. Rows are cut to the ``longest``.
    """
    rng = random.Random(0)

    def normal() -> list[float]:
        values = [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]
        rng.shuffle(values)
        return values

    def lengths(name: str, values: list[float]) -> list[int]:
        spread = SPREADS[name]
        median = scale * MEANS[name] * math.exp(-(spread**2) / 2)
        return [max(round(median * math.exp(spread * value)), 1) for value in values]

    prompt, pair, chosen, rejected = (normal() for _ in range(4))

    def response(own: list[float]) -> list[float]:
        common, rest = math.sqrt(CORRELATION), math.sqrt(1 - CORRELATION)
        return [common * a + rest * b for a, b in zip(pair, own, strict=True)]

    margin = 32  # end of turn, and tokens that text gains when it is encoded again
    prompts = [min(length, longest // 2) for length in lengths("prompt", prompt)]
    columns = [lengths("chosen", response(chosen)), lengths("rejected", response(rejected))]
    return [
        (p, *(min(length, longest - p - margin) for length in both))
        for p, *both in zip(prompts, *columns, strict=True)
    ]


ROWS: dict[str, Callable[[int, Any], list[dict[str, Any]]]] = {
    "short": lambda n, tokenizer: short_rows(n),
    "long": lambda n, tokenizer: long_rows(n),
    "ultrafeedback": ultrafeedback_rows,
}


def _texts() -> list[str]:
    rows = short_rows(10**6)
    return [row[side]["content"] for row in rows for side in ("chosen", "rejected")]


def _row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": prompt}],
        "chosen": {"role": "assistant", "content": chosen},
        "rejected": {"role": "assistant", "content": rejected},
    }
