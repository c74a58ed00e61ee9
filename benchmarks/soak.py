"""A long run on a tiny model: do memory or the time of a step grow?

    python benchmarks/soak.py [--mode paired|unpaired] [--steps 2000] [--minutes M]

One process trains with the host's own command function (micro-batch 1, accumulation 2) and
evaluates now and then. A callback reads the clock and the resident memory at every step; the first
tenth is left out (imports, caches and the allocator fill up there), and the rest is compared in
windows.

2,000 steps each on a CPU core, by window. Unpaired (2026-11-24, beside other work): resident MB
1209, 1209, 1209, 1210, 1211, 1212, 1213, 1213, 1213; median ms per step 28, 38, 38, 26, 25, 26, 30,
26, 28. Paired (2026-11-25, alone on its core): 1343, 1347, 1352, 1354, 1355, 1355, 1355, 1356, 1357
MB; 30, 27, 25, 25, 24, 26, 26, 26, 27 ms.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from harness import SMALLEST, config, paired_rows, random_model, train, unpaired_rows, write_rows
from transformers import Trainer, TrainerCallback

WINDOWS = 9


class Watch(TrainerCallback):
    """Clock and resident memory (bytes) after every step; stops the run when its time is up."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.clock: list[float] = []
        self.resident: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.append(time.monotonic())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        if self.clock[-1] > self.end and len(self.clock) > 10 * WINDOWS:
            control.should_training_stop = control.should_save = True


def tiny_model(path: Path) -> Path:
    """One layer of eight dimensions, with the tokenizer of the quickstart's model."""
    from transformers import AutoTokenizer

    root = Path(__file__).parents[1]
    tokenizer = AutoTokenizer.from_pretrained(root / "outputs" / "smollm2-135m-instruct")
    random_model(tokenizer, scale=1.0, tie_word_embeddings=True, **SMALLEST).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def soak(mode: str, steps: int, seconds: float) -> dict[str, Any]:
    watch = Watch(seconds)
    original = Trainer.__init__

    def watched(self: Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(watch)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = paired_rows(200) if mode == "paired" else unpaired_rows(200)
        keys = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "num_epochs": 1000}
        keys |= {"eval_steps": 200, "val_set_size": 0.1, "logging_steps": 10}
        cfg = config(
            tiny_model(folder / "model"),
            write_rows(folder / "rows.jsonl", rows),
            folder / "out",
            aot_mode=mode,
            max_steps=steps,
            dataset_num_proc=0,
            save_total_limit=1,
            **keys,
        )
        Trainer.__init__ = watched  # type: ignore[method-assign]
        try:
            train(cfg)
        finally:
            Trainer.__init__ = original  # type: ignore[method-assign]
    return {"mode": mode, "steps": len(watch.clock), "machine": machine()} | compared(watch)


def compared(watch: Watch) -> dict[str, Any]:
    times = [b - a for a, b in zip(watch.clock, watch.clock[1:], strict=False)]
    first = len(times) // 10
    size = (len(times) - first) // WINDOWS
    starts = [first + window * size for window in range(WINDOWS)]
    memory = [statistics.mean(watch.resident[s + 1 : s + 1 + size]) / 2**20 for s in starts]
    # The median: evaluations, and whatever else the machine is doing, stand out.
    clock = [statistics.median(times[s : s + size]) * 1000 for s in starts]
    return {
        "resident_mb": [round(value, 1) for value in memory],
        "step_ms": [round(value, 1) for value in clock],
        "resident_growth_mb_per_1000_steps": round(slope(memory) / size * 1000, 2),
        "step_growth_percent_per_1000_steps": round(
            100 * slope(clock) / statistics.mean(clock) / size * 1000, 2
        ),
    }


def slope(values: list[float]) -> float:
    """Least squares, per window."""
    return statistics.linear_regression(range(len(values)), values).slope


def machine() -> str:
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("paired", "unpaired"), default="paired")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=60)
    args = parser.parse_args()
    print(json.dumps(soak(args.mode, args.steps, args.minutes * 60), indent=1))


if __name__ == "__main__":
    main()
