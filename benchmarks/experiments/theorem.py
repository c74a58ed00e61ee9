"""What a run of the sweep `theorem` says: violation on held-out and on training rows, and its rate.

The evaluation of such a run has the held-out rows first and the training rows after them
(`shuffle_merged_datasets: false`), so its file holds both samples.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampling import read_jsonl

from aot_plugin.ot.dominance import dominance_statistics
from aot_plugin.ot.penalties import PENALTIES
from aot_plugin.ot.transport import transport_value
from aot_plugin.report.scores import Scores, load_run

KEPT = ("violation_fraction", "violation_amount", "dominance_amount", "gap_q05", "gap_q50")


def part_statistics(scores: Scores, rows: slice, penalty: str) -> dict[str, float]:
    """The statistics and the transport value of some rows of an unpaired evaluation."""
    columns = {name: values[rows] for name, values in scores.columns.items()}
    ratios = columns["logps"] - columns["ref_logps"]
    u, v = ratios[columns["label"]], ratios[~columns["label"]]
    found = dominance_statistics(u, v)
    value = transport_value(
        torch.from_numpy(u), torch.from_numpy(v), lambda z: PENALTIES[penalty](z, scores.beta)
    )
    return {"loss": value.item(), **{name: found[name] for name in KEPT}}


def measure(output: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """Both parts of a finished run, from the last evaluation in its output directory."""
    scores = load_run(output)[-1]
    train = Path(cfg["datasets"][0]["path"])
    labels = [row["label"] for row in read_jsonl(Path(cfg["test_datasets"][0]["path"]))]
    if not np.array_equal(scores.columns["label"][: len(labels)], labels):
        raise ValueError(f"{output}: the evaluation does not begin with the held-out rows")
    penalty = cfg["aot_penalty"]
    return {
        "rows": len(scores.columns["label"]) - len(labels),
        "data": train.stem,
        "heldout": part_statistics(scores, slice(len(labels)), penalty),
        "train": part_statistics(scores, slice(len(labels), None), penalty),
    }


def rate(sizes: list[int], excess: list[float], seed: int = 0) -> tuple[float, float, float]:
    """The exponent of excess = c n^exponent over runs, with a 95 per cent bootstrap interval.

    Runs of one size are resampled together, so the interval is that of the mean curve.
    """
    n, y = np.asarray(sizes), np.asarray(excess)
    groups = [y[n == size] for size in np.unique(n)]
    x = np.log(np.unique(n))

    def slope(means: list[float]) -> float:
        return float(np.polyfit(x, np.log(means), 1)[0])

    rng = np.random.default_rng(seed)
    drawn = [slope([rng.choice(g, len(g)).mean() for g in groups]) for _ in range(2000)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return slope([g.mean() for g in groups]), float(low), float(high)
