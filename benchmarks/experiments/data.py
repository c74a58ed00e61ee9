"""Make the data sets of the experiments: one command, with fixed seeds.

    python benchmarks/experiments/data.py
    python benchmarks/experiments/data.py --model student

They go to outputs/experiments/data, those of the second model to outputs/experiments/student/data.
Sources are the quickstart's rows, lists of words, and responses sampled from the model:
``PER_PROMPT`` to each of the quickstart's training prompts, and the rows of the sweep `theorem`.
The first model's responses are kept in benchmarks/experiments/data (another machine would sample
other text); the second one gets rows like the quickstart's from its own samples, too. Where labels
are trained, there is also the same file as text (`*_text`): the host's KTO strategies know no chat
template.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "example_configs" / "quickstart"))

from make_data import RESPONSES_PER_PROMPT, paired_rows, unpaired_rows
from model import FIRST_MODEL, MODELS, Model
from prompts import TASKS, make_prompts
from rules import MORE_TASKS, RULES, Rule, short_prompts, subjects
from sampling import read_jsonl, sample_responses, sentiment, write_jsonl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

HERE = Path(__file__).parent
KEPT = HERE / "data" / "responses.jsonl"

SEED = 19
PER_PROMPT = 12
PER_BATCH = 384

# Sweeps `shares` and `flips`: as many rows as every share allows, at most these (the quickstart has
# 429 true and 607 false ones).
ROWS = 600
SHARES = (0.5, 0.2, 0.05)
FLIPS = (0.1, 0.3)

# Sweep `short`. One to three tokens each, without the one that ends the turn.
GOOD = "Good Great Nice Lovely Excellent Happy Fun Warm Perfect Amazing Impressive Useful".split()
BAD = "Bad Terrible Horrible Boring Ugly Poor Sad Dull Cold Stressful Useless Unpleasant".split()

# Sweep `theorem`: rows are independent draws from all combinations of subjects and tasks.
SIZES = tuple(2**k for k in range(6, 14))
SEEDS = (1, 2, 3, 4, 5)
THEOREM_HELD_OUT = 2048
POSITIVE_ABOVE = 0.4

Row = dict[str, Any]


def row(prompt: str, **values: Any) -> Row:
    return {"messages": [{"role": "user", "content": prompt}], **values}


def pair(prompt: str, chosen: str, rejected: str) -> Row:
    answers = {"chosen": chosen, "rejected": rejected}
    return row(prompt, **{k: {"role": "assistant", "content": v} for k, v in answers.items()})


def as_text(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Labelled rows with their chat template rendered."""
    return [
        {
            "prompt": tokenizer.apply_chat_template(
                found["messages"], tokenize=False, add_generation_prompt=True
            ),
            "completion": found["completion"] + tokenizer.eos_token,
            "label": found["label"],
        }
        for found in rows
    ]


def labels(labelled: list[Row]) -> dict[str, list[Row]]:
    """Shares of positives, and flipped labels at share 0.5; the quickstart's labelled rows.

    The rows of a smaller share of positives are among those of a larger one. `share_0.2_repeated`
    has the positives of 0.2 four times, so that both labels have as many rows. As many positives as
    negatives are flipped, so that the share stays.
    """
    rng = random.Random(SEED)
    sides = {
        side: [found for found in labelled if found["label"] is side] for side in (True, False)
    }
    for rows in sides.values():
        rng.shuffle(rows)
    found = {}
    allowed = (int(len(sides[True]) / max(SHARES)), int(len(sides[False]) / (1 - min(SHARES))))
    count = min(ROWS, *allowed) // 2 * 2
    for share in SHARES:
        positives = round(share * count)
        found[f"share_{share}"] = sides[True][:positives] + sides[False][: count - positives]
    few = found["share_0.2"]
    found["share_0.2_repeated"] = few + 3 * [each for each in few if each["label"]]
    for flip in FLIPS:
        flipped = round(flip * count / 2)
        found[f"flip_{flip}"] = [
            {**each, "label": each["label"] is not (index < flipped)}
            for side in (True, False)
            for index, each in enumerate(sides[side][: count // 2])
        ]
    return found


def short_answers() -> dict[str, list[Row]]:
    """Pairs of one word each: many words, and the same two in every row (`ties`)."""
    rng = random.Random(SEED)
    prompts = short_prompts(heldout=False)
    return {
        "short": [pair(prompt, rng.choice(GOOD), rng.choice(BAD)) for prompt in prompts],
        "ties": [pair(prompt, "Good", "Bad") for prompt in prompts],
    }


def best_and_worst(responses: dict[str, list[str]], rule: Rule) -> list[Row]:
    """A prompt's best response by the rule against its worst, if they are far enough apart."""
    rows = []
    for prompt, texts in responses.items():
        worst, *_, best = sorted(texts, key=rule.score)
        if rule.score(best) - rule.score(worst) >= rule.min_gap:
            rows.append(pair(prompt, best, worst))
    return rows


def top_and_bottom(responses: dict[str, list[str]], rule: Rule) -> list[Row]:
    """The third of all responses with the highest scores, and that with the lowest."""
    rows = [row(prompt, completion=text) for prompt, texts in responses.items() for text in texts]
    scores = [rule.score(found["completion"]) for found in rows]
    low, high = statistics.quantiles(scores, n=3)
    return [
        {**found, "label": score > high}
        for found, score in zip(rows, scores, strict=True)
        if score > high or score < low
    ]


def equal_lengths(responses: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Of a prompt's responses, the two of equal length in tokens whose sentiment differs most."""
    rows = []
    for prompt, texts in responses.items():
        by_length: dict[int, list[str]] = {}
        for text in texts:
            length = len(tokenizer(text, add_special_tokens=False).input_ids)
            by_length.setdefault(length, []).append(text)
        gap, best, worst = max(
            (sentiment(high) - sentiment(low), high, low)
            for same in by_length.values()
            for high in same
            for low in same
        )
        if gap >= RULES["sentiment"].min_gap:
            rows.append(pair(prompt, best, worst))
    return rows


def ratings(responses: dict[str, list[str]]) -> dict[str, list[Row]]:
    """All responses with their score, and the clear ones with a label (the quickstart's rule)."""
    rows = [
        row(prompt, completion=text, label=sentiment(text))
        for prompt, texts in responses.items()
        for text in texts
    ]
    clear = [found for found in rows if found["label"] > 0.7 or found["label"] < 0.2]
    return {
        "ratings": rows,
        "clear": [{**found, "label": found["label"] > 0.7} for found in clear],
    }


def theorem(rows: list[Row]) -> dict[str, list[Row]]:
    """A held-out set, and of the other rows a random subset of every size and seed."""
    heldout, rest = rows[:THEOREM_HELD_OUT], rows[THEOREM_HELD_OUT:]
    found = {"theorem_heldout": heldout}
    for size in SIZES:
        for seed in SEEDS if size <= len(rest) else ():
            rng = random.Random(f"{SEED} {size} {seed}")
            found[f"theorem_{size}_{seed}"] = rng.sample(rest, size)
    return found


def sampled_responses(model: Model) -> dict[str, list[str]]:
    """The responses to the quickstart's training prompts; sampled if they are not kept."""
    prompts = make_prompts().train
    if model.name == FIRST_MODEL and KEPT.exists():
        texts = [row["responses"] for row in read_jsonl(KEPT)]
    else:
        texts = sample_responses(
            *model.load(), prompts, PER_PROMPT, SEED, "responses", PER_BATCH // PER_PROMPT
        )
    found = dict(zip(prompts, texts, strict=True))
    if model.name == FIRST_MODEL:
        KEPT.parent.mkdir(exist_ok=True)
        write_jsonl(KEPT, ({"prompt": prompt, "responses": found[prompt]} for prompt in found))
    # The loader would drop an empty one.
    return {prompt: list(filter(None, each)) for prompt, each in found.items()}


def quickstart_rows(model: Model) -> dict[str, list[Row]]:
    """Rows like the quickstart's, from the model's own samples."""
    prompts = make_prompts().train
    n = RESPONSES_PER_PROMPT
    texts = sample_responses(*model.load(), prompts, n, SEED + 1, "quickstart", PER_BATCH // n)
    found = {
        "paired_train": paired_rows(prompts, texts),
        "unpaired_train": unpaired_rows(prompts, texts),
    }
    for rows in found.values():
        random.Random(SEED).shuffle(rows)
    return found


def sampled_rows(model: Model, count: int) -> list[Row]:
    """Independent draws of a prompt and a response, labelled by a threshold."""
    every = [task.format(name) for name in subjects(heldout=False) for task in TASKS + MORE_TASKS]
    drawn = random.Random(SEED).choices(every, k=count)
    texts = sample_responses(*model.load(), drawn, 1, SEED, "theorem", PER_BATCH)
    return [
        row(prompt, completion=text, label=sentiment(text) > POSITIVE_ABOVE)
        for prompt, (text,) in zip(drawn, texts, strict=True)
        if text
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--theorem", type=int, default=10_400, metavar="ROWS", help="rows to sample; 0: none"
    )
    parser.add_argument("--model", choices=MODELS, default=FIRST_MODEL)
    args = parser.parse_args()
    model = Model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(model.base()["base_model"])
    responses = sampled_responses(model)
    own = quickstart_rows(model) if model.name != FIRST_MODEL else {}
    labelled = labels(
        own.get("unpaired_train") or read_jsonl(model.quickstart / "unpaired_train.jsonl")
    )
    for name in ("letters", "articles"):
        labelled[f"unpaired_{name}"] = top_and_bottom(responses, RULES[name])
    paired = {name: best_and_worst(responses, rule) for name, rule in RULES.items()}
    files = {
        **own,
        **labelled,
        **{f"{name}_text": as_text(rows, tokenizer) for name, rows in labelled.items()},
        **{f"paired_{name}": rows for name, rows in paired.items()},
        **short_answers(),
        "equal_lengths": equal_lengths(responses, tokenizer),
        **ratings(responses),
        **(theorem(sampled_rows(model, args.theorem)) if args.theorem else {}),
    }
    model.data.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_jsonl(model.data / f"{name}.jsonl", rows)
        print(name, len(rows), "rows")


if __name__ == "__main__":
    main()
