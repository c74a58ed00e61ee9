"""The figures of a comparison of several evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..ot.dominance import bootstrap_intervals, dominance_statistics, quantile_curve
from .plots import Panel, draw_gap, draw_integrated_gap, draw_quantiles, literal, new_figure
from .scores import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#1f4e9c", "linestyle": "-"},
    {"color": "#d2691e", "linestyle": (0, (4, 2))},
    {"color": "#2e7d32", "linestyle": (0, (1, 1))},
    {"color": "#7b1fa2", "linestyle": (0, (5, 1, 1, 1))},
    {"color": "#555555", "linestyle": (0, (8, 2))},
)
_MARKERS = ("o", "s", "^", "D", "v", "x")
_TITLE_WIDTH = 48  # characters that fit above a column
_HISTORY_RESAMPLES = 200  # per evaluation: the bands are for looking at, not for quoting


class Named(NamedTuple):
    """An evaluation and the run that it belongs to."""

    run: str
    scores: Scores


def line_style(number: int, points: int) -> dict[str, Any]:
    """The style of line ``number``: 30 lines can be told apart in grey, by dashes and markers.

    Args:
        number: from 0.
        points: how many the line has; about eight of them are marked.
    """
    dashes, marker = number % len(_STYLES), number // len(_STYLES) % len(_MARKERS)
    marks = {"marker": _MARKERS[marker], "markersize": 3.5, "markevery": max(1, points // 8)}
    return _STYLES[dashes] | marks


def label_axes(axes: Axes, title: str, x: str) -> None:
    """Title and grid of a curve over ``x``."""
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)


def _units(units: Iterable[str]) -> str:
    return " or ".join(sorted(set(units)))


def side_by_side(names: Sequence[str], panels: Sequence[Panel], share_scale: bool) -> Figure:
    """Draws one column per evaluation: its quantile functions, their gap and its integral.

    Args:
        names: titles of the columns.
        panels: samples of the columns.
        share_scale: True for the same vertical scale in all columns.
    """
    figure = new_figure(4.6 * len(panels), 6.2)
    axes = figure.subplots(
        3,
        len(panels),
        squeeze=False,
        sharex=True,
        sharey="row" if share_scale else False,
        gridspec_kw={"height_ratios": [3, 1, 1]},
    )
    for column, (name, panel) in enumerate(zip(names, panels, strict=True)):
        title = literal("\n".join(wrap(name, _TITLE_WIDTH)))
        draw_quantiles(axes[0, column], panel._replace(title=title))
        draw_gap(axes[1, column], panel)
        draw_integrated_gap(axes[2, column], panel)
    return figure


def gaps(names: Sequence[str], panels: Sequence[Panel]) -> Figure:
    """Draws the gaps Q_first - Q_second of all evaluations in one plot; below 0 is violation."""
    figure = new_figure(7.0, 3.6)
    axes = figure.subplots()
    axes.axhspan(-1e9, 0, color="#b22222", alpha=0.08, linewidth=0)
    axes.axhline(0.0, color="black", linewidth=0.8)
    low, high = 0.0, 0.0
    for number, (name, panel) in enumerate(zip(names, panels, strict=True)):
        levels, x, y = quantile_curve(panel.first, panel.second, *panel.masses)
        # Steps have no markers: beyond five, width tells lines of one style apart.
        style = _STYLES[number % len(_STYLES)] | {"linewidth": 1.6 + number // len(_STYLES)}
        axes.stairs(x - y, levels, baseline=None, label=literal(name), **style)
        low, high = min(low, (x - y).min()), max(high, (x - y).max())
    padding = 0.05 * (high - low) or 1.0
    axes.set_ylim(low - padding, high + padding)
    axes.set_xlim(0, 1)
    axes.set_xlabel("quantile level t")
    axes.set_ylabel(f"gap [{_units(panel.unit for panel in panels)}]; below 0: violation")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(fontsize=8, framealpha=0.8, loc="best")
    return figure


def history(evaluations: Sequence[Named]) -> Figure | None:
    """Draws violation amount and W1 over the steps, with 95 % bootstrap bands.

    Both compare u with v (``Scores.u``, ``Scores.v``). There is one line per run and eval set.

    Returns:
        The figure, or None if no run has two evaluations of the same eval set.
    """
    ordered = sorted(evaluations, key=lambda e: (e.run, e.scores.eval_set, e.scores.step or 0))
    lines = [
        (key, [evaluation.scores for evaluation in group])
        for key, group in groupby(ordered, key=lambda e: (e.run, e.scores.eval_set))
    ]
    lines = [(key, scores) for key, scores in lines if len(scores) > 1]
    if not lines:
        return None
    figure = new_figure(9.6, 3.4)
    axes = figure.subplots(1, 2)
    for number, ((run, eval_set), line) in enumerate(lines):
        steps = [scores.step for scores in line]
        style = line_style(number, len(steps))
        values = [
            dominance_statistics(scores.u, scores.v, scores.u_mass, scores.v_mass)
            for scores in line
        ]
        bands = [
            bootstrap_intervals(
                *(scores.u, scores.v, scores.is_paired, _HISTORY_RESAMPLES),
                u_mass=scores.u_mass,
                v_mass=scores.v_mass,
            )
            for scores in line
        ]
        for axis, key in zip(axes, ("violation_amount", "w1"), strict=True):
            low, high = np.array([band[key] for band in bands]).T
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
            axis.plot(
                steps,
                [value[key] for value in values],
                label=literal(f"{run}, {eval_set}"),
                **style,
            )
    for axis, title in zip(axes, ("violation amount", "Wasserstein-1"), strict=True):
        label_axes(axis, f"{title} of the margins", "step")
        axis.set_ylabel(_units(scores.unit for _, line in lines for scores in line))
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8, framealpha=0.8)
    return figure
