"""Time and memory of an optimizer step: `rl: aot` against the peer at the same effective batch.

The peer is what Axolotl reaches today: `rl: dpo` with `dpo_loss_type: [aot]` for pairs, `rl: kto`
for labelled rows. Both trainers are built by the host, from one YAML with other `rl` keys: the same
model, rows, effective batch, precision and threads. Then they take turns, step by step, so that a
busy machine disturbs both; the ratio of processor time is hardly disturbed at all. `--chunked`
measures TRL's chunked log-probabilities (what `dpo_use_liger_kernel` selects) without liger's own
model patch: its Triton kernels need a GPU.

    python benchmarks/step_speed.py --micro 2 --accumulation 8 --rows short
    python benchmarks/step_speed.py --help

The model is that of the quickstart (`make quickstart` prepares it).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml

ROOT = Path(__file__).parent.parent
DATA = ROOT / "example_configs" / "quickstart" / "data" / "paired_train.jsonl"
VARIANTS = ("peer", "ours")


def rows(kind: str, n: int) -> list[dict[str, Any]]:
    """Pairs of real text. `short`: the quickstart's own rows. `long`: its texts joined to prompts
    and responses of 20 to 400 words at random."""
    source = [json.loads(line) for line in DATA.read_text().splitlines()]
    if kind == "short":
        return source[:n]
    rng = random.Random(0)
    words = " ".join(row[side]["content"] for row in source for side in ("chosen", "rejected"))
    stock = words.split()

    def text() -> str:
        length = round(20 * 20 ** rng.random() * 0.75)  # log-uniform; 0.75 words a token
        start = rng.randrange(len(stock) - length)
        return " ".join(stock[start : start + length])

    return [
        {
            "messages": [{"role": "user", "content": text()}],
            "chosen": {"role": "assistant", "content": text()},
            "rejected": {"role": "assistant", "content": text()},
        }
        for _ in range(n)
    ]


def config(args: argparse.Namespace, variant: str, directory: Path) -> Path:
    """The host's YAML of one variant; everything but the `rl` keys is the same."""
    pairs = rows(args.rows, 4 * args.micro * args.accumulation)
    if args.mode == "paired":
        data, kind = pairs, "chat_template.default"
        keys = {"rl": "dpo", "dpo_loss_type": ["aot"]}
    else:
        data = [
            {
                "prompt": pair["messages"][0]["content"],
                "completion": pair[side]["content"],
                "label": side == "chosen",
            }
            for pair in pairs
            for side in ("chosen", "rejected")
        ]
        kind, keys = "chatml.ultra", {"rl": "kto", "remove_unused_columns": False}
    if variant == "ours":
        keys = {"rl": "aot", "aot_mode": args.mode, "aot_report": False}
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    cfg = {
        **keys,
        "base_model": str(args.model),
        "rl_beta": 0.1,
        "datasets": [{"path": str(path), "ds_type": "json", "split": "train", "type": kind}],
        "dataset_prepared_path": str(directory / f"prepared-{variant}"),
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "sequence_len": 1024,
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_linear": True,
        "micro_batch_size": args.micro,
        "gradient_accumulation_steps": args.accumulation,
        "gradient_checkpointing": args.checkpointing,
        "precompute_ref_log_probs": args.precompute,
        "max_steps": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "logging_steps": 1,
        "output_dir": str(directory / f"out-{variant}"),
        "bf16": False,
        "seed": 1,
    }
    path = directory / f"{variant}.yml"
    path.write_text(yaml.safe_dump(cfg))
    return path


def build(path: Path, chunked: bool) -> Any:
    """The trainer as the host's train command builds it."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import setup_model_and_trainer

    cfg = load_cfg(str(path))
    meta = PluginManager.get_instance().load_datasets(cfg) or load_preference_datasets(cfg=cfg)
    trainer = setup_model_and_trainer(cfg, meta)[0]
    trainer = getattr(trainer, "trainer", trainer)
    if chunked:
        from trl.models.utils import _ForwardRedirection

        trainer.use_liger_kernel = True
        trainer._forward_redirection = _ForwardRedirection()
    return trainer


def step(trainer: Any) -> tuple[float, float]:
    """Seconds of one optimizer step, from fetching its rows to the update: by the clock, and of
    processor time."""
    from transformers import TrainerCallback

    times: list[tuple[float, float]] = []
    fetch = type(trainer).get_batch_samples

    def timed_fetch(*args: Any) -> Any:
        times.append((time.perf_counter(), time.process_time()))
        return fetch(trainer, *args)

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

    clock = Clock()
    trainer.get_batch_samples = timed_fetch
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    (clock_start, cpu_start), (clock_end, cpu_end) = times
    return clock_end - clock_start, cpu_end - cpu_start


def peak_memory(trainer: Any) -> tuple[int, int]:
    """Bytes resident before a step, and at most during it (sampled every 5 ms)."""
    import psutil

    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(trainer)
    done.set()
    watcher.join()
    return before, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("paired", "unpaired"), default="paired")
    parser.add_argument("--rows", choices=("short", "long"), default="short")
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--chunked", action="store_true", help="the peer's chunked path")
    parser.add_argument("--precompute", action="store_true", help="cached reference")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--model", type=Path, default=ROOT / "outputs" / "smollm2-135m-instruct")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="append the result to this file")
    args = parser.parse_args()
    if not args.model.is_dir():
        sys.exit(f"{args.model} is not there; run `make quickstart` once, or name --model")

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if args.memory_of:
            chunked = args.chunked and args.memory_of == "peer"
            trainer = build(config(args, args.memory_of, directory), chunked)
            print("MEMORY", json.dumps(peak_memory(trainer)))
            return
        trainers = {
            variant: build(config(args, variant, directory), args.chunked and variant == "peer")
            for variant in VARIANTS
        }
        for trainer in trainers.values():
            step(trainer)  # warm-up
        seconds: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
        for _ in range(args.turns):
            for variant, trainer in trainers.items():
                seconds[variant].append(step(trainer))
        del trainers, trainer

    memory = {}
    for variant in VARIANTS:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--memory-of", variant],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith("MEMORY "))
        memory[variant] = json.loads(line.removeprefix("MEMORY "))
    turns = list(zip(seconds["peer"], seconds["ours"], strict=True))
    ratios, cpu_ratios = ([ours[i] / peer[i] for peer, ours in turns] for i in (0, 1))
    added = {variant: peak - before for variant, (before, peak) in memory.items()}
    result = {
        "mode": args.mode,
        "rows": args.rows,
        "micro_batch": args.micro,
        "accumulation": args.accumulation,
        "peer": "chunked" if args.chunked else "default",
        "cached_reference": args.precompute,
        "checkpointing": args.checkpointing,
        "threads": torch.get_num_threads(),
        "seconds": {v: round(statistics.median(c for c, _ in s), 2) for v, s in seconds.items()},
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratios": [round(ratio, 3) for ratio in ratios],
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "peak_mb": {v: round(peak / 2**20) for v, (_, peak) in memory.items()},
        "peak_ratio": round(memory["ours"][1] / memory["peer"][1], 3),
        "step_mb": {v: round(size / 2**20) for v, size in added.items()},
        "step_memory_ratio": round(added["ours"] / added["peer"], 3),
    }
    print("RESULT", json.dumps(result, indent=1))
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
