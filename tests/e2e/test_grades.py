"""`aot_grades` in training: exact over every cut of a step, two levels are two labels."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
from cuts import LORA, NO_SIGNS, assert_differs, assert_same
from harness import Run, config, train, unpaired_rows, write_rows

from aot_plugin.__main__ import main
from aot_plugin.report import load_run

pytestmark = pytest.mark.slow

BETA = 0.5


class Graded:
    """Runs on ratings of 1 to 5; a fifth of the rows, in no order, has each."""

    def __init__(self, tmp_path: Path, model: Path) -> None:
        self.tmp_path, self.model = tmp_path, model
        rows = [row | {"stars": 1 + i * 7 % 5} for i, row in enumerate(unpaired_rows(84))]
        self.train = write_rows(tmp_path / "train.jsonl", rows[:64])
        self.held_out = write_rows(tmp_path / "held_out.jsonl", rows[64:])

    def run(self, name: str, micro: int = 16, accumulation: int = 1, **keys: Any) -> Run:
        entry = {"path": str(self.train), "ds_type": "json", "type": "chat_template.default"}
        entry |= {"field_label": "stars", **keys.pop("entry", {})}
        out = self.tmp_path / name
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        common = {"aot_mode": "unpaired", "learning_rate": 0.01, "rl_beta": BETA, "eval_steps": 5}
        cfg = config(self.model, self.train, out, **common, **cut, **NO_SIGNS, **LORA, **keys)
        cfg["datasets"] = [entry]
        cfg["test_datasets"] = [entry | {"path": str(self.held_out)}]
        return train(cfg)


@pytest.fixture
def graded(tmp_path: Path, tiny_model: Path) -> Graded:
    return Graded(tmp_path, tiny_model)


def test_every_cut_gives_the_same_run(graded: Graded, tmp_path: Path) -> None:
    keys = {"aot_grades": [2, 3, 4, 5]}
    whole = graded.run("whole", **keys)
    assert whole.logged("aot/levels") == [5.0] * 5
    assert whole.logged("aot/one_sided_steps") == [0.0] * 5
    assert_same(graded.run("1x16", 1, 16, **keys), whole)
    assert_same(graded.run("4x4", 4, 4, **keys), whole)
    assert_differs(graded.run("alone", 4, 4, aot_batch="micro_batch", **keys), whole)
    assert_differs(graded.run("two", aot_grades=[4]), whole)
    # The evaluation's loss, from its own data by another solver.
    scores = load_run(tmp_path / "whole")[-1]
    levels = scores.columns["level"]
    ratios = scores.columns["logps"] - scores.columns["ref_logps"]
    costs = [
        np.logaddexp(0, -BETA * (ratios[levels == high][:, None] - ratios[levels == low]))
        for low, high in pairwise(np.unique(levels))
    ]
    losses = [ot.emd2([], [], cost) for cost in costs]
    assert len(losses) == 4
    assert whole.logged("eval_loss")[-1] == pytest.approx(np.mean(losses), rel=1e-6)
    # Summary, plot and report say the same of each pair of neighbours.
    folder = tmp_path / "whole" / "aot"
    summary = json.loads((folder / "dominance-eval-step5.json").read_text())
    assert [(c["high"], c["low"]) for c in summary["levels"]] == [
        (1.0, 0.75),
        (0.75, 0.5),
        (0.5, 0.25),
        (0.25, 0.0),
    ]
    violation = [c["statistics"]["violation_amount"] for c in summary["levels"]]
    assert whole.logged("eval_aot/violation_amount")[-1] == pytest.approx(np.mean(violation))
    # An interval of the highest level against all others would not be one of this mean.
    assert whole.logged("eval_aot/violation_amount_low") == []
    assert (folder / "quantiles-eval-step5.png").stat().st_size > 10_000
    main(["report", str(tmp_path / "whole"), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "level 0.75 against 0.5" in page and "levels of whole" in page


def test_two_levels_are_two_labels_to_the_bit(graded: Graded) -> None:
    levels = graded.run("levels", 4, 4, aot_grades=[3])
    labels = graded.run("labels", 4, 4, entry={"positive_min": 3, "negative_max": 2})
    for key in ("loss", "grad_norm", "eval_loss", "aot/w1", "rewards/margins"):
        assert levels.logged(key) == labels.logged(key) != []
    for name, parameter in levels.parameters.items():
        assert parameter.equal(labels.parameters[name]), name


def test_levels_that_a_step_lacks_are_bridged_and_counted(graded: Graded, caplog: Any) -> None:
    """Steps of 3 rows have 3 of 5 levels; the log names those that will be missing."""
    run = graded.run("few", 1, 3, aot_grades=[2, 3, 4, 5])
    assert all(2 <= found <= 3 for found in run.logged("aot/levels"))
    assert (
        "with 3 rows sorted together, some of these batches have no rows of level 0 " in caplog.text
    )


def test_an_evaluation_without_the_highest_level_is_recorded(
    graded: Graded, tmp_path: Path
) -> None:
    """The highest one that it has is compared with the others."""
    rows = [json.loads(line) for line in graded.held_out.read_text().splitlines()]
    write_rows(graded.held_out, [row for row in rows if row["stars"] < 4])
    run = graded.run("low", aot_grades=[2, 4])
    summary = json.loads((tmp_path / "low" / "aot" / "dominance-eval-step5.json").read_text())
    (only,) = summary["levels"]
    assert (only["high"], only["low"]) == (0.5, 0.0)
    assert only["statistics"] == summary["margins"]["statistics"]
    violation = summary["margins"]["statistics"]["violation_amount"]
    assert run.logged("eval_aot/violation_amount")[-1] == pytest.approx(violation)
    assert main(["report", str(tmp_path / "low"), "--output", str(tmp_path / "page.html")]) == 0
