"""Sampling and scoring, the same for the quickstart's data and for its measurement."""

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError:
    raise SystemExit("the sentiment rule is missing: pip install vaderSentiment") from None

MAX_NEW_TOKENS = 48
PROMPTS_PER_BATCH = 16
_SENTENCE = re.compile(r".*[.!?][\"')\]]*(?=\s|$)", re.DOTALL)


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """Return VADER's compound sentiment in [-1, 1]: a fixed rule of word lists, no model."""
    return _analyzer().polarity_scores(text)["compound"]


def whole_sentences(text: str) -> str:
    """Cut a response that hit the token limit back to its last whole sentence, if it has one.

    Otherwise the training rows would teach the model to stop in the middle of a sentence.
    """
    found = _SENTENCE.match(text)
    return (found.group() if found else text).strip()


def load(
    directory: Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model (bf16 is faster on a CPU, too) and a tokenizer that pads left."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(directory, padding_side="left")


@torch.inference_mode()
def sample_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    per_prompt: int,
    seed: int,
    title: str,
    prompts_per_batch: int = PROMPTS_PER_BATCH,
) -> Iterator[tuple[torch.Tensor, int]]:
    """Sample ``per_prompt`` responses of each prompt from the model's own distribution.

    Yields, for some prompts at a time and in their order, token ids [responses, width] padded on
    both sides, and how many of a row's ids come before its response.
    """
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    torch.manual_seed(seed)
    with tqdm(total=len(prompts) * per_prompt, desc=title, unit="response") as bar:
        for start in range(0, len(chats), prompts_per_batch):
            batch = tokenizer(
                chats[start : start + prompts_per_batch],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            ).to(model.device)
            output = model.generate(
                **batch,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=per_prompt,
            )
            yield output, batch["input_ids"].shape[1]
            bar.update(len(output))


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    per_prompt: int,
    seed: int,
    title: str,
    prompts_per_batch: int = PROMPTS_PER_BATCH,
) -> list[list[str]]:
    """The texts of ``sample_tokens``, cut to whole sentences: one list per prompt."""
    responses: list[str] = []
    for ids, start in sample_tokens(
        model, tokenizer, prompts, per_prompt, seed, title, prompts_per_batch
    ):
        texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        responses += map(whole_sentences, texts)
    return [responses[i : i + per_prompt] for i in range(0, len(responses), per_prompt)]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def read_jsonl(path: Path) -> list[dict]:
    """Read one JSON object a line."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
