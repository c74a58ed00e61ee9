"""How far a step's gradient is from that of all rows, by what its margins are compared with.

The quickstart's pairs, at several steps of one training. The gradient of each pair's margin u in
the adapter is computed once; any loss of a batch then has the gradient sum_i (dL/du_i) grad u_i, so
its distance from the transport gradient of all pairs needs inner products of these gradients only.
Compared with the sorted margins u of a batch of n pairs are

- ``step``: the reference's margins of the same pairs, sorted (AOT over the step)
- ``pairs``: each pair's own reference margin (sorting inside micro-batches of one pair: DPO)
- ``data``: the reference's margins of all pairs

A line per training step, penalty, n and choice goes into results/gradient.jsonl: the mean squared
distance, that of the mean gradient (squared bias), and the mean cosine, the first two in units of
the squared norm of the gradient of all pairs.

    python benchmarks/experiments/gradient.py

Trains 8 steps and takes about 5 minutes per training step on a CPU core; what is there is reused.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from run import HERE, OUTPUTS, QUICKSTART, RESULTS, ROOT, train
from sampling import load, read_jsonl
from tqdm import tqdm

from aot_plugin.ot.penalties import PENALTIES
from aot_plugin.ot.transport import transport_value

STEPS = (0, 2, 4)
LOSSES = (("logistic", 0.1), ("squared_hinge", 10.0), ("least_squares", 10.0))
SIZES = (4, 8, 16, 32, 64)
BATCHES = 400


def margin(model: Any, tokenizer: Any, row: dict[str, Any]) -> torch.Tensor:
    """log pi(chosen) - log pi(rejected) in nats, up to the end-of-turn token."""
    prompt = tokenizer.apply_chat_template(
        row["messages"], tokenize=False, add_generation_prompt=True
    )
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    logps = []
    for name in ("chosen", "rejected"):
        text = tokenizer.apply_chat_template([*row["messages"], row[name]], tokenize=False)
        ids = torch.tensor([tokenizer(text.rstrip("\n"), add_special_tokens=False).input_ids])
        tokens = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(dim=-1)
        logps.append(tokens.gather(1, ids[0, start:, None]).sum())
    return logps[0] - logps[1]


def adapter(base: Path, checkpoints: Path, step: int) -> Any:
    model = load(base)[0].float()
    if step:
        return PeftModel.from_pretrained(
            model, checkpoints / f"checkpoint-{step}", is_trainable=True
        )
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def gradients(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The margins u [n], and the inner products of their gradients [n, n]."""
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = np.empty((len(rows), sum(p.numel() for p in parameters)), dtype=np.float32)
    u = np.empty(len(rows))
    for i, row in enumerate(tqdm(rows, unit="pair")):
        value = margin(model, tokenizer, row)
        parts = torch.autograd.grad(value, parameters, materialize_grads=True)
        found[i], u[i] = torch.cat([part.flatten() for part in parts]).numpy(), value.item()
    return {"u": u, "gram": (found @ found.T).astype(np.float64)}


def weights(u: torch.Tensor, v: torch.Tensor, penalty: str, beta: float, pairs: bool) -> np.ndarray:
    """dL/du."""
    u = u.clone().requires_grad_()

    def cost(z: torch.Tensor) -> torch.Tensor:
        return PENALTIES[penalty](z, beta)

    loss = cost(u - v).mean() if pairs else transport_value(u, v, cost)
    return torch.autograd.grad(loss, u)[0].numpy()


def main() -> None:
    os.chdir(ROOT)
    rows = read_jsonl(QUICKSTART / "data" / "paired_train.jsonl")
    cfg = yaml.safe_load((HERE / "base.yml").read_text())
    base, checkpoints, kept = Path(cfg["base_model"]), OUTPUTS / "gradvar", OUTPUTS / "gradient"
    kept.mkdir(parents=True, exist_ok=True)
    if not checkpoints.exists():
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
        train(cfg | saving, checkpoints.name)
    tokenizer = load(base)[1]
    for step in STEPS:
        if not (kept / f"{step}.npz").exists():
            model = adapter(base, checkpoints, step)
            np.savez(kept / f"{step}.npz", **gradients(model, tokenizer, rows))
    # Before the first step the policy is the reference.
    v = torch.from_numpy(np.load(kept / "0.npz")["u"])
    lines = []
    for step in STEPS:
        data = np.load(kept / f"{step}.npz")
        u, gram = torch.from_numpy(data["u"]), data["gram"]
        for penalty, beta in LOSSES:
            of_all = weights(u, v, penalty, beta, pairs=False)
            norm = of_all @ gram @ of_all
            for size in SIZES:
                for against in ("step", "pairs", "data"):
                    rng = np.random.default_rng(0)  # the same batches for all
                    drawn = np.zeros((BATCHES, len(u)))
                    for w in drawn:
                        batch = rng.choice(len(u), size, replace=False)
                        other = v if against == "data" else v[batch]
                        w[batch] = weights(u[batch], other, penalty, beta, against == "pairs")
                    error, bias = drawn - of_all, drawn.mean(axis=0) - of_all
                    squared = np.einsum("bi,ij,bj->b", error, gram, error, optimize=True) / norm
                    length = np.einsum("bi,ij,bj->b", drawn, gram, drawn, optimize=True)
                    cosine = drawn @ gram @ of_all / np.sqrt(np.maximum(length * norm, 1e-300))
                    line = {"step": step, "penalty": penalty, "beta": beta, "pairs": size}
                    line |= {"against": against, "error": squared.mean().round(3)}
                    line["standard_error"] = (squared.std() / BATCHES**0.5).round(3)
                    line |= {
                        "squared_bias": (bias @ gram @ bias / norm).round(3),
                        "cosine": cosine.mean().round(3),
                    }
                    lines.append(json.dumps(line) + "\n")
    (RESULTS / "gradient.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
