import json
import logging
import sys

import numpy as np
import pytest

from aot_plugin.report import load_run, record_evaluation
from aot_plugin.report.record import _resamples_within_seconds
from aot_plugin.report.scores import Scores
from aot_plugin.report.summary import summarize


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_everything_is_written(mode, make_paired, make_unpaired, tmp_path):
    pytest.importorskip("matplotlib")
    scores = make_paired() if mode == "paired" else make_unpaired()
    written = record_evaluation(scores, tmp_path)
    assert {key: path.name for key, path in written.items()} == {
        "scores": "scores-eval-step20.parquet",
        "summary": "dominance-eval-step20.json",
        "plot": "quantiles-eval-step20.png",
    }
    assert sorted(tmp_path.glob("aot/*")) == sorted(written.values())
    assert json.loads(written["summary"].read_text()) == summarize(load_run(tmp_path)[0])


@pytest.mark.parametrize("problem", ["one-sided", "nan"])
def test_data_without_statistics_is_kept_and_said(problem, make_unpaired, tmp_path, caplog):
    scores = make_unpaired(positives=0 if problem == "one-sided" else 25)
    if problem == "nan":
        logps = np.full(60, np.nan)
        scores = Scores("unpaired", 1, 20, "eval", dict(scores.columns) | {"logps": logps})
    with caplog.at_level(logging.WARNING, logger="aot_plugin"):
        written = record_evaluation(scores, tmp_path)
    assert list(written) == ["scores"]
    [message] = [record.getMessage() for record in caplog.records]
    assert "chosen rewards: " in message and "scores-eval-step20.parquet" in message


def test_a_plotting_problem_does_not_end_a_training(make_paired, tmp_path, monkeypatch, caplog):
    def explode(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr("aot_plugin.report.record.save_quantile_plot", explode)
    with caplog.at_level(logging.WARNING, logger="aot_plugin"):
        written = record_evaluation(make_paired(), tmp_path)
    assert list(written) == ["scores", "summary"]
    assert "no font" in caplog.text


def test_no_matplotlib_is_no_problem(make_paired, tmp_path, monkeypatch):
    monkeypatch.setattr("aot_plugin.report.record.save_quantile_plot", lambda *_: None)
    assert list(record_evaluation(make_paired(), tmp_path)) == ["scores", "summary"]


@pytest.mark.parametrize(("pairs", "expected"), [(10, 1000), (10_000, 1000), (40_000, 250)])
def test_resampling_is_bounded(pairs, expected, make_paired):
    assert _resamples_within_seconds(make_paired(n=pairs)) == expected


def test_importing_the_report_is_light():
    import subprocess

    code = (
        "import sys, aot_plugin.report\n"
        "heavy = {'torch', 'matplotlib', 'scipy', 'pyarrow', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
