"""The transport move at scale: seconds of its parts for n sequences, and bytes gathered per rank.

python benchmarks/transport_scale.py --json benchmarks/results/transport_scale.jsonl
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aot_plugin.ot.dominance import dominance_statistics
from aot_plugin.ot.losses import LossOptions, UnpairedLogps, transport
from aot_plugin.ot.penalties import logistic

COLUMNS = 7
"""Per sequence: log-probability, reference log-probability, label, tokens, mass, and two
numbers for the log; float64."""


def seconds(work: Callable[[], Any], least: float = 0.5) -> float:
    work()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(n: int, negatives: int) -> dict[str, Any]:
    """One problem of n positives against `negatives` negatives, value and gradient."""
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(n + negatives, generator=generator, dtype=torch.float64) * 50
    reference = torch.randn(n + negatives, generator=generator, dtype=torch.float64) * 50
    is_positive = torch.arange(n + negatives) < n
    options = LossOptions(penalty=logistic, beta=0.01)
    tokens = torch.ones_like(logps)
    step = UnpairedLogps(logps, reference, is_positive, tokens)
    u, v = step.u.numpy(), step.v.numpy()

    def value_and_gradient() -> None:
        leaf = logps.clone().requires_grad_()
        transport(UnpairedLogps(leaf, reference, is_positive, tokens), options).backward()

    return {
        "positives": n,
        "negatives": negatives,
        "loss_and_gradient_s": seconds(value_and_gradient),
        "statistics_s": seconds(lambda: dominance_statistics(u, v)),
        "gathered_mb": (n + negatives) * COLUMNS * 8 / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for exponent in range(2, 8):
        n = 10**exponent
        for positives, negatives in ((n // 2, n // 2), (n // 3, n - n // 3)):
            row = measure(positives, negatives)
            print(
                f"{positives:>9} + {negatives:>9}"
                f"   loss and gradient {row['loss_and_gradient_s']:.2e} s"
                f"   statistics {row['statistics_s']:.2e} s   gathered {row['gathered_mb']:.4g} MB"
            )
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
