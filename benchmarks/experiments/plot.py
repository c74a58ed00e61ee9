"""Figures of the experiments, from results/*.jsonl into docs/figures.

python benchmarks/experiments/plot.py
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
FIGURES = HERE.parents[1] / "docs" / "figures"
# Readable in grey: every curve has a marker and a dash of its own.
STYLES = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"))
SCORE = "mean sentiment of sampled responses (VADER, -1 to 1)"
Rows = list[dict[str, Any]]


def read(name: str) -> Rows:
    file = HERE / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def by(rows: Rows, name: Callable[[dict[str, Any]], str]) -> dict[str, Rows]:
    """The runs by a name that is made of what they change."""
    found: dict[str, Rows] = defaultdict(list)
    for row in rows:
        if row["changes"] != {"rl": "none"}:
            found[name(row["changes"])].append(row)
    return found


def method(changes: dict[str, Any]) -> str:
    rl = changes.get("rl", "aot")
    return rl.upper() if rl != "aot" else f"AOT {changes.get('aot_mode', 'paired')}"


def penalty(changes: dict[str, Any]) -> str:
    name = changes.get("aot_penalty", "logistic").replace("_", " ")
    return name + (", micro-batch only" if "aot_batch" in changes else "")


def base_line(axes: Any, rows: Rows) -> None:
    axes.axhline(rows[0]["score"], color="0.6", linewidth=1, label="before training")


def save(figure: Any, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=110, bbox_inches="tight")


def errorbar(axes: Any, runs: Rows, x: list[float], **style: Any) -> None:
    scores, errors = ([run[key] for run in runs] for key in ("score", "score_standard_error"))
    axes.errorbar(x, scores, yerr=errors, elinewidth=0.7, **style)


def matched(rows: Rows) -> None:
    """A curve per method over learning rates: means over seeds, with the lowest and the highest."""
    figure, axes = plt.subplots(figsize=(7, 4.8))
    base_line(axes, rows)
    for index, (name, runs) in enumerate(sorted(by(rows, method).items())):
        marker, dash = STYLES[index]
        at_rate: dict[float, Rows] = defaultdict(list)
        for run in runs:
            at_rate[run["changes"].get("learning_rate", 0.001)].append(run)
        points = [[(run["kl"], run["score"]) for run in at_rate[r]] for r in sorted(at_rate)]
        x, y = np.array([np.mean(point, axis=0) for point in points]).T
        axes.plot(x, y, marker + dash, color=f"C{index}", label=f"{name}, {len(points[0])} seeds")
        for point in points:
            scores = [score for _, score in point]
            place = float(np.mean([kl for kl, _ in point]))
            axes.vlines(place, min(scores), max(scores), color=f"C{index}", linewidth=0.7)
    axes.set_xscale("function", functions=(np.sqrt, np.square))
    axes.set_xticks([0, 0.5, 2, 5, 10, 20, 30])
    axes.set(xlabel="KL(policy | reference) in nats per response (root scale)", ylabel=SCORE)
    axes.set_title("Four steps at learning rates 0.0003, 0.0006, 0.001 and 0.002")
    axes.legend(loc="upper left")
    save(figure, "matched")


def beta(rows: Rows) -> None:
    figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(6.5, 6))
    base_line(upper, rows)
    for (name, runs), (marker, dash) in zip(sorted(by(rows, method).items()), STYLES, strict=False):
        runs = sorted(runs, key=beta_of)
        errorbar(upper, runs, [beta_of(run) for run in runs], fmt=marker + dash, label=name)
        lower.plot([beta_of(run) for run in runs], [run["kl"] for run in runs], marker + dash)
    upper.set(ylabel="mean sentiment (VADER)", title="Four steps, logistic penalty, one seed")
    upper.set_ylim(bottom=0.3)
    lower.set(xlabel="beta", ylabel="KL(policy | reference), nats", xscale="log")
    upper.legend(loc="lower left", ncols=3, fontsize="small")
    save(figure, "beta")


def beta_of(row: dict[str, Any]) -> float:
    return row["changes"].get("rl_beta", 0.1)


def steps(rows: Rows) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    names = {"step": "sorted over the step", "micro_batch": "inside micro-batches of one (DPO)"}
    found = by(rows, lambda changes: names[changes["aot_batch"]])
    for (name, runs), (marker, dash) in zip(sorted(found.items()), STYLES, strict=False):
        for seed in sorted({run["changes"].get("seed", 1) for run in runs}):
            mine = [run for run in runs if run["changes"].get("seed", 1) == seed]
            mine.sort(key=lambda run: run["kl"])
            style = {"fmt": marker + dash, "label": f"{name}, seed {seed}"}
            errorbar(axes, mine, [run["kl"] for run in mine], **style)
    axes.set(xlabel="KL(policy | reference) in nats per response", ylabel=SCORE)
    axes.set_title("8 and 16 steps of 8 pairs")
    axes.legend(fontsize="small", loc="lower right")
    save(figure, "steps")


def batch(rows: Rows) -> None:
    found = by(rows, penalty)
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    base_line(axes, rows)
    for (name, runs), (marker, dash) in zip(sorted(found.items()), STYLES, strict=False):
        runs = sorted(runs, key=effective_batch)
        x = [effective_batch(run) for run in runs]
        errorbar(axes, runs, x, fmt=marker + dash, label=name)
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
    for draw in (matched, batch, beta, steps, rate):
        rows = read(draw.__name__)
        if rows:
            draw(rows)


if __name__ == "__main__":
    main()
