"""How far AOT is from DPO on real data: the share of rows coupled with another row than their own.

Reads a paired run: by step from its log, and by effective batch from the log-probabilities that its
evaluations left, by drawing batches of each size from them.

    python benchmarks/recoupling.py outputs/quickstart
"""

import argparse
import json
from pathlib import Path

import numpy as np

from aot_plugin.ot.coupling import recoupled_fraction
from aot_plugin.report import load_run

DRAWS = 400


def by_batch(u: np.ndarray, v: np.ndarray, size: int, rng: np.random.Generator) -> float:
    """The mean share over random batches of ``size`` rows."""
    shares = []
    for _ in range(DRAWS):
        rows = rng.choice(len(u), size, replace=False)
        shares.append(recoupled_fraction(u[rows], v[rows]))
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    states = sorted(args.run.glob("checkpoint-*/trainer_state.json"))
    if states:
        print("| step | recoupled in training |\n|---|---|")
        for entry in json.loads(states[-1].read_text())["log_history"]:
            if "aot/recoupled_fraction" in entry:
                print(f"| {entry['step']} | {entry['aot/recoupled_fraction']:.2f} |")
    evaluations = [scores for scores in load_run(args.run) if scores.mode == "paired"]
    if not evaluations:
        raise SystemExit(f"no paired evaluation in {args.run}/aot")
    n = len(evaluations[0].u)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size <= n]
    print("\n| effective batch | " + " | ".join(f"step {s.step}" for s in evaluations) + " |")
    print("|---|" + "---|" * len(evaluations))
    rng = np.random.default_rng(0)
    for size in sizes:
        shares = [by_batch(np.array(s.u), np.array(s.v), size, rng) for s in evaluations]
        print(f"| {size} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
