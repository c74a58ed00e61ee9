"""What a run logged while it trained, as curves over the steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .comparison import label_axes, line_style
from .plots import literal, new_figure
from .saved_arguments import checkpoints

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATE = "trainer_state.json"

CURVES = {
    "loss": "loss",
    "violation amount": "aot/violation_amount",
    "dominance amount": "aot/dominance_amount",
    "recoupled share": "aot/recoupled_fraction",
    "reward, chosen": "rewards/chosen",
    "reward, rejected": "rewards/rejected",
    "gradient norm": "grad_norm",
    "-log p per token, chosen": "aot/nll",
}
"""Titles of the curves, and the keys of the log that they show."""

_COLUMNS = 4

Log = Sequence[Mapping[str, Any]]


def load_log(run: Path) -> Log:
    """The training log of a run: that of its output directory, or of its latest checkpoint.

    Returns:
        The entries in order, each with ``step``; empty if there is no log.
    """
    for place in [run, *reversed(checkpoints(run))]:
        if (place / STATE).is_file():
            state = json.loads((place / STATE).read_text(encoding="utf-8"))
            return [entry for entry in state.get("log_history", []) if "step" in entry]
    return []


def training_curves(logs: Mapping[str, Log]) -> Figure | None:
    """Draws the curves of ``CURVES`` that any run has, with a line per run.

    Args:
        logs: by name of the run.

    Returns:
        The figure; None if no run logged one of them at two steps.
    """
    points = {
        title: {run: found for run, log in logs.items() if len(found := _points(log, key)) > 1}
        for title, key in CURVES.items()
    }
    points = {title: of_runs for title, of_runs in points.items() if of_runs}
    if not points:
        return None
    rows = -(-len(points) // _COLUMNS)
    figure = new_figure(3.2 * _COLUMNS, 2.6 * rows + 0.3 * (1 + len(logs) // _COLUMNS))
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    lines: dict[str, Any] = {}
    for axis, (title, of_runs) in zip(axes, points.items(), strict=False):
        for number, run in enumerate(logs):
            if run in of_runs:
                steps, values = zip(*of_runs[run], strict=True)
                style = line_style(number, len(steps))
                (lines[run],) = axis.plot(steps, values, linewidth=1.3, **style)
        label_axes(axis, title, "step")
    for axis in axes[len(points) :]:
        axis.set_visible(False)
    figure.legend(
        [lines[run] for run in logs if run in lines],
        [literal(run) for run in logs if run in lines],
        loc="outside lower center",
        ncols=_COLUMNS,
        fontsize=8,
    )
    return figure


def _points(log: Log, key: str) -> list[tuple[float, float]]:
    return [(e["step"], e[key]) for e in log if isinstance(e.get(key), int | float)]
