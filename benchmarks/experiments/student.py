"""Make the second model of the experiments: a small one that learns from the first one's samples.

    python benchmarks/experiments/student.py --workers 2

1. Responses are sampled from SmolLM2: three to each combination of a training subject and half of
   the tasks (a chunk that has its file is not repeated). Those of data.py are added: the student is
   aligned on samples of its own.
2. A byte-level BPE tokenizer is trained on them, with SmolLM2's chat markup but without its system
   prompt.
3. `axolotl train benchmarks/experiments/models/student_sft.yml` trains a Llama of random weights on
   their tokens; the epoch with the lowest loss on held-out responses is kept.
"""

import argparse
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "example_configs" / "quickstart"))

import torch
from data import KEPT
from model import ROOT, Model
from prompts import TASKS
from rules import MORE_TASKS, subjects
from sampling import read_jsonl, sample_responses, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUTPUT = Model("student").outputs
CONFIG = Path(__file__).parent / "models" / "student_sft.yml"
CHUNK = 256
"""Prompts per file."""
PER_PROMPT, AT_ONCE = 3, 64
SEED = 1000
"""Plus the chunk's number."""
HELD_OUT = 16
"""One of so many prompts is held out."""

VOCABULARY = 3072
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
}


def chunks() -> list[tuple[Path, list[str]]]:
    """Files of the corpus, with their prompts: two tasks, with every subject."""
    every = [task.format(name) for task in TASKS + MORE_TASKS for name in subjects(heldout=False)]
    return [
        (OUTPUT / "corpus" / f"{place // CHUNK:02}.jsonl", every[place : place + CHUNK])
        for place in range(0, len(every), 2 * CHUNK)
    ]


def sample(part: int, parts: int) -> None:
    """Sample the chunks of one worker that have no file yet."""
    torch.set_num_threads(1)
    model, tokenizer = Model().load()
    for file, prompts in chunks()[part::parts]:
        if file.exists():
            continue
        seed = SEED + int(file.stem)
        texts = sample_responses(model, tokenizer, prompts, PER_PROMPT, seed, file.stem, AT_ONCE)
        found = zip(prompts, texts, strict=True)
        partial = file.with_suffix(".partial")
        write_jsonl(partial, ({"prompt": prompt, "responses": each} for prompt, each in found))
        partial.rename(file)


def corpus() -> list[dict]:
    return [row for file in (KEPT, *(file for file, _ in chunks())) for row in read_jsonl(file)]


def conversations(rows: list[dict]) -> Iterator[dict]:
    """Rows for the host's SFT, one per response."""
    for row in rows:
        for text in filter(None, row["responses"]):
            roles = ("user", row["prompt"]), ("assistant", text)
            yield {"messages": [{"role": role, "content": content} for role, content in roles]}


def train_tokenizer(rows: list[dict]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for row in rows for text in (row["prompt"], *row["responses"]))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


def make_initial_model(rows: list[dict], directory: Path) -> None:
    """Tokenizer and random weights."""
    tokenizer = train_tokenizer(rows)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
        **SIZES,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="processes that sample")
    workers = parser.parse_args().workers
    (OUTPUT / "corpus").mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(sample, [(part, workers) for part in range(workers)])
    rows = corpus()
    make_initial_model(rows, OUTPUT / "initial")
    write_jsonl(OUTPUT / "heldout.jsonl", conversations(rows[::HELD_OUT]))
    rest = [row for place, row in enumerate(rows) if place % HELD_OUT]
    write_jsonl(OUTPUT / "train.jsonl", conversations(rest))
    # The host would take rows that it prepared from an earlier corpus: it tells them by paths.
    shutil.rmtree(OUTPUT / "prepared", ignore_errors=True)
    subprocess.run(["axolotl", "train", str(CONFIG)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
