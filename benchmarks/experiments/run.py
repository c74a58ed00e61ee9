"""The paper's experiments, scaled to a CPU: train every config of a sweep, sample, and measure.

The sweeps are the host's (`axolotl train base.yml --sweep methods.yml` trains the same configs);
this script adds what comes after training. Responses to held-out prompts are sampled from the
trained model and scored by the rule that ranked the training data (VADER, in [-1, 1]). The
divergence KL(policy | reference), in nats per response, is taken along them, token by token.
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
from sampling import load, read_jsonl, sample_tokens, sentiment, whole_sentences, write_jsonl

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
def divergence(model: Any, reference: Any, ids: torch.Tensor, start: int, eos: int) -> np.ndarray:
    """[responses] KL(policy | reference) in nats along sampled responses.

    The divergence of the next token's distribution is summed over the places up to the
    end-of-sequence token. Its mean over samples of the policy is the divergence of the whole
    response (the chain rule), without the noise of the sampled tokens' own log-ratios.
    """
    response = ids[:, start:]
    places = (response == eos).cumsum(dim=1) - (response == eos).long() == 0
    attended = torch.cat([(ids[:, :start] != eos).long().cummax(dim=1).values, places], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": attended,
        "position_ids": (attended.cumsum(dim=1) - 1).clamp(min=0),
        "logits_to_keep": response.shape[1] + 1,
    }
    policy, base = (m(**inputs).logits[:, :-1].log_softmax(dim=-1) for m in (model, reference))
    return ((policy.exp() * (policy - base)).sum(dim=-1) * places).sum(dim=1).numpy()


def measure(adapter: Path | None, base: Path, per_prompt: int) -> dict[str, float]:
    """Sentiment and divergence of responses to the held-out prompts."""
    reference, tokenizer = load(base)
    model = reference
    if adapter is not None:
        model = PeftModel.from_pretrained(load(base)[0], adapter).merge_and_unload()
    prompts = make_prompts().heldout
    sampled = list(sample_tokens(model, tokenizer, prompts, per_prompt, SAMPLING_SEED, "sampling"))
    texts = [
        whole_sentences(text)
        for ids, start in sampled
        for text in tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    ]
    # Both in float32: rounding of bf16 logits adds up to a divergence of its own.
    model, reference = model.float(), reference.float()
    ratios = np.concatenate(
        [divergence(model, reference, *batch, tokenizer.eos_token_id) for batch in sampled]
    )
    scores = np.array([sentiment(text) for text in texts]).reshape(len(prompts), per_prompt)
    return {
        "responses": scores.size,
        "score": float(scores.mean()),
        "score_standard_error": float(scores.mean(axis=1).std(ddof=1) / len(prompts) ** 0.5),
        "kl": float(ratios.mean()),
        "kl_standard_error": float(ratios.std(ddof=1) / len(ratios) ** 0.5),
        "words": float(np.mean([len(text.split()) for text in texts])),
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
