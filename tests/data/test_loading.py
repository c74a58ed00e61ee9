"""The host's loading with our types: what is left, what is counted, what is refused."""

from pathlib import Path

import pytest
from axolotl.utils.data.rl import _drop_long_sequences, _truncate_long_sequences_rl
from axolotl.utils.schemas.enums import RLType
from data_helpers import write_rows
from datasets import Dataset

from aot_plugin.data import check_labels, resolve_unpaired_datasets
from aot_plugin.data.accounting import RowCounts, count_rows, table
from aot_plugin.data.loading import load_unpaired_datasets, row_counts
from aot_plugin.data.strategy import transform_for

LONG = "word " * 300


def rows(*labels, prompt="Question"):
    return [
        {"prompt": f"{prompt} {i}", "completion": f"Answer {i}.", "label": label}
        for i, label in enumerate(labels)
    ]


@pytest.fixture
def entry(tmp_path):
    """``entry(file, rows)``: an entry of our default type over a file of rows."""

    def make(file, content, **options):
        path = write_rows(tmp_path / f"{file}.jsonl", content)
        return {"path": path, "type": "chat_template.default"} | options

    return make


def logged_table(caplog):
    (text,) = (r.getMessage() for r in caplog.records if "rows of the unpaired" in r.getMessage())
    caplog.clear()
    return [line.split() for line in text.replace("too long", "too_long").splitlines()[1:]]


@pytest.mark.slow
def test_every_row_is_accounted_for_also_when_the_cache_is_reused(config, entry, caplog):
    flags = entry(
        "flags",
        [
            *rows("good", "bad", True, None),
            {"prompt": "", "completion": "Answer.", "label": True},
            {"prompt": LONG, "completion": "Answer.", "label": True},
            {"prompt": "Question", "completion": LONG, "label": False},
            *rows("good"),
        ],
    )
    pairs = entry(
        "pairs", [{"prompt": "Q", "chosen": "A.", "rejected": ""}], type="chat_template.paired"
    )
    host = entry(
        "host",
        [{"instruction": "Question", "completion": "Answer.", "label": False}],
        type="chatml.argilla",
    )
    evaluation = entry("evaluation", rows(0, 1, prompt="Other"))
    cfg = config([flags, pairs, host], test_datasets=[evaluation], dataset_exact_deduplication=True)
    expected = [
        "dataset split rows responses positive negative empty unlabeled too_long duplicate".split(),
        [flags["path"], "train", "8", "8", "2", "1", "1", "1", "2", "1"],
        [pairs["path"], "train", "1", "2", "1", "0", "1", "0", "0", "0"],
        [host["path"], "train", "1", *"-------"],
        [evaluation["path"], "test", "2", "2", "1", "1", "0", "0", "0", "0"],
    ]
    meta = load_unpaired_datasets(cfg)
    assert logged_table(caplog) == expected
    assert meta.train_dataset["label"] == [True, False, True, True, False]
    assert meta.eval_dataset["label"] == [False, True]

    # Neither strategies nor counts can have looked at the rows again.
    for made in (flags, pairs, host, evaluation):
        Path(made["path"]).write_text("")
    again = load_unpaired_datasets(cfg)
    assert logged_table(caplog) == expected
    assert again.train_dataset["completion"] == meta.train_dataset["completion"]


@pytest.mark.slow
def test_worker_processes_give_the_same_rows(config, entry):
    content = entry("rows", rows(*[True, False, None] * 20))
    datasets, counts = [], []
    for workers in (0, 2):
        cfg = config([content], skip_prepare_dataset=True, dataset_num_proc=workers)
        datasets.append(load_unpaired_datasets(cfg).train_dataset.to_list())
        counts.append(*row_counts(cfg).values())
    assert datasets[0] == datasets[1]
    assert counts[0] == counts[1]
    assert (counts[0][0].positive, counts[0][0].dropped) == (20, {"unlabeled": 20})


def test_an_unreadable_label_stops_the_run_with_its_row(config, entry):
    cfg = config([entry("rows", rows("good", "bad", "meh"))], skip_prepare_dataset=True)
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: `label`: 'meh' is not a label"):
        load_unpaired_datasets(cfg)


def test_one_label_stops_the_run(config, entry):
    cfg = config([entry("rows", rows("good", True, 1, None))], skip_prepare_dataset=True)
    with pytest.raises(ValueError, match="all 3 rows are positive"):
        load_unpaired_datasets(cfg)


def test_what_the_host_s_loader_reads_survives_its_validation(config, entry):
    loader = {"name": "preference", "ds_type": "json", "split": "train[:5]", "revision": "abc"}
    cfg = config([entry("rows", [], **loader)], test_datasets=[entry("more", [], **loader)])
    for found in (cfg.datasets[0], cfg.test_datasets[0]):
        assert {key: found[key] for key in loader} == loader
        key = found.type.removeprefix("aot_plugin.unpaired_")
        assert cfg.aot_datasets[key]["strategy"] == "chat_template.default"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [True, True]}, "all 2 rows are positive"),
        ({"label": [0, 0]}, "all 2 rows are negative"),
        ({"label": [True, None]}, "None in the column `label` is neither true nor false"),
        ({"label": ["good", "bad"]}, "'good' in the column `label` is neither true nor false"),
        ({"completion": ["a"]}, "needs a `label` column after preparation; there are completion"),
    ],
)
def test_check_labels(columns, message):
    with pytest.raises(ValueError, match=message):
        check_labels(Dataset.from_dict(columns))
    assert check_labels(Dataset.from_dict({"label": [True, False, True]})) == (2, 1)


def resolved_default():
    entry = {"path": "rows", "type": "chat_template.default"}
    return next(iter(resolve_unpaired_datasets([entry])[1].values()))


@pytest.mark.parametrize("strategy", ["drop", None, "truncate", "TRUNCATE"])
def test_too_long_by_the_host_s_rule(tokenizer, strategy):
    """All lengths around the limit, against the host's own functions."""
    limit = 48
    resolved = resolved_default()
    dataset = Dataset.from_list(
        [
            {"prompt": "é " * prompt, "completion": "ü " * completion, "label": True}
            for prompt in (1, 10, *range(24, 48))
            for completion in range(1, 48, 2)
        ]
    )
    cfg = {"sequence_len": limit, "excess_length_strategy": strategy}
    counts = count_rows(dataset, resolved, "train", cfg, tokenizer)

    texts = Dataset.from_dict(transform_for({}, resolved)(dataset[:], tokenizer=tokenizer))
    host = {"rl": RLType.KTO, "tokenizer": tokenizer, "sequence_len": limit}
    rows = texts.to_list()
    if (strategy or "").lower() == "truncate":
        rows = [_truncate_long_sequences_rl(row, **host) for row in rows]
    kept = sum(_drop_long_sequences(row, **host) for row in rows)
    assert 0 < counts.positive == kept < len(dataset)
    assert counts.dropped == {"too long": len(dataset) - kept}


def test_duplicates_are_counted_across_entries(tokenizer):
    seen: set[int] = set()
    cfg = {"sequence_len": 64}
    content = Dataset.from_list(rows(True, False))
    for dropped in ({}, {"duplicate": 2}):
        counts = count_rows(content, resolved_default(), "train", cfg, tokenizer, seen)
        assert counts.dropped == dropped
    other = Dataset.from_list(rows(False, False))
    counts = count_rows(other, resolved_default(), "train", cfg, tokenizer, seen)
    assert (counts.negative, counts.dropped) == (1, {"duplicate": 1})


def test_table_without_drops():
    lines = table([RowCounts("a.jsonl", "train", 3, positive=2, negative=1)]).splitlines()
    assert lines[0].split() == ["dataset", "split", "rows", "responses", "positive", "negative"]
    assert lines[1].split() == ["a.jsonl", "train", "3", "3", "2", "1"]
