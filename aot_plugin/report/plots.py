"""Quantile plots, after Figure 1 of the paper (arXiv 2406.05882).

Matplotlib (the extra ``plot``) is imported when a plot is drawn. Only its object interface with the
Agg canvas is used, so the user's backend and pyplot's figures are not affected.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..files import write_atomically
from ..ot.coupling import FloatArray
from ..ot.dominance import dominance_statistics, quantile_curve
from ..ot.second_order import integrated_gap
from .scores import Level, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG = logging.getLogger(__name__)

# Dark blue and orange can be told apart by the colour-blind and, with the line styles, in grey.
FIRST_STYLE: dict[str, Any] = {"color": "#1f4e9c", "linewidth": 1.8, "linestyle": "-"}
SECOND_STYLE: dict[str, Any] = {"color": "#d2691e", "linewidth": 1.8, "linestyle": (0, (4, 2))}
VIOLATION_STYLE: dict[str, Any] = {
    "facecolor": "#b22222",
    "alpha": 0.35,
    "hatch": "////",
    "edgecolor": "#5c0000",
}
DOMINANCE_STYLE: dict[str, Any] = {"facecolor": "#808080", "alpha": 0.15, "linewidth": 0.0}


@cache
def matplotlib_is_here() -> bool:
    """Whether plots can be drawn. If not, the first call logs what to install."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        LOG.warning("no quantile plots without matplotlib: pip install matplotlib")
        return False
    return True


class Panel(NamedTuple):
    """Two samples, the first of which should dominate the second.

    Attributes:
        first: [n].
        second: [m].
        names: names of the samples, in this order.
        quantity: label of the vertical axis, with its unit.
        title: title of the panel.
        unit: unit of the gap between the samples.
        masses: relative masses of the samples, [n] and [m]; None where all are equal.
    """

    first: FloatArray
    second: FloatArray
    names: tuple[str, str]
    quantity: str
    title: str
    unit: str = "nats"
    masses: tuple[FloatArray | None, FloatArray | None] = (None, None)


def names_of(scores: Scores) -> tuple[str, str]:
    """What the two samples of responses are called."""
    if scores.is_paired:
        return "chosen", "rejected"
    return ("highest level", "lower levels") if scores.levels else ("positive", "negative")


def rewards_panel(scores: Scores) -> Panel:
    """Panel (a): rewards of chosen and rejected (unpaired: positive and negative) completions."""
    names = names_of(scores)
    return Panel(
        scores.chosen_rewards,
        scores.rejected_rewards,
        names,
        f"reward β·log(π/π_ref) [{scores.unit}], β = {scores.beta:g}",
        f"(a) rewards: {names[0]} and {names[1]}",
        scores.unit,
        (scores.u_mass, scores.v_mass),
    )


def margins_panel(scores: Scores) -> Panel:
    """Panel (b), paired only: margins under policy and reference."""
    return Panel(
        scores.u,
        scores.v,
        ("policy", "reference"),
        f"margin log π(chosen) − log π(rejected) [{scores.unit}]",
        "(b) margins under policy and reference",
        scores.unit,
        (scores.u_mass, scores.v_mass),
    )


def draw_quantiles(axes: Axes, panel: Panel) -> None:
    """Draws both empirical quantile functions exactly, as steps over the level t.

    Where the first lies below the second, so that it doesn't dominate, the area between them is
    hatched; its size is ``violation_amount``. Elsewhere the area is light grey; its size is
    ``dominance_amount``.

    Raises:
        ValueError: if a sample is empty or not finite.
    """
    levels, x, y = quantile_curve(panel.first, panel.second, *panel.masses)
    first_name, second_name = panel.names
    _shade(axes, levels, x, y, label=f"violation: {first_name} below {second_name}")
    axes.stairs(y, levels, baseline=None, label=second_name, **SECOND_STYLE)
    axes.stairs(x, levels, baseline=None, label=first_name, **FIRST_STYLE)
    axes.set_ylabel(panel.quantity, fontsize=9)
    # Room for the legend above the curves. It is added as data limits, so that axes with a common
    # scale share it.
    low, high = min(x[0], y[0]), max(x[-1], y[-1])
    axes.update_datalim([(0.0, high + 0.3 * (high - low))])
    axes.autoscale_view()
    axes.legend(loc="upper left", fontsize=8, framealpha=0.8)
    found = dominance_statistics(panel.first, panel.second, *panel.masses)
    axes.set_title(
        f"{panel.title}\n"
        f"violation {found['violation_amount']:.3g} {panel.unit}, on "
        f"{found['violation_fraction']:.1%} of t; "
        f"dominance {found['dominance_amount']:.3g}; W1 {found['w1']:.3g}",
        loc="left",
        fontsize=8,
    )
    _level_axis(axes)


def draw_gap(axes: Axes, panel: Panel) -> None:
    """Draws the first quantile function minus the second; below 0 is violation, hatched.

    If the spread of the samples is large, the curves themselves are too close to tell apart.
    """
    levels, x, y = quantile_curve(panel.first, panel.second, *panel.masses)
    _shade(axes, levels, x - y, np.zeros_like(x))
    axes.stairs(x - y, levels, baseline=None, color="black", linewidth=1.0)
    axes.axhline(0.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylabel(f"gap [{panel.unit}]", fontsize=9)
    _level_axis(axes)


def draw_integrated_gap(axes: Axes, panel: Panel) -> None:
    """Draws the gap integrated from 0 to t; below 0 the first sample doesn't dominate the second in
    the second order."""
    levels, integral = integrated_gap(panel.first, panel.second, *panel.masses)
    for sign, style in ((1, DOMINANCE_STYLE), (-1, VIOLATION_STYLE)):
        where = (sign * integral > 0.0).tolist()
        axes.fill_between(levels, integral, where=where, interpolate=True, **style)
    axes.plot(levels, integral, color="black", linewidth=1.0)
    axes.axhline(0.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylabel(f"integrated\n[{panel.unit}]", fontsize=9)
    axes.set_xlabel("quantile level t", fontsize=9)
    _level_axis(axes)


def _shade(
    axes: Axes, levels: FloatArray, x: FloatArray, y: FloatArray, label: str | None = None
) -> None:
    # Each value is repeated at both ends of its step, so that fill_between follows the steps.
    t, upper, lower = np.repeat(levels, 2)[1:-1], np.repeat(x, 2), np.repeat(y, 2)
    axes.fill_between(t, lower, upper, where=(upper > lower).tolist(), **DOMINANCE_STYLE)
    axes.fill_between(
        t, lower, upper, where=(upper < lower).tolist(), label=label, **VIOLATION_STYLE
    )


def _level_axis(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)


def draw_levels(axes: Sequence[Axes], levels: Sequence[Level], unit: str) -> None:
    """Draws the quantile functions of all levels, the darker the higher; below them, the gaps of
    each level to the next lower one, and the integrals of the gaps. Gaps below 0 are violations.

    Args:
        axes: three, from the top.
        levels: at least two, lowest first.
        unit: of their values.
    """
    from matplotlib import colormaps

    curves, gaps, integrals = axes
    style: dict[str, Any] = {"baseline": None, "linewidth": 1.5}
    colours = [colormaps["viridis"](0.9 * (1.0 - level.value)) for level in levels]
    for level, colour in zip(levels, colours, strict=True):
        values = (level.logratios, level.logratios, level.mass, level.mass)
        at, x, _ = quantile_curve(*values)
        name = f"level {level.value:.2g}, n = {len(level.logratios)}"
        curves.stairs(x, at, color=colour, label=name, **style)
    for (low, high), colour in zip(pairwise(levels), colours[1:], strict=True):
        pair = (high.logratios, low.logratios, high.mass, low.mass)
        at, x, y = quantile_curve(*pair)
        gaps.stairs(x - y, at, color=colour, **style)
        integrals.plot(*integrated_gap(*pair), color=colour, linewidth=1.5)
    curves.legend(loc="upper left", fontsize=8, framealpha=0.8)
    curves.set_title("(b) levels, 1 is the highest", loc="left", fontsize=8)
    curves.set_ylabel(f"log-ratio log(π/π_ref) [{unit}]", fontsize=9)
    gaps.set_ylabel(f"gap to the next\nlower [{unit}]", fontsize=9)
    integrals.set_ylabel(f"integrated\n[{unit}]", fontsize=9)
    integrals.set_xlabel("quantile level t", fontsize=9)
    for axis in axes:
        _level_axis(axis)
    for axis in (gaps, integrals):
        axis.axhline(0.0, color="black", linewidth=0.8, linestyle=":")


def draw_panels(
    panels: Sequence[Panel], title: str, levels: Sequence[Level] = (), unit: str = "nats"
) -> Figure:
    """Draws one column per panel: the quantile functions and, below them, their gap and its
    integral; and one for all ``levels``, in ``unit``, if there are several.

    Raises:
        ImportError: without matplotlib.
        ValueError: if a sample is empty or not finite.
    """
    columns = len(panels) + (len(levels) > 1)
    figure = new_figure(5.2 * columns, 6.2)
    axes = figure.subplots(
        3, columns, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [3, 1, 1]}
    )
    for column, panel in enumerate(panels):
        draw_quantiles(axes[0, column], panel)
        draw_gap(axes[1, column], panel)
        draw_integrated_gap(axes[2, column], panel)
    if len(levels) > 1:
        draw_levels([row[-1] for row in axes], levels, unit)
    figure.suptitle(literal(title), fontsize=10)
    return figure


def quantile_figure(scores: Scores) -> Figure:
    """Draws the plot of one evaluation: panels (a) and (b) if paired, panel (a) if unpaired, and
    for graded rows the levels.

    Raises:
        ImportError: without matplotlib.
        ValueError: if a sample is empty or not finite.
    """
    panels = [rewards_panel(scores)]
    if scores.is_paired:
        panels.append(margins_panel(scores))
    return draw_panels(panels, describe(scores), scores.levels, scores.unit)


def literal(text: str) -> str:
    """Escapes dollar signs in ``text``, which matplotlib would read as formulas."""
    return text.replace("$", r"\$")


def describe(scores: Scores) -> str:
    """Eval set, step and numbers of completions, and whether they have weights, on one line."""
    if scores.is_paired:
        size = f"n = {len(scores.u)} pairs"
    elif levels := scores.levels:
        size = f"n = {sum(len(level.logratios) for level in levels)} rows of {len(levels)} levels"
    else:
        size = f"n = {len(scores.u)} positives, m = {len(scores.v)} negatives"
    weighted = "" if scores.u_mass is None else ", weighted"
    step = "" if scores.step is None else f", step {scores.step}"
    return f"{scores.eval_set}{step}, {size}{weighted}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure with the Agg canvas, not registered with pyplot. Sizes are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_quantile_plot(scores: Scores, directory: str | os.PathLike[str]) -> Path | None:
    """Writes the plot to ``directory``/quantiles-<eval set>-step<step>.png.

    Returns:
        The path; None without matplotlib, in which case a hint is logged once.

    Raises:
        ValueError: if a sample is empty or not finite.
    """
    if not matplotlib_is_here():
        return None
    figure = quantile_figure(scores)
    path = Path(directory) / f"quantiles-{scores.stem}.png"
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path
