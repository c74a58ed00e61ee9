import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aot_plugin.files import write_atomically
from aot_plugin.report.scores import Scores, load_run

PAIRED = {
    "beta": 0.5,
    "step": 3,
    "eval_set": "eval",
    "chosen_logps": [-1.0, -2.0],
    "rejected_logps": [-4.0, -3.0],
    "ref_chosen_logps": [-2.0, -2.5],
    "ref_rejected_logps": [-3.0, -3.5],
    "chosen_tokens": [4, 5],
    "rejected_tokens": [6, 7],
}
UNPAIRED = {
    "beta": 0.5,
    "step": 3,
    "eval_set": "eval",
    "logps": [-1.0, -2.0, -3.0],
    "ref_logps": [-2.0, -2.5, -1.0],
    "label": [True, False, True],
    "tokens": [4, 5, 6],
}


def test_paired_quantities_by_hand():
    scores = Scores.paired(**PAIRED)
    assert scores.u.tolist() == [3.0, 1.0]
    assert scores.v.tolist() == [1.0, 1.0]
    assert scores.chosen_logratios.tolist() == [1.0, 0.5]
    assert scores.rejected_logratios.tolist() == [-1.0, 0.5]
    assert scores.chosen_rewards.tolist() == [0.5, 0.25]
    assert scores.rejected_rewards.tolist() == [-0.5, 0.25]
    assert scores.chosen_tokens.tolist() == [4, 5]
    assert scores.rejected_tokens.tolist() == [6, 7]


def test_unpaired_quantities_by_hand():
    scores = Scores.unpaired(**UNPAIRED)
    assert scores.u.tolist() == scores.chosen_logratios.tolist() == [1.0, -2.0]
    assert scores.v.tolist() == scores.rejected_logratios.tolist() == [0.5]
    assert scores.chosen_rewards.tolist() == [0.5, -1.0]
    assert scores.rejected_rewards.tolist() == [0.25]
    assert scores.chosen_tokens.tolist() == [4, 6]
    assert scores.rejected_tokens.tolist() == [5]


def test_levels_by_hand():
    scores = Scores.unpaired(**UNPAIRED, level=[1.0, 0.0, 0.5], weight=[1.0, 2.0, 3.0])
    assert [level.value for level in scores.levels] == [0.0, 0.5, 1.0]
    assert [level.logratios.tolist() for level in scores.levels] == [[0.5], [-2.0], [1.0]]
    assert [level.mass.tolist() for level in scores.levels] == [[2.0], [3.0], [1.0]]
    assert Scores.unpaired(**UNPAIRED).levels == []


@pytest.mark.parametrize(
    "original",
    [
        Scores.paired(**PAIRED),
        Scores.unpaired(**UNPAIRED),
        Scores.unpaired(**UNPAIRED, level=[1.0, 0.0, 0.5]),
    ],
)
def test_saved_and_loaded_is_the_same(original, tmp_path):
    path = original.save(tmp_path)
    assert path == tmp_path / "scores-eval-step3.parquet"
    loaded = Scores.load(path)
    for name in ("mode", "beta", "step", "eval_set"):
        assert getattr(loaded, name) == getattr(original, name)
    for name, column in original.columns.items():
        np.testing.assert_array_equal(loaded.columns[name], column)
        assert loaded.columns[name].dtype == column.dtype


def test_non_finite_values_are_kept(tmp_path):
    scores = Scores.unpaired(**UNPAIRED | {"logps": [np.nan, -np.inf, 0]})
    loaded = Scores.load(scores.save(tmp_path))
    np.testing.assert_array_equal(loaded.columns["logps"], [np.nan, -np.inf, 0])


def test_columns_are_copies_that_cannot_be_written():
    logps = np.array([-1.0, -2.0])
    scores = Scores.paired(**PAIRED | {"chosen_logps": logps})
    logps[0] = 99
    assert scores.columns["chosen_logps"][0] == -1
    with pytest.raises(ValueError, match="read-only"):
        scores.columns["chosen_logps"][0] = 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scores.paired(**PAIRED | {"chosen_tokens": [1]}), "vectors of one length"),
        (lambda: Scores.unpaired(**UNPAIRED | {"label": [[True]]}), "vectors of one length"),
        (lambda: Scores("both", 1, 1, "eval", {}), "mode: expected one of"),
        (lambda: Scores("paired", 1, 1, "eval", {"logps": [1]}), "columns of a paired evaluation"),
    ],
)
def test_wrong_columns_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "name",
    [
        "../../evil",
        "/etc/passwd",
        "..",
        "",
        "a b/c",
        ".hidden",
        "x" * 300,
        "nul\0",
        "zażółć",
        "a\\b",
    ],
)
def test_hostile_names_stay_in_the_folder(name, tmp_path):
    folder = tmp_path / "run" / "aot"
    path = Scores.paired(**PAIRED | {"eval_set": name}).save(folder)
    assert path.resolve().parent == folder.resolve()
    assert os.listdir(tmp_path) == ["run"]
    assert path.name.startswith("scores-") and len(path.name) < 130
    assert load_run(tmp_path / "run")[0].eval_set == name


def test_names_that_look_alike_do_not_overwrite_each_other(tmp_path):
    names = ["a/b", "a_b", "a b", "x" * 81, "x" * 82]
    paths = {Scores.paired(**PAIRED | {"eval_set": name}).save(tmp_path) for name in names}
    assert len(paths) == len(names)


def test_a_run_is_read_in_order_of_steps(tmp_path):
    for step, name in [(100, "eval"), (20, "eval"), (20, "b"), (3, "eval")]:
        Scores.paired(**PAIRED | {"step": step, "eval_set": name}).save(tmp_path / "aot")
    found = [(scores.step, scores.eval_set) for scores in load_run(tmp_path)]
    assert found == [(3, "eval"), (20, "b"), (20, "eval"), (100, "eval")]


def test_a_run_without_data_is_empty(tmp_path):
    assert load_run(tmp_path) == []
    assert load_run(tmp_path / "missing") == []


def test_other_parquet_files_are_refused(tmp_path):
    path = tmp_path / "scores-x-step1.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ValueError, match=r"scores-x-step1.parquet: not an evaluation"):
        Scores.load(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(file):
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_write_through_a_symbolic_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "file.txt"
    link.symlink_to(tmp_path / "elsewhere" / "file.txt")
    write_atomically(link, lambda file: file.write_text("new"))
    assert link.is_symlink() and (tmp_path / "elsewhere" / "file.txt").read_text() == "new"
