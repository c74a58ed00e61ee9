"""How far a step's gradient is from that of all rows, by what its rewards are compared with.

The quickstart's rows, at several steps of one training. The gradient of each row's reward u in the
adapter (paired: the margin, unpaired: the log-ratio) is computed once; any loss of a batch then has
the gradient sum_i (dL/du_i) grad u_i, so its distance from the transport gradient of all rows needs
inner products of these gradients only. Of a batch of n pairs, the sorted margins u are compared
with

- ``step``: the reference's margins of the same pairs, sorted (AOT over the step)
- ``pairs``: each pair's own reference margin (sorting inside micro-batches of one pair: DPO)
- ``data``: the reference's margins of all pairs

and of a batch of n labelled rows (drawn as `rl: aot` does) the positive rows are compared with the
negative ones

- ``step``: of the whole batch, sorted
- ``step, balanced``: the same, of a batch with equal numbers of both (`aot_draw: balanced`)
- ``micro-batches of k``: of the same micro-batch, sorted; one that holds one label has no gradient.
  Both labels are spread over the micro-batches, as `aot_batch: micro_batch` draws them
- ``micro-batches of k, random``: the same, filled by chance

A line per training step, penalty, n and choice goes into results/gradient.jsonl (or
gradient_unpaired.jsonl): the mean squared distance and that of the mean gradient (squared bias), in
units of the squared norm of the gradient of all rows; the mean cosine with it, and that of the mean
gradient. A mean of BATCHES pairs still has their variance over BATCHES; labelled rows are drawn
without replacement, which leaves less. Micro-batches that train nothing shorten a
gradient, which makes the distance of a noisy one smaller and means nothing to Adam: compare cosines
there.

    python benchmarks/experiments/gradient.py
    python benchmarks/experiments/gradient.py --unpaired --model student --steps 0 4 8

Trains 8 steps. With SmolLM2 it takes about 5 minutes per training step on a CPU core; what is there
is reused.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import FIRST_MODEL, MODELS, Model
from peft import LoraConfig, PeftModel, get_peft_model
from run import RESULTS, ROOT, train
from sampling import read_jsonl
from tqdm import tqdm

from aot_plugin.data.sampler import StratifiedSampler
from aot_plugin.ot.penalties import PENALTIES
from aot_plugin.ot.transport import transport_value

Cost = Callable[[torch.Tensor], torch.Tensor]
Weights = Callable[[np.ndarray], np.ndarray]
Draw = Callable[[int], Iterator[np.ndarray]]
LOSSES = (("logistic", 0.1), ("squared_hinge", 10.0), ("least_squares", 10.0))
PAIRS, LABELLED = (4, 8, 16, 32, 64), (8, 32, 128)
"""Sizes of a batch."""
MICRO_BATCHES = (2, 4)
BATCHES = 400


def logp(model: Any, tokenizer: Any, messages: list[Any], response: str) -> torch.Tensor:
    """log pi(response) in nats, up to the end-of-turn token."""
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    turns = [*messages, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    tokens = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(dim=-1)
    return tokens.gather(1, ids[0, start:, None]).sum()


def reward(model: Any, tokenizer: Any, row: dict[str, Any]) -> torch.Tensor:
    """The margin of a pair, or log pi of a labelled row (its reference's has no gradient)."""
    if "completion" in row:
        return logp(model, tokenizer, row["messages"], row["completion"])
    chosen, rejected = (
        logp(model, tokenizer, row["messages"], row[name]["content"])
        for name in ("chosen", "rejected")
    )
    return chosen - rejected


def adapter(subject: Model, checkpoints: Path, step: int) -> Any:
    model = subject.load()[0].float()
    if step:
        return PeftModel.from_pretrained(
            model, checkpoints / f"checkpoint-{step}", is_trainable=True
        )
    torch.manual_seed(1)
    cfg = subject.base()
    lora = LoraConfig(r=cfg["lora_r"], lora_alpha=cfg["lora_alpha"], target_modules="all-linear")
    return get_peft_model(model, lora)


def gradients(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The rewards u [n], and the inner products of their gradients [n, n]."""
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = np.empty((len(rows), sum(p.numel() for p in parameters)), dtype=np.float32)
    u = np.empty(len(rows))
    for i, row in enumerate(tqdm(rows, unit="row")):
        value = reward(model, tokenizer, row)
        parts = torch.autograd.grad(value, parameters, materialize_grads=True)
        found[i], u[i] = torch.cat([part.flatten() for part in parts]).numpy(), value.item()
    return {"u": u, "gram": (found @ found.T).astype(np.float64)}


def weights(u: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """dL/du."""
    u = u.clone().requires_grad_()
    return torch.autograd.grad(loss(u), u)[0].numpy()


def of_pairs(
    u: torch.Tensor, v: torch.Tensor, cost: Cost
) -> tuple[np.ndarray, dict[str, Weights], Draw, tuple[int, ...]]:
    """dL/du of all pairs; that of a batch by choice; batches without end of a size; the sizes."""

    def sorted_against(other: torch.Tensor, batch: np.ndarray) -> np.ndarray:
        return weights(u[batch], lambda x: transport_value(x, other, cost))

    choices = {
        "step": lambda batch: sorted_against(v[batch], batch),
        "pairs": lambda batch: weights(u[batch], lambda x: cost(x - v[batch]).mean()),
        "data": lambda batch: sorted_against(v, batch),
    }

    def draw(n: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        while True:
            yield rng.choice(len(u), n, replace=False)

    return sorted_against(v, np.arange(len(u))), choices, draw, PAIRS


def of_labelled(
    u: torch.Tensor, positive: np.ndarray, cost: Cost, balanced: bool
) -> tuple[np.ndarray, dict[str, Weights], Draw, tuple[int, ...]]:
    """As of_pairs, of labelled rows."""

    def inside(size: int, batch: np.ndarray) -> np.ndarray:
        found = np.zeros(len(batch))
        parts = np.split(np.arange(len(batch)), range(size, len(batch), size))
        for part in parts:
            true = torch.from_numpy(positive[batch[part]])
            if true.any() and not true.all():

                def loss(x: torch.Tensor, true: torch.Tensor = true) -> torch.Tensor:
                    return transport_value(x[true], x[~true], cost)

                found[part] = weights(u[batch[part]], loss) / len(parts)
        return found

    def by_chance(size: int, batch: np.ndarray) -> np.ndarray:
        order = np.random.default_rng(batch).permutation(len(batch))
        found = np.empty(len(batch))
        found[order] = inside(size, batch[order])
        return found

    name = "step, balanced" if balanced else "step"
    choices: dict[str, Weights] = {name: lambda batch: inside(len(batch), batch)}
    for size in () if balanced else MICRO_BATCHES:
        choices[f"micro-batches of {size}"] = partial(inside, size)
        choices[f"micro-batches of {size}, random"] = partial(by_chance, size)
    # Blocks of one row: both labels in proportion in any part of the order.
    sampler = StratifiedSampler(positive, 1, seed=0, balanced=balanced)

    def draw(n: int) -> Iterator[np.ndarray]:
        for epoch in count():
            sampler.set_epoch(epoch)
            order = np.array(list(sampler))
            yield from order[: len(order) // n * n].reshape(-1, n)

    return inside(len(u), np.arange(len(u))), choices, draw, LABELLED


def lines_of(
    kind: str, found: tuple[np.ndarray, dict[str, Weights], Draw, tuple[int, ...]], gram: np.ndarray
) -> Iterator[dict[str, Any]]:
    of_all, choices, draw, sizes = found
    norm = of_all @ gram @ of_all
    for size in sizes:
        for against, choice in choices.items():
            drawn = np.zeros((BATCHES, len(gram)))
            # The same batches for all choices: draw() begins anew.
            for w, batch in zip(drawn, draw(size), strict=False):
                w[batch] = choice(batch)
            mean = drawn.mean(axis=0)
            error, bias = drawn - of_all, mean - of_all
            squared = np.einsum("bi,ij,bj->b", error, gram, error, optimize=True) / norm
            length = np.einsum("bi,ij,bj->b", drawn, gram, drawn, optimize=True)
            cosine = drawn @ gram @ of_all / np.sqrt(np.maximum(length * norm, 1e-300))
            yield {
                kind: size,
                "against": against,
                "error": squared.mean().round(3),
                "standard_error": (squared.std() / BATCHES**0.5).round(3),
                "squared_bias": (bias @ gram @ bias / norm).round(3),
                "cosine": cosine.mean().round(3),
                "cosine_of_mean": (mean @ gram @ of_all / np.sqrt(mean @ gram @ mean * norm)).round(
                    3
                ),
                "cosine_standard_error": (cosine.std() / BATCHES**0.5).round(4),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unpaired", action="store_true", help="labelled rows in place of pairs")
    parser.add_argument("--model", choices=MODELS, default=FIRST_MODEL)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 2, 4], help="even ones, to 8")
    args = parser.parse_args()
    os.chdir(ROOT)
    subject = Model(args.model)
    mode, suffix = ("unpaired", "_unpaired") if args.unpaired else ("paired", "")
    source = subject.quickstart / f"{mode}_train.jsonl"
    rows = read_jsonl(source)
    checkpoints, kept = (subject.outputs / f"{name}{suffix}" for name in ("gradvar", "gradient"))
    kept.mkdir(parents=True, exist_ok=True)
    if not (checkpoints / "checkpoint-8").exists():
        entry = {"path": str(source.relative_to(ROOT)), "type": "chat_template.default"}
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
        cfg = subject.base() | saving | {"aot_mode": mode, "datasets": [entry]}
        train(cfg, checkpoints, subject.outputs / "prepared")
    tokenizer = subject.load()[1]
    for step in {0, *args.steps}:
        if not (kept / f"{step}.npz").exists():
            model = adapter(subject, checkpoints, step)
            np.savez(kept / f"{step}.npz", **gradients(model, tokenizer, rows))
    # Before the first step the policy is the reference.
    reference = torch.from_numpy(np.load(kept / "0.npz")["u"])
    lines = []
    for step in args.steps:
        data = np.load(kept / f"{step}.npz")
        u = torch.from_numpy(data["u"])
        for penalty, beta in LOSSES[:1] if args.unpaired else LOSSES:
            cost = partial(PENALTIES[penalty], beta=beta)
            if args.unpaired:
                kind, labels = "rows", np.array([row["label"] for row in rows])
                parts = [of_labelled(u - reference, labels, cost, even) for even in (False, True)]
            else:
                kind, parts = "pairs", [of_pairs(u, reference, cost)]
            which = {"step": step, "penalty": penalty, "beta": beta}
            for found in parts:
                measured = lines_of(kind, found, data["gram"])
                lines += [json.dumps(which | line) + "\n" for line in measured]
    results = subject.own(RESULTS)
    results.mkdir(exist_ok=True)
    (results / f"gradient{suffix}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
