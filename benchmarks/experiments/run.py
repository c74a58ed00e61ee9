"""The paper's experiments, scaled to a CPU: train every config of a sweep, sample, and measure.

The sweeps are the host's (`axolotl train base.yml --sweep methods.yml` trains the same configs);
this script adds what comes after training. Responses to held-out prompts are sampled from the
trained model and scored by the rule that ranked the training data (VADER, in [-1, 1]). The
divergence KL(policy | reference), in nats per response, is the mean of log pi - log pi_ref on them.
A line per run goes into results/SWEEP.jsonl; a run that has its line is not repeated.

    python benchmarks/experiments/run.py methods
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2] / "example_configs" / "quickstart"))
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import yaml
from peft import PeftModel
from prompts import make_prompts
from sampling import load, read_jsonl, sample_responses, sentiment, write_jsonl

from aot_plugin.logps import sequence_logps

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUICKSTART = ROOT / "example_configs" / "quickstart"
OUTPUTS = ROOT / "outputs" / "experiments"
RESULTS = HERE / "results"
SAMPLING_SEED = 7
SWEEPS = ("methods", "batch", "beta", "learning_rate", "steps")


def configs(sweep: str) -> list[dict[str, Any]]:
    """The host's expansion of a sweep."""
    from axolotl.cli.utils.sweeps import generate_sweep_configs

    base, space = (yaml.safe_load((HERE / f"{name}.yml").read_text()) for name in ("base", sweep))
    found = generate_sweep_configs(base, space)
    # Seed by seed, so that a table that was broken off compares all methods all the same.
    found.sort(key=lambda cfg: -cfg["seed"])
    return [{key: value for key, value in cfg.items() if value is not None} for cfg in found]


def render_kto_rows(model: Path) -> None:
    """The unpaired rows as text: the host's KTO strategies know no chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = read_jsonl(QUICKSTART / "data" / "unpaired_train.jsonl")
    for row in rows:
        row["prompt"] = tokenizer.apply_chat_template(
            row.pop("messages"), tokenize=False, add_generation_prompt=True
        )
        row["completion"] += tokenizer.eos_token
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    write_jsonl(OUTPUTS / "kto_rows.jsonl", rows)


def train(cfg: dict[str, Any], name: str) -> None:
    """Train by the function of the host's command."""
    import transformers.training_args
    from axolotl.cli.train import do_cli

    output = OUTPUTS / name
    path = OUTPUTS / f"{name}.yml"
    cfg = {**cfg, "output_dir": str(output), "dataset_prepared_path": str(OUTPUTS / "prepared")}
    path.write_text(yaml.safe_dump(cfg))
    # transformers asks for a GPU before it allows bf16, and the host has no key for `use_cpu`.
    bf16 = mock.patch.object(
        transformers.training_args, "is_torch_bf16_gpu_available", lambda: True
    )
    with mock.patch.object(sys, "argv", ["train"]), bf16:
        do_cli(config=str(path))


@torch.no_grad()
def divergence(model: Any, reference: Any, tokenizer: Any, prompts: list[str], texts: Any) -> Any:
    """[responses] log pi - log pi_ref, in nats."""
    ratios = []
    for prompt, answers in zip(prompts, texts, strict=True):
        head = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        rows = [tokenizer(a, add_special_tokens=False).input_ids for a in answers]
        width = len(head) + max(map(len, rows)) + 1
        batch = {
            key: torch.zeros(len(rows), width, dtype=torch.int64)
            for key in ("input_ids", "attention_mask", "completion_mask")
        }
        for i, row in enumerate(rows):
            tokens = [*head, *row, tokenizer.eos_token_id]
            batch["input_ids"][i, : len(tokens)] = torch.tensor(tokens)
            batch["attention_mask"][i, : len(tokens)] = 1
            batch["completion_mask"][i, len(head) : len(tokens)] = 1
        policy, base = (
            sequence_logps(m, m.get_output_embeddings(), batch, share=True)
            for m in (model, reference)
        )
        ratios += (policy - base).tolist()
    return np.array(ratios)


def measure(adapter: Path | None, base: Path, per_prompt: int) -> dict[str, float]:
    """Sentiment and divergence of responses to the held-out prompts."""
    reference, tokenizer = load(base)
    model = reference
    if adapter is not None:
        model = PeftModel.from_pretrained(load(base)[0], adapter).merge_and_unload()
    prompts = make_prompts().heldout
    texts = sample_responses(model, tokenizer, prompts, per_prompt, SAMPLING_SEED, "sampling")
    scores = np.array([[sentiment(text) for text in answers] for answers in texts])
    ratios = divergence(model, reference, tokenizer, prompts, texts)
    return {
        "responses": scores.size,
        "score": float(scores.mean()),
        "score_standard_error": float(scores.mean(axis=1).std(ddof=1) / len(prompts) ** 0.5),
        "kl": float(ratios.mean()),
        "kl_standard_error": float(ratios.std(ddof=1) / len(ratios) ** 0.5),
        "words": float(np.mean([len(text.split()) for answers in texts for text in answers])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--responses", type=int, default=2, help="per held-out prompt")
    args = parser.parse_args()
    os.chdir(ROOT)
    found = configs(args.sweep)
    base = Path(found[0]["base_model"])
    render_kto_rows(base)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{args.sweep}.jsonl"
    done = [row["changes"] for row in read_jsonl(file)] if file.exists() else []
    default = yaml.safe_load((HERE / "base.yml").read_text())

    def record(changes: dict[str, Any], **values: Any) -> None:
        with file.open("a") as lines:
            lines.write(json.dumps({"changes": changes, **values}) + "\n")

    if {"rl": "none"} not in done:
        record({"rl": "none"}, **measure(None, base, args.responses))
    for cfg in found:
        changes = {k: v for k, v in cfg.items() if default.get(k) != v and k != "datasets"}
        if changes in done:
            continue
        name = "-".join([args.sweep, *(f"{k}={v}" for k, v in sorted(changes.items()))])
        if not (OUTPUTS / name / "adapter_model.safetensors").exists():
            train(cfg, name)
        values = measure(OUTPUTS / name, base, args.responses)
        record(changes, **values)
        print("RUN", name, json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
