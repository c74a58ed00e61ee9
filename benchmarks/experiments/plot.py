"""Figures of the experiments, from results/*.jsonl into docs/figures.

python benchmarks/experiments/plot.py
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FIGURES = HERE.parents[1] / "docs" / "figures"
# Readable in grey: every curve has a marker and a dash of its own.
STYLES = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"))
SCORE = "mean sentiment of sampled responses (VADER, -1 to 1)"
Rows = list[dict[str, Any]]


def read(name: str) -> Rows:
    file = HERE / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def trained(rows: Rows) -> Rows:
    return [row for row in rows if row["changes"] != {"rl": "none"}]


def method(changes: dict[str, Any]) -> str:
    rl = changes.get("rl", "aot")
    return rl.upper() if rl != "aot" else f"AOT {changes.get('aot_mode', 'paired')}"


def base_line(axes: Any, rows: Rows) -> None:
    axes.axhline(rows[0]["score"], color="0.6", linewidth=1, label="before training")


def save(figure: Any, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=110, bbox_inches="tight")


def methods(rows: Rows) -> None:
    found: dict[str, Rows] = defaultdict(list)
    for row in trained(rows):
        found[method(row["changes"])].append(row)
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    base_line(axes, rows)
    for (name, runs), (marker, _) in zip(sorted(found.items()), STYLES, strict=False):
        axes.errorbar(
            [run["kl"] for run in runs],
            [run["score"] for run in runs],
            xerr=[run["kl_standard_error"] for run in runs],
            yerr=[run["score_standard_error"] for run in runs],
            fmt=marker,
            elinewidth=0.7,
            label=f"{name}, {len(runs)} seed{'s' * (len(runs) > 1)}",
        )
    axes.set(xlabel="KL(policy | reference) in nats per response", ylabel=SCORE)
    axes.set_title("Four steps of 16 pairs (or 32 rows)")
    axes.legend(loc="lower right")
    save(figure, "methods")


def batch(rows: Rows) -> None:
    found: dict[str, Rows] = defaultdict(list)
    for row in trained(rows):
        changes = row["changes"]
        name = changes.get("aot_penalty", "logistic").replace("_", " ")
        found[name + (", micro-batch only" if "aot_batch" in changes else "")].append(row)
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    base_line(axes, rows)
    for (name, runs), (marker, dash) in zip(sorted(found.items()), STYLES, strict=False):
        runs = sorted(runs, key=effective_batch)
        axes.errorbar(
            [effective_batch(run) for run in runs],
            [run["score"] for run in runs],
            yerr=[run["score_standard_error"] for run in runs],
            fmt=marker + dash,
            elinewidth=0.7,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="effective batch (pairs)", ylabel=SCORE, title="Four steps, one seed")
    axes.legend(loc="lower right")
    save(figure, "batch")


def effective_batch(row: dict[str, Any]) -> int:
    changes = row["changes"]
    return changes.get("micro_batch_size", 8) * changes.get("gradient_accumulation_steps", 2)


def rate(rows: Rows) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    found: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in rows:
        if row["n"] == row["m"]:
            found[row["law"], row["penalty"]].append(row)
    for index, ((law, penalty), runs) in enumerate(found.items()):
        marker, dash = STYLES[index % 3]
        axes.loglog(
            [run["n"] for run in runs],
            [run["error"] for run in runs],
            marker + dash,
            color="C0" if law == "normal" else "C1",
            label=f"{law.replace('_', ' ')}, {penalty.replace('_', ' ')}",
        )
    sizes = [rows[0]["n"], max(row["n"] for row in rows)]
    axes.loglog(sizes, [n**-0.5 for n in sizes], color="0.5", linewidth=1, label="n^(-1/2)")
    axes.set(xlabel="n = m (sample size)", ylabel="mean error of the transport value")
    axes.set_title("Sample complexity, 200 samples each")
    axes.legend(fontsize="small")
    save(figure, "rate")


def main() -> None:
    for draw in (methods, batch, rate):
        rows = read(draw.__name__)
        if rows:
            draw(rows)


if __name__ == "__main__":
    main()
