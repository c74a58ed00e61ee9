"""Time, memory and work of an optimizer step: `rl: aot` against the peer at the same effective
batch.

The peer is what Axolotl reaches today: `rl: dpo` with `dpo_loss_type: [aot]` for pairs, `rl: kto`
for labelled rows. Both trainers are built by the host, from one YAML with other `rl` keys: the same
model, rows, effective batch, precision and threads. Then they take turns, step by step, so that a
busy machine disturbs both; the ratio of processor time is hardly disturbed at all, and the passes
and their tokens (`_passes.py`) not at all.

    python benchmarks/step_speed.py --micro 2 --accumulation 4 --rows ultrafeedback --checkpointing
    benchmarks/step_speed.sh    # every set-up that docs publish
    python benchmarks/step_speed.py --help

The model is a random Llama in the proportions of models of 7B parameters; `--model
outputs/smollm2-135m-instruct` is that of the quickstart (`make quickstart` prepares it, and the
other takes its chat template). `--chunked` measures TRL's chunked log-probabilities (what
`dpo_use_liger_kernel` selects) without liger's own model patch: its Triton kernels need a GPU.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from _inputs import PROPORTIONS_7B, ROOT, ROWS, SEQUENCE_LEN, SMOLLM2, head_share, model_path
from _passes import fewest_tokens, figures, watched_passes

VARIANTS = ("peer", "ours")
RANK = int(os.environ.get("RANK", "0"))


def config(args: argparse.Namespace, variant: str, directory: Path) -> Path:
    """The host's YAML of one variant; everything but the `rl` keys is the same."""
    from transformers import AutoTokenizer

    model = model_path(args.model)
    # The rows of one step, so that every step of both variants has the same.
    step = args.micro * args.accumulation * args.ranks
    n = step if args.mode == "paired" else -(-step // 2)
    pairs = ROWS[args.rows](n, AutoTokenizer.from_pretrained(model))
    if args.mode == "paired":
        data, kind = pairs, "chat_template.default"
        keys = {"rl": "dpo", "dpo_loss_type": ["aot"]}
    else:
        data = [
            {
                "prompt": pair["messages"][-1]["content"],
                "completion": pair[side]["content"],
                "label": side == "chosen",
            }
            for pair in pairs
            for side in ("chosen", "rejected")
        ][:step]
        kind, keys = "chatml.ultra", {"rl": "kto", "remove_unused_columns": False}
    if variant == "ours":
        keys = {"rl": "aot", "aot_mode": args.mode, "aot_report": False}
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    cfg = {
        **keys,
        "base_model": str(model),
        "attn_implementation": args.attention,
        "rl_beta": 0.1,
        "datasets": [{"path": str(path), "ds_type": "json", "split": "train", "type": kind}],
        "dataset_prepared_path": str(directory / f"prepared-{variant}"),
        "dataset_num_proc": 0,
        "dataloader_num_workers": 0,
        "sequence_len": SEQUENCE_LEN,
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
    if args.checkpointing:
        cfg["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if args.no_sharing:
        # Wider than any row, so the model computes the same; but the plugin packs and shares
        # nothing in models that attend within chunks.
        cfg["overrides_of_model_config"] = {"attention_chunk_size": 2 * SEQUENCE_LEN}
    path = directory / f"{variant}.yml"
    path.write_text(yaml.safe_dump(cfg))
    return path


def build(args: argparse.Namespace, variant: str, directory: Path) -> Any:
    """The trainer as the host's train command builds it."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import setup_model_and_trainer

    cfg = load_cfg(str(config(args, variant, directory)))
    if args.ranks > 1:
        cfg.device_map = {"": "cpu"}
    meta = PluginManager.get_instance().load_datasets(cfg) or load_preference_datasets(cfg=cfg)
    trainer = setup_model_and_trainer(cfg, meta)[0]
    trainer = getattr(trainer, "trainer", trainer)
    assert trainer.accelerator.num_processes == args.ranks
    if args.chunked and variant == "peer":
        from trl.models.utils import _ForwardRedirection

        trainer.use_liger_kernel = True
        trainer._forward_redirection = _ForwardRedirection()
    return trainer


class Step(NamedTuple):
    """An optimizer step, from fetching its rows to the update: seconds by the clock, seconds of
    processor time, and the host's micro-batches."""

    clock: float
    cpu: float
    batches: list[dict[str, Any]]


def step(trainer: Any) -> Step:
    from transformers import TrainerCallback

    times: list[tuple[float, float]] = []
    batches: list[dict[str, Any]] = []
    fetch = type(trainer).get_batch_samples

    def timed_fetch(*args: Any) -> Any:
        times.append((time.perf_counter(), time.process_time()))
        fetched = fetch(trainer, *args)
        batches.extend(fetched[0])
        return fetched

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

    clock = Clock()
    trainer.get_batch_samples = timed_fetch
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    (clock_start, cpu_start), (clock_end, cpu_end) = times
    return Step(clock_end - clock_start, cpu_end - cpu_start, batches)


def work(trainer: Any, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """``figures`` of one step on this rank, the fewest tokens of its rows, and its layouts. Not of
    the first step, which asks the model some questions."""
    from aot_plugin.step.record import watched_steps

    with watched_passes(trainer) as passes, watched_steps() as records:
        rows = fewest_tokens(step(trainer).batches)
    found: dict[str, Any] = {**figures(passes), "rows": rows, "layouts": []}
    if variant == "ours":
        (record,) = records
        recorded = [(p.model, p.gradient, p.rows, p.width) for p in record.passes]
        assert sorted(recorded) == sorted(passes), (recorded, passes)
        found["layouts"] = sorted({taken.layout for taken in record.passes})
        assert not args.no_sharing or found["layouts"] == ["padded"]
    return found


def measure_time(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Turns of both variants, each a (clock, processor time) of this rank, and the work of a
    step."""
    trainers = {variant: build(args, variant, directory) for variant in VARIANTS}
    for trainer in trainers.values():
        step(trainer)  # warm-up
        wrapped = type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        assert wrapped == (args.ranks > 1)
    found: dict[str, Any] = {
        "work": {variant: work(trainer, variant, args) for variant, trainer in trainers.items()},
        "turns": {variant: [] for variant in VARIANTS},
        "head_share": round(head_share(trainers["ours"].model), 3),
        "threads": torch.get_num_threads(),
    }
    for _ in range(args.turns):
        for variant, trainer in trainers.items():
            found["turns"][variant].append(step(trainer)[:2])
    return found


def measure_memory(args: argparse.Namespace, variant: str, directory: Path) -> tuple[int, int]:
    """Bytes of this rank that are resident before the first step, and at most during the first
    three (sampled every 5 ms): from the second on, graphs are kept."""
    import psutil

    trainer = build(args, variant, directory)
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        step(trainer)
    done.set()
    watcher.join()
    return before, peak


def measure(args: argparse.Namespace) -> None:
    """One part of the measurement, in a process of its own, or one of its ranks; rank 0 prints what
    all of them found."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        if args.ranks > 1:
            sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "ranks")]
            from launch import cpu_ranks

            stack.enter_context(cpu_ranks("ddp"))
        if args.part == "time":
            found: Any = measure_time(args, Path(name))
        else:
            found = measure_memory(args, args.part, Path(name))
        parts = [found]
        if args.ranks > 1:
            parts *= args.ranks
            torch.distributed.all_gather_object(parts, found)
            torch.distributed.destroy_process_group()
    if RANK == 0:
        print("FOUND", json.dumps(parts))


def part(name: str, ranks: int) -> list[Any]:
    """What each rank found in one part of the measurement."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    output = subprocess.run(
        [*command, *sys.argv, "--part", name], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    line = next(line for line in output.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


def result(args: argparse.Namespace) -> dict[str, Any]:
    """Of all parts. Time by the clock and memory are rank 0's; processor time and work are those of
    all ranks."""
    ranks = part("time", args.ranks)
    memory = {variant: part(variant, args.ranks)[0] for variant in VARIANTS}
    turns = {
        variant: [
            (of_ranks[0][0], sum(cpu for _, cpu in of_ranks))
            for of_ranks in zip(*(rank["turns"][variant] for rank in ranks), strict=True)
        ]
        for variant in VARIANTS
    }
    both = list(zip(turns["peer"], turns["ours"], strict=True))
    ratios, cpu_ratios = ([ours[i] / peer[i] for peer, ours in both] for i in (0, 1))
    added = {variant: peak - before for variant, (before, peak) in memory.items()}

    def total(variant: str, figure: str) -> int:
        return sum(rank["work"][variant][figure] for rank in ranks)

    assert total("peer", "rows") == total("ours", "rows"), "the variants had other rows"
    models = 1 if args.precompute else 2
    limit = {
        "tokens": total("ours", "rows") * models,
        "passes": args.accumulation * args.ranks * models,
    }
    tokens = {variant: total(variant, "tokens") for variant in VARIANTS}
    passes = {
        variant: {name: total(variant, name) for name in ("policy", "reference")}
        for variant in VARIANTS
    }
    return {
        **set_up(args),
        "head_share": ranks[0]["head_share"],
        "threads": ranks[0]["threads"],
        "seconds": {v: round(statistics.median(c for c, _ in t), 2) for v, t in turns.items()},
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratios": [round(ratio, 3) for ratio in ratios],
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "peak_mb": {v: round(peak / 2**20) for v, (_, peak) in memory.items()},
        "peak_ratio": round(memory["ours"][1] / memory["peer"][1], 3),
        "step_mb": {v: round(size / 2**20) for v, size in added.items()},
        "step_memory_ratio": round(added["ours"] / added["peer"], 3),
        "layouts": ranks[0]["work"]["ours"]["layouts"],
        "tokens": {**tokens, "limit": limit["tokens"]},
        "tokens_over_limit": {v: round(n / limit["tokens"], 3) for v, n in tokens.items()},
        "passes": passes,
        "passes_over_limit": {
            v: round(sum(n.values()) / limit["passes"], 3) for v, n in passes.items()
        },
    }


def set_up(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and on which state of the plugin (git's hash of its committed files)."""
    plugin = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD:aot_plugin"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
    return {
        "model": Path(args.model).name,
        "mode": args.mode,
        "rows": args.rows,
        "micro_batch": args.micro,
        "accumulation": args.accumulation,
        "ranks": args.ranks,
        "attention": args.attention,
        "sharing": not args.no_sharing,
        "peer": "chunked" if args.chunked else "default",
        "cached_reference": args.precompute,
        "checkpointing": args.checkpointing,
        "plugin": plugin,
    }


def is_done(args: argparse.Namespace) -> bool:
    """Whether the file of results has this set-up."""
    wanted = set_up(args).items()
    lines = args.json.read_text().splitlines() if args.json.is_file() else []
    return any(wanted <= json.loads(line).items() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mode", choices=("paired", "unpaired"), default="paired")
    parser.add_argument(
        "--rows",
        choices=ROWS,
        default="short",
        help="short: the quickstart's; long: 15 to 300 words; ultrafeedback: its lengths, halved",
    )
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=1, help="DDP ranks on the CPU (gloo)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--chunked", action="store_true", help="the peer's chunked path")
    parser.add_argument("--precompute", action="store_true", help="cached reference")
    parser.add_argument(
        "--checkpointing", action="store_true", help="gradient checkpointing, not reentrant"
    )
    parser.add_argument(
        "--attention", default="sdpa", help="the host's `attn_implementation` (default: sdpa)"
    )
    parser.add_argument(
        "--no-sharing",
        action="store_true",
        help="one sequence a row: the model's config claims attention within chunks, wider than "
        "any row, so the model computes the same, and the plugin neither shares nor packs",
    )
    parser.add_argument(
        "--model",
        default=PROPORTIONS_7B,
        help=f"{PROPORTIONS_7B} (the default, made on first use) or a model's folder",
    )
    parser.add_argument("--part", choices=("time", *VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="append the result to this file")
    parser.add_argument(
        "--resume", action="store_true", help="do nothing if that file has this set-up already"
    )
    args = parser.parse_args()
    needed = SMOLLM2 if args.model == PROPORTIONS_7B else Path(args.model)
    if not needed.is_dir():
        sys.exit(f"{needed} is not there; run `make quickstart` once, or name --model")
    if args.part:
        measure(args)
        return
    if args.resume and is_done(args):
        print("already measured")
        return
    model_path(args.model)  # made once, before several ranks ask for it
    found = result(args)
    print("RESULT", json.dumps(found, indent=1))
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
