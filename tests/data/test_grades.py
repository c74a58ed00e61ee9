"""Ratings in more than two levels, from the entry to the batch."""

from typing import Any

import pytest
import torch
from data_helpers import write_rows
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from aot_plugin.config import desugar
from aot_plugin.data import LEVEL, check_labels, levels, resolve_datasets
from aot_plugin.data.loading import load_datasets
from aot_plugin.host.row_columns import ColumnsCollator

STARS = [
    {"prompt": f"Question {i}", "completion": f"Answer {i}", "stars": stars}
    for i, stars in enumerate([0, 1, 2, "3", 4.0, None, 2, "N/A"])
]
LABELLED = [
    {"prompt": f"Other {i}", "completion": f"Reply {i}", "label": label, LEVEL: 0.3}
    for i, label in enumerate([True, False])
]
RATED = [
    {
        "prompt": "Which?",
        "answers": [{"text": f"The {i}.", "score": score} for i, score in enumerate([9.5, 6, 2])],
    }
]


@pytest.fixture
def entry(tmp_path: Any) -> Any:
    def make(rows: list[dict[str, Any]], file: str, **keys: Any) -> dict[str, Any]:
        path = write_rows(tmp_path / f"{file}.jsonl", rows)
        return {"path": path, "type": "chat_template.default"} | keys

    return make


def test_levels_of_a_mix_of_entries(config: Any, entry: Any, caplog: Any) -> None:
    """Ratings of two scales, and labels, which are the highest and the lowest level."""
    listed = {
        "type": "chat_template.listwise",
        "field_responses": "answers",
        "field_completion": "text",
        "field_label": "score",
        "grades": [5, 9],
    }
    own = entry(LABELLED, "labelled")
    host = entry(LABELLED, "host") | {"type": "chatml.ultra"}
    entries = [
        entry(STARS, "stars", field_label="stars", grades=[2, 4]),
        entry(RATED, "r", **listed),
    ]
    loaded = load_datasets(config([*entries, own, host]))
    dataset = loaded.train_dataset
    stars, rated, labels = [0.0, 0.0, 0.5, 0.5, 1.0, 0.5], [1.0, 0.5, 0.0], [1.0, 0.0]
    assert levels(dataset).tolist() == [*stars, *rated, *labels, *labels]
    assert dataset[LEVEL] == [*stars, *rated, *[None] * 4]
    assert dataset["label"] == [at == 1 for at in levels(dataset)]
    (table,) = (r.getMessage() for r in caplog.records if "rows of the" in r.getMessage())
    head, *lines = (line.split() for line in table.splitlines()[1:])
    first = dict(zip(head, lines[0], strict=True))
    assert [first[name] for name in ("positive", "middle", "negative")] == ["1", "3", "2"]
    assert first["unlabeled"] == "2"
    said = "training on rows by level: 5 of 0, 4 of 0.5, 4 of 1"
    assert any(said in r.getMessage() for r in caplog.records)


def test_a_batch_has_the_levels_of_its_rows(config: Any, entry: Any) -> None:
    entries = [entry(STARS, "stars", field_label="stars", grades=[2, 4]), entry(LABELLED, "l")]
    dataset = load_datasets(config(entries)).train_dataset
    columns = {f"template_{name}_ids": f"{name}_ids" for name in ("prompt", "completion")}
    rows = list(dataset.rename_columns(columns))
    batch = ColumnsCollator(DataCollatorForUnpairedPreference(pad_token_id=0))(rows)
    assert batch[LEVEL].dtype == torch.float64
    assert batch[LEVEL].tolist() == levels(dataset).tolist()


def test_the_key_at_the_top_is_for_entries_that_say_nothing_else() -> None:
    rated = {"path": "a.jsonl", "type": "chat_template.default"}
    mine = rated | {"grades": [0.3, 0.6]}
    two = rated | {"positive_min": 4, "negative_max": 2}
    listed = rated | {"type": "chat_template.listwise", "field_responses": "answers"}
    cfg = {"aot_grades": [2, 4], "datasets": [rated, mine, two, listed]}
    cfg["datasets"].append(listed | {"best_and_worst": True})
    cfg["datasets"].append(listed | {"best_and_worst": False})
    cfg["datasets"].append(rated | {"type": "chat_template.paired"})
    found = resolve_datasets(cfg, "unpaired")
    keys = [entry.type.partition("_")[2].partition("_")[2] for entry in found["datasets"]]
    by_entry = [found["aot_datasets"][key]["options"].get("grades") for key in keys]
    assert by_entry == [[2, 4], [0.3, 0.6], None, [2, 4], None, [2, 4], None]
    # Other thresholds, other prepared rows.
    again = resolve_datasets({**cfg, "aot_grades": [2, 3]}, "unpaired")
    assert again["datasets"][0].type != found["datasets"][0].type


@pytest.mark.parametrize(
    ("keys", "entry_keys", "message"),
    [
        ({"aot_grades": []}, {}, "`aot_grades: []` is wrong"),
        ({"aot_grades": 3}, {}, "`aot_grades: 3` is wrong"),
        ({"aot_grades": [3, 2]}, {}, "write thresholds in rising order"),
        ({"aot_grades": [2, 2]}, {}, "write thresholds in rising order"),
        ({"aot_grades": [float("nan")]}, {}, "write thresholds in rising order"),
        ({"aot_grades": [2], "aot_mode": "paired"}, {}, "write `aot_mode: unpaired`"),
        ({"aot_grades": [2]}, {"positive_min": 3, "negative_max": 1}, "no entry of `datasets`"),
        (
            {"aot_grades": [2], "test_datasets": [{"path": "b.jsonl", "type": "chat_template"}]},
            {"type": "chat_template.paired"},
            "no entry of `datasets`",
        ),
        ({}, {"grades": []}, "`datasets[0].grades: []` is wrong"),
        (
            {},
            {"grades": [3, 2]},
            "`datasets[0]`: `grades: [3.0, 2.0]`: write the thresholds in ris",
        ),
        ({}, {"grades": ["x"]}, "`datasets[0].grades.0: x` is wrong"),
        ({}, {"grades": [float("inf")]}, "write finite numbers"),
        (
            {},
            {"grades": [2], "positive_min": 3, "negative_max": 1},
            "`grades` and `positive_min` both divide the ratings",
        ),
        ({}, {"aot_grades": [2]}, "`datasets[0].aot_grades` is not an option of this entry's type"),
        (
            {"aot_grades": [1, 2, 3]},
            {"grades": [2, 3]},
            "`grades` of one entry make 3 levels, those of another 4",
        ),
    ],
)
def test_mistakes(keys: Any, entry_keys: Any, message: str) -> None:
    rated = {"path": "a.jsonl", "type": "chat_template.default"}
    entries = [rated | entry_keys]
    if "1, 2, 3" in str(keys):
        entries.append(rated)
    cfg = {"rl": "aot", "aot_mode": "unpaired", "base_model": "x", "datasets": entries, **keys}
    with pytest.raises(ValueError) as error:
        desugar(cfg)
    assert message in str(error.value)


@pytest.mark.parametrize("bad", [True, "good", [1]])
def test_what_is_no_rating_is_named(bad: Any, config: Any, entry: Any) -> None:
    rows = [*STARS[:2], STARS[2] | {"stars": bad}]
    if bad is not True:
        rows = [row | {"stars": str(row["stars"]) if isinstance(bad, str) else [0]} for row in rows]
        rows[2]["stars"] = bad
    else:
        rows = [row | {"stars": True} for row in rows]
    with pytest.raises(ValueError, match=r"row \d: `stars`: .* is not a number"):
        load_datasets(config([entry(rows, "bad", field_label="stars", grades=[2, 4])]))


@pytest.mark.parametrize(("held_out", "said"), [(1, True), (6, False)])
def test_an_evaluation_set_of_one_label_is_named(
    held_out: int, said: bool, config: Any, entry: Any, caplog: Any
) -> None:
    rows = [
        {"prompt": f"Q{i}?", "completion": f"Answer {i}.", "label": i % 2 == 0} for i in range(12)
    ]
    load_datasets(config([entry(rows, "rows")], val_set_size=held_out))
    assert ("1 rows of the evaluation set have the same label" in caplog.text) == said


def test_rows_of_one_level_are_refused(config: Any, entry: Any) -> None:
    rows = [row | {"stars": 3} for row in STARS]
    with pytest.raises(ValueError, match=r"all 8 rows are of level 0\.5; there is nothing"):
        load_datasets(config([entry(rows, "one", field_label="stars", grades=[2, 4])]))
    dataset = load_datasets(
        config([entry([*rows, rows[0] | {"stars": 4}], "two", field_label="stars", grades=[2, 4])])
    ).train_dataset
    assert check_labels(dataset) == "rows by level: 8 of 0.5, 1 of 1"
