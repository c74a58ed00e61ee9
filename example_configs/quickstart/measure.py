"""Measure what the quickstart's training did: sentiment of new answers to the held-out prompts.

Samples answers from the base model and from the trained adapter, scores them by the rule that
ranked the training data, and prints both means with the trainer's own held-out dominance numbers.

    python example_configs/quickstart/measure.py outputs/quickstart
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from peft import PeftConfig, PeftModel
from prompts import make_prompts
from sampling import load, sample_responses, sentiment

from aot_plugin.ot.dominance import dominance_statistics

SEED = 7
RESPONSES_PER_PROMPT = 4
EVAL_KEYS = ("violation_fraction", "violation_amount", "dominance_amount")


def eval_log(output_dir: Path) -> list[dict]:
    """Return the trainer's evaluations, first to last, from the newest checkpoint's log."""
    states = sorted(
        output_dir.glob("checkpoint-*/trainer_state.json"),
        key=lambda path: int(re.sub(r"\D", "", path.parent.name)),
    )
    if not states:
        raise SystemExit(f"measure: no checkpoint-*/trainer_state.json in {output_dir}")
    history = json.loads(states[-1].read_text("utf-8"))["log_history"]
    return [entry for entry in history if "eval_loss" in entry]


def paired_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Return the mean change and its standard error, for scores of shape [prompts, samples].

    The prompt is the unit: several answers to one prompt aren't independent.
    """
    change = after.mean(axis=1) - before.mean(axis=1)
    return float(change.mean()), float(change.std(ddof=1) / np.sqrt(len(change)))


def measure(output_dir: Path) -> dict:
    """Sample before and after, and return everything that the table shows."""
    evaluations = eval_log(output_dir)
    base = Path(PeftConfig.from_pretrained(output_dir).base_model_name_or_path)
    model, tokenizer = load(base)
    prompts = make_prompts().heldout
    scores, lengths = {}, {}
    for name in ("before", "after"):
        if name == "after":
            model = PeftModel.from_pretrained(model, output_dir).merge_and_unload()
        answers = sample_responses(model, tokenizer, prompts, RESPONSES_PER_PROMPT, SEED, name)
        scores[name] = np.array([[sentiment(text) for text in texts] for texts in answers])
        lengths[name] = np.mean([len(text.split()) for texts in answers for text in texts])
    change, error = paired_difference(scores["before"], scores["after"])
    dominance = dominance_statistics(scores["after"].ravel(), scores["before"].ravel())
    return {
        "prompts": len(prompts),
        "responses_per_prompt": RESPONSES_PER_PROMPT,
        "seed": SEED,
        "sentiment": {name: float(values.mean()) for name, values in scores.items()},
        "sentiment_change": change,
        "sentiment_change_standard_error": error,
        "words": {name: float(value) for name, value in lengths.items()},
        "sentiment_after_over_before": {key: dominance[key] for key in EVAL_KEYS},
        "heldout_evaluations": [
            {
                "step": entry["step"],
                **{key: float(entry[f"eval_aot/{key}"]) for key in EVAL_KEYS},
            }
            for entry in evaluations
        ],
    }


def table(result: dict) -> str:
    """Return the result as a few lines of text."""
    means, words = result["sentiment"], result["words"]
    over = result["sentiment_after_over_before"]
    lines = [
        f"New answers to {result['prompts']} held-out prompts, "
        f"{result['responses_per_prompt']} each",
        f"{'':36}{'before':>10}{'after':>10}",
        f"{'mean VADER sentiment':36}{means['before']:10.3f}{means['after']:10.3f}",
        f"{'mean length in words':36}{words['before']:10.1f}{words['after']:10.1f}",
        f"change of sentiment {result['sentiment_change']:+.3f}, "
        f"standard error {result['sentiment_change_standard_error']:.3f} (paired over prompts)",
        "sentiment after falls below sentiment before at "
        f"{over['violation_fraction']:.1%} of the quantile levels",
        "",
        "Held-out dominance by the trainer's evaluations, in nats (all 0 before the first step)",
        f"{'step':>6}{'violation_fraction':>20}{'violation_amount':>20}{'dominance_amount':>20}",
    ]
    for row in result["heldout_evaluations"]:
        lines.append(f"{row['step']:6}" + "".join(f"{row[key]:20.4f}" for key in EVAL_KEYS))
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=Path, help="the training's output_dir")
    output_dir = parser.parse_args().output_dir
    result = measure(output_dir)
    print(table(result))
    (output_dir / "quickstart_result.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
