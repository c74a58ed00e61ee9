import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from aot_plugin.__main__ import main
from aot_plugin.ot.dominance import dominance_statistics
from aot_plugin.report import page, record_evaluation
from aot_plugin.report.cli import run_names
from aot_plugin.report.comparison import Named, gaps, history, side_by_side
from aot_plugin.report.curves import load_log, training_curves
from aot_plugin.report.page import comparison_page
from aot_plugin.report.plots import margins_panel, quantile_figure
from aot_plugin.report.samples import Samples, load_samples
from aot_plugin.report.summary import summarize

pytest.importorskip("matplotlib")

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Collects tags, text and table cells; fails where tags don't nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.rows = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def checked(text):
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


HOSTILE = "<script>alert(1)</script>\"'$\\frac&"


def test_page_is_self_contained_and_escaped(make_paired, make_unpaired):
    runs = [
        Named(HOSTILE, make_paired(eval_set="<img src=x>")),
        Named("b", make_paired(seed=1)),
        Named("c", make_unpaired()),
    ]
    text = comparison_page(runs, n_resamples=20)
    checker = checked(text)
    tags = {tag for tag, _ in checker.tags}
    assert not tags & {"script", "link", "iframe", "object"}
    images = [attributes for tag, attributes in checker.tags if tag == "img"]
    assert images
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    outside = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|url\(|@import", outside)
    assert any(HOSTILE in row[0] and "<img src=x>" in row[0] for row in checker.rows)


def test_numbers_in_the_tables_are_the_summarys(make_paired):
    scores = make_paired(shift=0.3, spread=4)
    found = summarize(scores, 20)
    rows = [r for r in checked(comparison_page([Named("a", scores)], 20)).rows if "a ·" in r[0]]
    overview, margins, second, rewards, chosen, rejected = rows
    order = found["margins"]["second_order"]
    amount = order["statistics"]["second_order_violation_amount"]
    assert second[2].startswith(f"{amount:.4g}[")
    assert second[4] == f"{order['test']['p_value']:.3g}paired"
    low, high = found["accuracy_interval"]
    assert overview[5] == f"{found['accuracy']:.1%}[{low:.1%}, {high:.1%}]"
    assert overview[6] == f"{found['recoupled_fraction']:.1%}"
    for row, part in ((margins, found["margins"]), (rewards, found["rewards"])):
        low, high = part["intervals"]["violation_amount"]
        amount = part["statistics"]["violation_amount"]
        assert row[2] == f"{amount:.4g}[{low:.4g}, {high:.4g}]"
        assert row[4].startswith(f"{part['statistics']['w1']:.4g}[")
        assert row[8].startswith(f"{part['violation_ratio']:.3f}upper")
        assert row[9] == f"{part['test']['p_value']:.3g}paired"
    for row, kind in ((chosen, "chosen"), (rejected, "rejected")):
        assert row[1] == f"{found['length'][kind]['spearman']:.3f}"
        assert row[2].startswith(f"{found['length'][kind]['quartiles'][0]['mean_reward']:.4g}")


def test_the_last_step_is_tabulated_and_all_steps_drawn(make_paired):
    evaluations = [Named("a", make_paired(step=step, seed=step)) for step in (40, 20, 60)]
    text = comparison_page(evaluations, n_resamples=20)
    assert "step 60" in text and "step 20" not in text and "step 40" not in text
    assert "Over the steps" in text
    assert "Over the steps" not in comparison_page(evaluations[:1], n_resamples=20)


def test_an_unknown_step_is_not_shown(make_paired):
    text = comparison_page([Named("a", make_paired(step=None))], n_resamples=20)
    assert "a · eval<" in text and "step None" not in text and "step 0" not in text


def test_history_shows_the_statistics(make_paired):
    evaluations = [Named("a", make_paired(step=step, seed=step)) for step in (40, 20)]
    evaluations.append(Named("once", make_paired()))
    violation, w1 = history(evaluations).axes
    for axes, key in ((violation, "violation_amount"), (w1, "w1")):
        [line] = axes.lines
        assert line.get_xdata().tolist() == [20, 40]
        expected = [dominance_statistics(e.scores.u, e.scores.v)[key] for e in evaluations[1::-1]]
        assert line.get_ydata() == pytest.approx(expected)
    assert history(evaluations[1:]) is None


def test_columns_share_a_scale_only_where_asked(make_paired):
    panels = [margins_panel(make_paired(seed=seed)) for seed in (0, 1)]
    shared = side_by_side(["a", "b"], panels, share_scale=True).axes
    assert shared[0].get_ylim() == shared[1].get_ylim()
    apart = side_by_side(["a", "b"], panels, share_scale=False).axes
    assert apart[0].get_ylim() != apart[1].get_ylim()


def test_gaps_of_all_runs_differ_in_grey(make_paired):
    panels = [margins_panel(make_paired(seed=seed)) for seed in range(5)]
    [axes] = gaps(list("abcde"), panels).axes
    labelled = [p for p in axes.patches if p.get_label() in set("abcde")]
    assert len({str(patch.get_linestyle()) for patch in labelled}) == 5


def test_without_matplotlib_the_tables_remain(make_paired, monkeypatch):
    monkeypatch.setattr(page, "matplotlib_is_here", lambda: False)
    checker = checked(comparison_page([Named("a", make_paired())], n_resamples=20))
    assert not [tag for tag, _ in checker.tags if tag == "img"]
    assert len([row for row in checker.rows if "a ·" in row[0]]) == 6


def test_an_evaluation_without_statistics_is_named(make_unpaired):
    with pytest.raises(ValueError, match="bad · eval · step 20: chosen rewards"):
        comparison_page([Named("bad", make_unpaired(positives=0))])


def test_an_evaluation_without_statistics_is_left_out_of_many(make_unpaired):
    """Its run keeps its other steps."""
    runs = [Named("good", make_unpaired()), Named("good", make_unpaired(step=30))]
    runs += [Named("bad", make_unpaired(step=10)), Named("bad", make_unpaired(positives=0))]
    text = comparison_page(runs, n_resamples=20)
    assert "Left out: bad · eval · step 20: chosen rewards" in text
    rows = {row[0] for row in checked(text).rows}
    assert {"good · eval · step 30", "bad · eval · step 10"} <= rows
    assert "bad · eval · step 20" not in rows


def test_command(make_paired, tmp_path, capsys):
    for name in ("one", "two"):
        record_evaluation(make_paired(n=20), tmp_path / name)
    output = tmp_path / "deep" / "report.html"
    runs = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(["report", *runs, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert "one · eval · step 20" in output.read_text(encoding="utf-8")


def test_command_scores_a_run_without_data(lora_run, pairs, tmp_path):
    output = tmp_path / "report.html"
    arguments = ["report", str(lora_run), "--eval-data", str(pairs), "--output", str(output)]
    assert main(arguments) == 0
    assert "run · held out · step 12" in output.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing: no such directory"),
        (["empty"], "scores-*.parquet"),
        (["empty", "empty"], "a run is given twice"),
        (["empty", "--eval-data", "none.jsonl"], "no model here"),
    ],
)
def test_errors_are_one_line_for_the_user(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["report", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("python -m aot_plugin report: error: ") and message in error


def test_what_is_missing_is_said_before_a_run_is_scored(lora_run, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("aot_plugin.report.scoring.score_run", lambda *args, **keys: pytest.fail())
    assert main(["report", str(lora_run), str(other), "--eval-data", "rows.jsonl"]) == 1
    assert f"{other}: no training arguments to read beta from" in capsys.readouterr().err


def test_run_names(tmp_path):
    paths = [tmp_path / "x" / "out", tmp_path / "y" / "out", tmp_path / "z"]
    assert run_names(paths[:1]) == ["out"]
    assert run_names(paths[:2]) == ["x/out", "y/out"]
    assert run_names(paths[1:]) == ["out", "z"]


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom aot_plugin.__main__ import main\n"
        "try:\n    main(['report', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'matplotlib', 'scipy', 'pyarrow', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
    assert b"--eval-data" in run.stdout


def test_answers_stand_beside_the_first_ones(make_paired, tmp_path):
    """By prompt, escaped, and without those in between; runs without answers have no section."""
    pairs = [("one?", "1"), (HOSTILE, "a  b\nc"), ("gone?", "?")]
    for step, answered in ((20, pairs[:2]), (0, pairs), (10, [("one?", "hidden")])):
        prompts, answers = zip(*answered, strict=True)
        marked = [f"{answer} at {step}" for answer in answers]
        Samples(step, "<img src=x>", prompts, marked).save(tmp_path / "aot")
    loaded = load_samples(tmp_path)
    assert [samples.step for samples in loaded] == [0, 10, 20]
    text = comparison_page([Named("a", make_paired())], 20, {"a": loaded, "b": []})
    rows = checked(text).rows
    assert rows[rows.index(["prompt", "answer after step 0", "answer after step 20"]) :] == [
        ["prompt", "answer after step 0", "answer after step 20"],
        ["one?", "1 at 0", "1 at 20"],
        [HOSTILE, "a  b\nc at 0", "a  b\nc at 20"],
        ["gone?", "? at 0", "–"],
    ]
    assert len(re.findall(r"<h2 id=\S+>Answers: ", text)) == 1 and "hidden" not in text
    (alone,) = [page._answers("a", loaded[:1])[2]]
    assert checked(alone).rows[0] == ["prompt", "answer after step 0"]


@pytest.mark.parametrize("weighted", [False, True])
def test_levels_have_tables_and_curves(weighted, make_graded, make_unpaired):
    scores = make_graded(weighted=weighted)
    text = comparison_page([Named("graded", scores), Named("plain", make_unpaired())])
    rows = [row for row in checked(text).rows if row and " against " in row[0]]
    pairs = [("1", "0.67"), ("0.67", "0.33"), ("0.33", "0")]
    names = [f"graded · eval · step 20 · level {high} against {low}" for high, low in pairs]
    assert [row[0] for row in rows] == names * 2  # of both orders
    levels = scores.levels
    for row, high, low in zip(rows, levels[:0:-1], levels[-2::-1], strict=False):
        masses = (high.mass, low.mass)
        found = dominance_statistics(high.logratios, low.logratios, *masses)
        assert row[1].startswith(f"{found['violation_fraction']:.1%}[")
        assert row[2].startswith(f"{found['violation_amount']:.4g}[")
    assert rows[1][1].split("%")[0] != "0.0"  # the third level lies below the second
    assert "levels of graded" in text and "levels of plain" not in text


def test_contents_lead_to_every_part(make_paired):
    checker = checked(comparison_page([Named("a", make_paired())], n_resamples=20))
    anchors = [tag[1]["id"] for tag in checker.tags if tag[0] == "h2"]
    links = [tag[1]["href"] for tag in checker.tags if tag[0] == "a"]
    assert links == [f"#{anchor}" for anchor in anchors] and len(links) == 3


def test_training_curves_of_twenty_runs(make_paired, tmp_path):
    logs = {}
    for number in range(20):
        run = tmp_path / f"run-{number}"
        history = [{"step": s, "loss": number / s, "aot/violation_amount": s} for s in (1, 2, 4)]
        history.append({"step": 4, "eval_loss": 1.0})
        # A run that was stopped has the log of its latest checkpoint.
        for place in [run / "checkpoint-2", run / "checkpoint-10"] if number % 2 else [run]:
            place.mkdir(parents=True)
            entries = history if place.name != "checkpoint-2" else history[:1]
            (place / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
        logs[run.name] = load_log(run)
    logs["none"] = load_log(tmp_path)
    figure = training_curves(logs)
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in drawn] == ["loss", "violation amount"]
    assert [line.get_ydata().tolist() for line in drawn[0].lines] == [
        [number, number / 2, number / 4] for number in range(20)
    ]
    styles = {(line.get_marker(), str(line.get_linestyle())) for line in drawn[0].lines}
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 20 and len({line.get_color() for line in drawn[0].lines}) == 5
    dashes = {(line.get_marker(), str(line._dash_pattern)) for line in drawn[0].lines}
    assert len(styles | dashes) >= 20
    assert training_curves({"one": logs["run-0"][:1]}) is None
    page_text = comparison_page([Named("run-0", make_paired())], 20, logs=logs)
    assert ">Training</h2>" in page_text


def test_every_level_is_drawn(make_graded):
    scores = make_graded()
    top, gaps, integrals = quantile_figure(scores).axes[1::2]
    labels = [text.get_text() for text in top.get_legend().get_texts()]
    assert labels == [
        f"level {level.value:.2g}, n = {len(level.logratios)}" for level in scores.levels
    ]
    curves = [patch.get_data() for patch in top.patches]
    for level, curve in zip(scores.levels, curves, strict=True):
        assert curve.values.tolist() == sorted(level.logratios)
    lightness = [sum(patch.get_edgecolor()[:3]) for patch in top.patches]
    assert lightness == sorted(lightness, reverse=True)
    assert len(gaps.patches) == 3 and min(gaps.patches[1].get_data().values) < 0
    assert len(integrals.lines) == 3 + 1
