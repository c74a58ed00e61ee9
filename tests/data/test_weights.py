"""``field_weight`` through the host's loading: all forms of types, what is dropped or refused."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from axolotl.loaders import load_tokenizer
from data_helpers import write_rows
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from aot_plugin.data import WEIGHT, prepare_tokens
from aot_plugin.data.freshness import load_fresh
from aot_plugin.data.loading import load_datasets
from aot_plugin.data.rows import RowError
from aot_plugin.data.weights import parse_weight
from aot_plugin.host.row_columns import ColumnsCollator, masses

PAIRS = [
    {"prompt": f"Question {i}", "chosen": f"Yes {i}.", "rejected": f"No {i}.", "trust": weight}
    for i, weight in enumerate([0.5, 2, 0, 1.25])
]
LABELLED = [
    {"prompt": f"Question {i}", "completion": f"Answer {i}.", "label": i % 2 == 0, "trust": weight}
    for i, weight in enumerate([0.5, 2, 0, 1.25])
]
KEPT = [0.5, 2, 1.25]

OF_THE_USER = """
def keeping(cfg, **kwargs):
    return lambda row: {"prompt": "Q: " + row["prompt"]}

def removing(cfg, **kwargs):
    def transform(batch):
        return {name: batch[name] for name in ("prompt", "chosen", "rejected")}
    return transform, {"batched": True, "remove_columns": "__all__"}
"""


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_the_user.py").write_text(OF_THE_USER)

    def make(rows: list[dict[str, Any]], kind: Any, file: str = "rows", **keys: Any) -> Any:
        path = write_rows(tmp_path / f"{file}.jsonl", rows)
        typed = {} if kind is None else {"type": kind}
        return {"path": path, "field_weight": "trust"} | typed | keys

    return make


def by_prompt(dataset: Dataset) -> dict[str, float | None]:
    return {row["prompt"][-60:]: row[WEIGHT] for row in dataset}


@pytest.mark.parametrize(
    ("mode", "rows", "kind", "keys"),
    [
        ("paired", PAIRS, "chat_template.default", {}),
        ("paired", PAIRS, None, {}),
        ("paired", PAIRS, {"field_prompt": "prompt"}, {}),
        ("paired", PAIRS, "of_the_user.keeping", {}),
        ("unpaired", LABELLED, "chat_template.default", {}),
        ("unpaired", LABELLED, None, {}),
        ("unpaired", LABELLED, {"field_prompt": "prompt"}, {}),
    ],
    ids=lambda part: str(part)[:30],
)
def test_every_type_keeps_weights_and_drops_those_of_zero(
    mode: str, rows: Any, kind: Any, keys: Any, config: Any, entry: Any, caplog: Any
) -> None:
    ours = kind == "chat_template.default"
    held_out = {"test_datasets": [entry(rows[1:], kind, "held_out")]} if ours else {}
    cfg = config([entry(rows, kind, **keys)], aot_mode=mode, **held_out)
    loaded = load_datasets(cfg)
    dataset = loaded.train_dataset
    assert dataset[WEIGHT] == KEPT
    assert not ours or loaded.eval_dataset[WEIGHT] == KEPT[1:]
    assert [row["prompt"] for row in dataset if "Question 2" in row["prompt"]] == []
    (table,) = (
        r.getMessage()
        for r in caplog.records
        if r.levelname == "INFO" and "rows of the" in r.getMessage()
    )
    head, *lines = (text.replace("weight 0", "weight_0").split() for text in table.splitlines()[1:])
    assert [dict(zip(head, line, strict=True))["weight_0"] for line in lines] == ["1"] * len(lines)
    # As the trainer reads it.
    tokens = prepare_tokens(dataset, load_tokenizer(cfg), mode, None)
    assert tokens[WEIGHT] == dataset[WEIGHT]
    # Prepared rows are read again, and the counts with them.
    caplog.clear()
    assert load_datasets(cfg).train_dataset[WEIGHT] == dataset[WEIGHT]
    assert any(table in r.getMessage() for r in caplog.records)


def test_a_mix_of_entries_and_a_row_of_several_responses(config: Any, entry: Any) -> None:
    """Rows of entries without weights have none of their own, whatever their columns are named."""
    plain = [{**row, WEIGHT: 7.0} for row in LABELLED]
    listed = [
        {
            "prompt": "Which one?",
            "responses": [
                {"text": "This.", "ok": True},
                {"text": "That.", "ok": False},
                {"text": "Both.", "ok": False},
            ],
            "about": {"trust": 3},
        }
    ]
    several = {
        **{"field_responses": "responses", "field_completion": "text", "field_label": "ok"},
        "field_weight": "about.trust",
    }
    entries = [
        entry(plain, None, "plain"),
        entry(listed, "chat_template.listwise", "listed", **several),
        entry(PAIRS, "chat_template.paired", "pairs"),
    ]
    del entries[0]["field_weight"]
    dataset = load_datasets(config(entries)).train_dataset
    assert dataset[WEIGHT] == [None] * 4 + [3.0] * 3 + [0.5, 0.5, 2.0, 2.0, 1.25, 1.25]


def test_the_weight_of_a_thread_is_that_of_the_answered_message(config: Any, entry: Any) -> None:
    def message(name: str, parent: str | None, rank: int | None, trust: Any) -> dict[str, Any]:
        role = "assistant" if parent else "prompter"
        common = {"message_id": name, "parent_id": parent, "role": role, "rank": rank}
        return common | {"text": f"Text {name}.", "trust": trust}

    rows = [
        *(message("a", None, None, 2.5), message("b", None, None, 0)),
        *(message(f"a{i}", "a", i, None) for i in range(2)),
        *(message(f"b{i}", "b", i, None) for i in range(2)),
    ]
    dataset = load_datasets(config([entry(rows, "chat_template.threads")])).train_dataset
    assert dataset[WEIGHT] == [2.5, 2.5]


def test_weights_go_with_repeated_and_drawn_rows(config: Any, entry: Any) -> None:
    for kind in (None, "chat_template.default"):
        cfg = config([entry(LABELLED, kind, str(kind), weight=2.5, shards=1)])
        dataset = load_datasets(cfg).train_dataset
        found = {(row["prompt"].partition("Question")[2][:3], row[WEIGHT]) for row in dataset}
        assert {weight for _, weight in found} == set(KEPT)
        assert len(found) == 3 and len(dataset) > 6


BAD = [None, -1, True, "0.5", "high", [1.0]]


@pytest.mark.parametrize("kind", ["chat_template.default", None], ids=str)
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_row_without_a_weight_is_named(
    bad: Any, kind: Any, config: Any, entry: Any, tmp_path: Path
) -> None:
    rows = LABELLED[:1] * 4 + [LABELLED[1] | {"trust": bad}]
    if isinstance(bad, bool | str | list):  # a column has one type
        rows = [LABELLED[1] | {"trust": bad}]
    with pytest.raises(ValueError, match="is not a weight; write a number above 0") as error:
        load_datasets(config([entry(rows, kind)]))
    place = f"rows.jsonl, row {len(rows) - 1}: `trust`: "
    assert place in str(error.value), error.value


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5, Decimal("nan"), Decimal(-1)])
def test_what_json_has_no_number_for_is_no_weight(bad: float) -> None:
    with pytest.raises(RowError, match="is not a weight"):
        parse_weight({"trust": bad}, "trust")
    good = (0, 2, 0.25, Decimal("1.50"))
    assert [parse_weight({"trust": w}, "trust") for w in good] == [0.0, 2.0, 0.25, 1.5]


@pytest.mark.parametrize("kind", ["chat_template.default", None], ids=str)
def test_a_missing_column_is_named(kind: Any, config: Any, entry: Any) -> None:
    with pytest.raises(ValueError, match=r"row 0: there is no column `truth`; the row has prompt"):
        load_datasets(config([entry(LABELLED, kind, field_weight="truth")]))


def test_a_type_that_removes_all_columns_is_refused(config: Any, entry: Any) -> None:
    with pytest.raises(ValueError, match=r"type of_the_user\.removing removes all columns"):
        load_datasets(config([entry(PAIRS, "of_the_user.removing")], aot_mode="paired"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"aot_sort": "soft"}, r"`datasets\[0\].field_weight` can't be used with `aot_sort: soft`"),
        (
            {"aot_batch": "micro_batch", "micro_batch_size": 1},
            r"`datasets\[0\].field_weight` can't be used .* and `micro_batch_size: 1`",
        ),
        ({"kto_desirable_weight": 2.0}, "each have total mass 1.*`field_weight`"),
        ({"desirable_weight": 2.0}, "each have total mass 1.*`field_weight`"),
    ],
    ids=lambda part: str(part)[:20],
)
def test_what_contradicts_weights_is_refused(
    keys: Any, message: str, config: Any, entry: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        config([entry(LABELLED, "chat_template.default")], **keys)


def test_the_host_drops_weights_of_held_out_rows(config: Any, entry: Any) -> None:
    with pytest.raises(ValueError, match=r"`test_datasets\[0\].field_weight`: Axolotl drops"):
        config([entry(LABELLED, None)], test_datasets=[entry(LABELLED, None, "held_out")])


def test_a_weight_in_a_user_defined_type_belongs_beside_it(config: Any, entry: Any) -> None:
    with pytest.raises(ValueError, match="belongs into the entry, beside `type`"):
        config([entry(LABELLED, {"field_prompt": "prompt", "field_weight": "trust"})])


def test_another_column_of_weights_prepares_the_rows_anew(config: Any, entry: Any) -> None:
    rows = [row | {"other": 1 + i} for i, row in enumerate(LABELLED)]
    for kind in (None, "chat_template.default"):
        found = []
        for field in ("trust", "other"):
            cfg = config([entry(rows, kind, field_weight=field)])
            found.append(load_fresh(cfg, lambda cfg=cfg: load_datasets(cfg)).train_dataset[WEIGHT])
        assert found == [KEPT, [1, 2, 3, 4]]


def test_a_batch_carries_the_masses_of_its_sequences() -> None:
    collate = ColumnsCollator(DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=8))
    assert collate.pad_to_multiple_of == 8
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}] * 3
    weighted = [row | {WEIGHT: weight} for row, weight in zip(rows, (0.1, None, 2.0), strict=True)]
    assert masses(collate(weighted)).tolist() == [0.1, 1.0, 2.0] * 2
    plain = collate(rows)
    assert WEIGHT not in plain and torch.equal(masses(plain), torch.ones(6).double())
    assert np.dtype("float64") == masses(plain).numpy().dtype
