"""What the plots show is read back from their artists; that nothing global is touched, from a
fresh interpreter."""

import logging
import subprocess
import sys

import numpy as np
import pytest

from aot_plugin.ot.dominance import dominance_statistics, quantile_curve
from aot_plugin.ot.second_order import integrated_gap, second_order_statistics
from aot_plugin.report import plots
from aot_plugin.report.scores import Scores

pytest.importorskip("matplotlib")


def drawn_steps(axes, label):
    [patch] = [p for p in axes.patches if p.get_label() == label]
    return patch.get_data()


def area(collections):
    """Sum of the areas of filled polygons (shoelace)."""
    total = 0.0
    for path in (path for c in collections for path in c.get_paths()):
        x, y = path.vertices.T
        total += abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    return total


@pytest.mark.parametrize("which", ["paired", "unpaired"])
def test_curves_are_the_quantile_functions(which, make_paired, make_unpaired):
    scores = make_paired() if which == "paired" else make_unpaired()
    axes = plots.quantile_figure(scores).axes
    expected = [
        (scores.chosen_rewards, scores.rejected_rewards)
        + (("chosen", "rejected") if which == "paired" else ("positive", "negative"))
    ]
    if which == "paired":
        expected.append((scores.u, scores.v, "policy", "reference"))
    assert len(axes) == 3 * len(expected)
    for column, (first, second, first_name, second_name) in enumerate(expected):
        levels, x, y = quantile_curve(first, second)
        for name, curve in ((first_name, x), (second_name, y)):
            steps = drawn_steps(axes[column], name)
            np.testing.assert_array_equal(steps.edges, levels)
            np.testing.assert_array_equal(steps.values, curve)
        gap = axes[len(expected) + column].patches[0].get_data()
        np.testing.assert_array_equal(gap.values, x - y)
        integral = axes[2 * len(expected) + column].lines[0].get_xydata()
        np.testing.assert_array_equal(integral.T, integrated_gap(first, second))


def test_shaded_areas_are_the_amounts(make_paired):
    scores = make_paired(shift=0.3, spread=4)
    figure = plots.quantile_figure(scores)
    for column, (u, v) in enumerate(
        [(scores.chosen_rewards, scores.rejected_rewards), (scores.u, scores.v)]
    ):
        found = dominance_statistics(u, v)
        for row in (0, 2):
            collections = figure.axes[row + column].collections
            hatched = [c for c in collections if c.get_hatch()]
            plain = [c for c in collections if not c.get_hatch()]
            assert area(hatched) == pytest.approx(found["violation_amount"], rel=1e-9)
            assert area(plain) == pytest.approx(found["dominance_amount"], rel=1e-9)
        assert found["violation_amount"] > 0
        found, collections = second_order_statistics(u, v), figure.axes[4 + column].collections
        for hatched, key in ((True, "violation_amount"), (False, "dominance_amount")):
            drawn = [c for c in collections if bool(c.get_hatch()) == hatched]
            assert area(drawn) == pytest.approx(found[f"second_order_{key}"], rel=1e-9, abs=1e-12)


def test_a_plot_says_what_it_shows(make_paired, make_unpaired):
    figure = plots.quantile_figure(make_paired(n=60, step=20, eval_set="eval_$held$_out"))
    assert figure.get_suptitle() == r"eval_\$held\$_out, step 20, n = 60 pairs"
    for axes in figure.axes[:2]:
        assert "[nats]" in axes.get_ylabel()
    for axes in figure.axes[4:]:
        assert axes.get_xlabel() == "quantile level t"
    statistics = dominance_statistics(make_paired().u, make_paired().v)
    assert f"W1 {statistics['w1']:.3g}" in figure.axes[1].get_title("left")
    figure = plots.quantile_figure(make_unpaired(n=60, positives=25))
    assert "n = 25 positives, m = 35 negatives" in figure.get_suptitle()


def test_lines_differ_in_grey(make_paired):
    axes = plots.quantile_figure(make_paired()).axes[0]
    styles = {patch.get_linestyle() for patch in axes.patches}
    assert len(styles) == 2


SHAPES = {
    "early": lambda t: t**0.1,
    "late": lambda t: t**10,
    "both": lambda t: np.clip((t - 0.15) * 50, 0, 1) + t / 10,
    "negative": lambda t: -1e4 + 300 * t,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_legend_keeps_off_the_curves(shape):
    t = np.linspace(0, 1, 200)
    x = SHAPES[shape](t)
    figure = plots.draw_panels([plots.Panel(x, x[::-1].copy(), ("a", "b"), "x", "")], "")
    figure.canvas.draw()
    axes = figure.axes[0]
    box = axes.get_legend().get_window_extent()
    points = axes.transData.transform(np.column_stack([t, x]))
    assert not any(box.contains(*point) for point in points)


def test_saved_plot_is_a_png(make_paired, tmp_path):
    path = plots.save_quantile_plot(make_paired(eval_set="../$x^$"), tmp_path / "aot")
    assert path.parent == tmp_path / "aot"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_without_matplotlib_one_hint_and_no_plot(make_paired, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plots.matplotlib_is_here.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="aot_plugin"):
            assert plots.save_quantile_plot(make_paired(), tmp_path) is None
            assert plots.save_quantile_plot(make_paired(), tmp_path) is None
    finally:
        plots.matplotlib_is_here.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "no quantile plots without matplotlib: pip install matplotlib"
    ]


def test_no_pyplot_and_no_backend_is_touched(make_paired, tmp_path):
    data = make_paired().save(tmp_path)
    code = f"""
import sys
from aot_plugin.report.scores import Scores
from aot_plugin.report.plots import save_quantile_plot
assert "matplotlib" not in sys.modules
save_quantile_plot(Scores.load({str(data)!r}), {str(tmp_path)!r})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
assert "torch" not in sys.modules
import matplotlib
assert matplotlib.rcParams._get_backend_or_none() is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_one_completion_can_be_drawn():
    one = Scores.unpaired(
        beta=1, step=0, eval_set="e", logps=[1, 2], ref_logps=[0, 0], label=[1, 0], tokens=[1, 1]
    )
    plots.quantile_figure(one).canvas.draw()
