"""The host's loading with our types: what is left, what is counted, what is refused."""

import re
from pathlib import Path

import pytest
import yaml
from axolotl.cli.main import cli
from axolotl.common.datasets import load_preference_datasets
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.rl import _drop_long_sequences, _truncate_long_sequences_rl
from axolotl.utils.schemas.enums import RLType
from click.testing import CliRunner
from data_helpers import write_rows
from datasets import Dataset

from aot_plugin.data import check_labels, resolve_unpaired_datasets
from aot_plugin.data.accounting import RowCounts, count_rows, table
from aot_plugin.data.first_rows import first_rows
from aot_plugin.data.loading import load_datasets, row_counts
from aot_plugin.data.strategy import transform_for
from aot_plugin.data.tokens import prepare_tokens

LONG = "word " * 300
SEED = 42
"""What the host calls its default."""


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
    (text,) = (r.getMessage() for r in caplog.records if "rows of the" in r.getMessage())
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
        "pairs",
        [{"prompt": "Q", "chosen": "A.", "rejected": ""}] * 2,
        type="chat_template.paired",
        weight=0.5,
    )
    host = entry(
        "host",
        [{"instruction": "Question", "completion": "Answer.", "label": False}],
        type="chatml.argilla",
    )
    evaluation = entry("evaluation", rows(0, 1, prompt="Other"))
    cfg = config([flags, pairs, host], test_datasets=[evaluation], dataset_exact_deduplication=True)
    expected = [
        [
            *("dataset", "split", "rows", "taken", "responses", "positive", "negative"),
            *("empty", "unlabeled", "too_long", "duplicate"),
        ],
        [flags["path"], "train", "8", "8", "8", "2", "1", "1", "1", "2", "1"],
        [pairs["path"], "train", "2", "1", "2", "1", "0", "1", "0", "0", "0"],
        [host["path"], "train", "1", "1", *"-------"],
        [evaluation["path"], "test", "2", "2", "2", "1", "1", "0", "0", "0", "0"],
    ]
    meta = load_datasets(cfg)
    assert logged_table(caplog) == expected
    assert meta.train_dataset["label"] == [True, False, True, True, False]
    assert meta.eval_dataset["label"] == [False, True]

    # Neither strategies nor counts can have looked at the rows again.
    for made in (flags, pairs, host, evaluation):
        Path(made["path"]).write_text("")
    again = load_datasets(cfg)
    assert logged_table(caplog) == expected
    assert again.train_dataset["completion"] == meta.train_dataset["completion"]


@pytest.mark.slow
def test_worker_processes_give_the_same_rows(config, entry):
    content = entry("rows", rows(*[True, False, None] * 20))
    datasets, counts = [], []
    for workers in (0, 2):
        cfg = config([content], skip_prepare_dataset=True, dataset_num_proc=workers)
        datasets.append(load_datasets(cfg).train_dataset.to_list())
        counts.append(*row_counts(cfg, load_tokenizer(cfg)).values())
    assert datasets[0] == datasets[1]
    assert counts[0] == counts[1]
    assert (counts[0][0].positive, counts[0][0].dropped) == (20, {"unlabeled": 20})


def numbered(path, count):
    return write_rows(
        path,
        [
            {
                "messages": [{"role": "user", "content": f"Q{i}"}],
                "instruction": f"Q{i}",
                "question": f"Q{i}",
                "chosen": f"yes {i}",
                "rejected": f"no {i}",
                "completion": f"so {i}",
                "label": i % 2 == 0,
            }
            for i in range(count)
        ],
    )


MAPPING = {"field_prompt": "question", "field_chosen": "chosen", "field_rejected": "rejected"}


@pytest.mark.parametrize(
    ("mode", "types", "column"),
    [
        ("paired", ["chat_template.default", "chatml.intel", MAPPING], "chosen"),
        ("unpaired", ["chat_template.default", "chatml.argilla", "chat_template"], "completion"),
    ],
)
def test_weights_and_shards_in_a_mix(mode, types, column, config, tmp_path, caplog):
    """Three types in one run; each entry brings the rows that its weight and shard say."""
    paths = [numbered(tmp_path / f"{name}.jsonl", 10) for name in "abc"]
    mixing = [{"weight": 0.5}, {"weight": 2.3}, {"shards": 3, "shards_idx": 2, "weight": 0.5}]
    entries = [
        {"path": path, "type": kind} | mix
        for path, kind, mix in zip(paths, types, mixing, strict=True)
    ]
    evaluation = entries[0] | {"weight": 0.3}
    cfg = config(entries, aot_mode=mode, test_datasets=[evaluation], skip_prepare_dataset=True)
    meta = load_datasets(cfg)
    numbers = [int(re.search(r"\d+", text)[0]) for text in meta.train_dataset[column]]
    # The host's own words for the same seed.
    rows = Dataset.from_dict({"i": list(range(10))})
    half = rows.shuffle(seed=SEED).select(range(5))["i"][:]
    third = rows.shuffle(seed=SEED).shard(3, 2).shuffle(seed=SEED)["i"][:1]
    assert numbers[:5] == half
    assert numbers[5:25] == [*range(10), *range(10)]
    assert numbers[25:28] == half[:3]
    assert numbers[28:] == third
    assert len(meta.eval_dataset) == 3
    expected = [
        ["dataset", "split", "rows", "taken"],
        [paths[0], "train", "10", "5"],
        [paths[1], "train", "10", "23"],
        [paths[2], "train", "10", "1"],
        [paths[0], "test", "10", "3"],
    ]
    assert [line[:4] for line in logged_table(caplog)] == expected
    assert mode == "paired" or (cfg.aot_datasets and meta.train_dataset["label"][5] is True)


def test_a_row_s_number_is_that_of_its_file(config, entry):
    content = rows(*[True, False] * 10)
    content[13]["label"] = "meh"
    cfg = config([entry("rows", content, weight=2.0)], skip_prepare_dataset=True)
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 13: `label`: 'meh' is not a label"):
        load_datasets(cfg)


def test_paired_rows_without_weights_are_the_host_s_own(config, tmp_path, caplog):
    entry = {"path": numbered(tmp_path / "a.jsonl", 4), "type": "chatml.intel"}
    cfg = config([entry | {"weight": 1}], aot_mode="paired", skip_prepare_dataset=True)
    expected = load_preference_datasets(cfg=cfg).train_dataset.to_list()
    assert len(expected) == 4
    assert load_datasets(cfg).train_dataset.to_list() == expected
    assert "rows of the" not in caplog.text


@pytest.fixture
def preprocess_debug(raw_config, tmp_path, monkeypatch, caplog):
    """``preprocess_debug(rows, mode, **options)``: `axolotl preprocess --debug`, in this process;
    what it logs of three examples."""

    def run(content, mode, **options):
        path = write_rows(tmp_path / "rows.jsonl", content)
        entry = {"path": path, "type": "chat_template.default"} | options
        yml = tmp_path / "config.yml"
        yml.write_text(yaml.safe_dump(raw_config([entry], aot_mode=mode, chat_template="chatml")))
        command = ["preprocess", str(yml), "--debug", "--debug-num-examples", "3", "--no-download"]
        monkeypatch.setattr("sys.argv", ["axolotl", *command])  # the host reads its flags there too
        monkeypatch.setenv("AXOLOTL_IS_PREPROCESS", "1")  # what the command sets, to be unset again
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.exception
        logged = [r.getMessage() for r in caplog.records if r.name == "axolotl.utils.tokenization"]
        return [re.sub(r"\x1b\[\d*m", "", text) for text in logged]

    return run


def question(number):
    return {"messages": [{"role": "user", "content": f"Question {number}"}]}


def test_preprocess_debug_shows_the_tokens_that_are_trained(preprocess_debug, tokenizer):
    content = [question(i) | {"completion": f"So {i}.", "label": i % 2 == 0} for i in range(4)]
    logged = preprocess_debug(content, "unpaired")
    pairs = [re.findall(r"\((-?\d+), (\d+)\)", text) for text in logged]
    shown = [[(int(label), int(token)) for label, token in pair] for pair in pairs if pair]
    expected = []
    for row in content:
        turns = [*row["messages"], {"role": "assistant", "content": row["completion"]}]
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns)["input_ids"]
        end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
        start = len(prompt["input_ids"])
        expected.append([(-100 if i < start else t, t) for i, t in enumerate(whole[:end])])
    assert len(shown) == 3
    assert all(row in expected for row in shown)


def test_preprocess_debug_names_the_levels_of_graded_rows(preprocess_debug, caplog):
    # The host draws the examples.
    content = [question(i) | {"completion": f"So {i}.", "label": 2 + i // 7} for i in range(8)]
    preprocess_debug(content, "unpaired", grades=[2, 3])
    named = {r.getMessage() for r in caplog.records if r.getMessage().endswith(" row:")}
    assert named and named <= {"level 0.5 row:", "positive row:"}


def test_preprocess_debug_of_pairs(preprocess_debug, tokenizer):
    """Ids and labels of what is trained, as for rows with labels."""
    content = [question(i) | {"chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(4)]
    logged = preprocess_debug(content, "paired", weight=2.0)
    shown = [re.findall(r"\((-?\d+), (\d+)\)", text) for text in logged if "(-100, " in text]
    assert len(shown) == 6
    for chosen, rejected in zip(shown[::2], shown[1::2], strict=True):
        whole, other = (tokenizer.decode([int(i) for _, i in row]) for row in (chosen, rejected))
        (number,) = re.findall(r"Question (\d)", whole)
        assert whole.endswith(f"assistant\nYes {number}.<|im_end|>")
        assert other == whole.replace("Yes", "No")
        for row in (chosen, rejected):
            trained = [int(i) for label, i in row if label != "-100"]
            assert tokenizer.decode(trained).endswith(f" {number}.<|im_end|>")


def test_an_unreadable_label_stops_the_run_with_its_row(config, entry):
    cfg = config([entry("rows", rows("good", "bad", "meh"))], skip_prepare_dataset=True)
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: `label`: 'meh' is not a label"):
        load_datasets(cfg)


def test_one_label_stops_the_run(config, entry):
    cfg = config([entry("rows", rows("good", True, 1, None))], skip_prepare_dataset=True)
    with pytest.raises(ValueError, match="all 3 rows are positive"):
        load_datasets(cfg)


def test_what_the_host_s_loader_reads_survives_its_validation(config, entry):
    loader = {"name": "preference", "ds_type": "json", "split": "train[:5]", "revision": "abc"}
    cfg = config([entry("rows", [], **loader)], test_datasets=[entry("more", [], **loader)])
    for found in (cfg.datasets[0], cfg.test_datasets[0]):
        assert {key: found[key] for key in loader} == loader
        key = found.type.removeprefix("aot_plugin.unpaired_")
        assert cfg.aot_datasets[key]["strategy"] == "chat_template.default"


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_a_user_defined_type_survives_in_test_datasets(mode, config, entry):
    """The host's validation drops the keys that no type of supervised fine-tuning has."""
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "completion": "A", "label": True}
    kind = {"prompt_format": "<{prompt}>"}
    data, held_out = (
        entry(name, [row, row | {"prompt": name, "label": False}], type=kind)
        for name in ("rows", "more")
    )
    meta = load_datasets(config([data], aot_mode=mode, test_datasets=[held_out]))
    assert set(meta.train_dataset["prompt"]) == {"<Q>", "<rows>"}
    assert set(meta.eval_dataset["prompt"]) == {"<Q>", "<more>"}


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
    counted = check_labels(Dataset.from_dict({"label": [True, False, True]}))
    assert counted == "2 positive and 1 negative rows"


def resolved_default(**options):
    entry = {"path": "rows", "type": "chat_template.default", **options}
    return next(iter(resolve_unpaired_datasets([entry])[1].values()))


@pytest.mark.parametrize("strategy", ["drop", None, "truncate", "TRUNCATE"])
def test_too_long_by_the_host_s_rule(tokenizer, strategy):
    """All lengths around the limit, against the host's own functions."""
    limit = 48
    resolved = resolved_default()
    dataset = Dataset.from_list(
        [
            {"prompt": "é " * prompt, "completion": "of " * completion, "label": True}
            for prompt in (1, 10, *range(24, 48))
            for completion in range(1, 48, 2)
        ]
    )
    cfg = {"sequence_len": limit, "excess_length_strategy": strategy}
    counts = count_rows(dataset, resolved, RowCounts("rows", "train"), cfg, tokenizer)

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
        counts = RowCounts("rows", "train")
        count_rows(content, resolved_default(), counts, cfg, tokenizer, seen)
        assert counts.dropped == dropped
    other = Dataset.from_list(rows(False, False))
    counts = count_rows(other, resolved_default(), RowCounts("rows", "train"), cfg, tokenizer, seen)
    assert (counts.negative, counts.dropped) == (1, {"duplicate": 1})


def test_table_without_drops():
    lines = table([RowCounts("a.jsonl", "train", 3, positive=2, negative=1)]).splitlines()
    assert lines[0].split() == ["dataset", "split", "rows", "responses", "positive", "negative"]
    assert lines[1].split() == ["a.jsonl", "train", "3", "3", "2", "1"]


@pytest.mark.slow
def test_held_out_rows_are_not_silently_those_of_train(config, tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    write_rows(folder / "train.jsonl", rows(True, False, True))
    write_rows(folder / "test.jsonl", rows(True, False, prompt="Other"))
    entry = {"path": str(folder), "type": "chat_template.default"}
    test = {**entry, "split": "test"}
    meta = load_datasets(config([entry], test_datasets=[test]))
    assert (len(meta.train_dataset), len(meta.eval_dataset)) == (3, 2)
    cfg = config([entry], test_datasets=[entry])
    with pytest.raises(ValueError, match=r"does not say which split.*one of train, test"):
        load_datasets(cfg)
    with pytest.raises(ValueError, match=r"does not say which split.*one of train, test"):
        first_rows(cfg, "test", 0, 5, load_tokenizer(cfg), str(tmp_path / "tmp"))


def asked(text):
    return [{"role": "user", "content": text}]


def test_columns_of_several_types_are_named(tokenizer):
    content = [
        *rows(True, False),
        {"prompt": asked("Turns?"), "completion": "Yes.", "label": True, "other": 1},
        {"prompt": "'", "completion": "Yes.", "label": True, "other": "1"},
    ]
    counts = RowCounts("rows", "train")
    mixed = Dataset.from_list(content, on_mixed_types="use_json")
    count_rows(mixed, resolved_default(), counts, {"sequence_len": 64}, tokenizer)
    (warning,) = (w for w in counts.warnings() if "several types" in w)
    assert warning.startswith("rows: `prompt` holds values of several types")


@pytest.mark.parametrize(
    ("options", "labels", "warned"),
    [
        ({"grades": [2, 4]}, [0, 1, 1], "all 3 .* lowest level by the thresholds 2, 4;"),
        ({"grades": [0.2]}, [5, 1, 4], "all 3 .* highest level by the thresholds 0.2;"),
        ({"positive_min": 4, "negative_max": 2}, [0, 3, 1], "all 2 .* lowest .* 2, 4;"),
        ({"grades": [2, 4]}, [0, 1, 3], None),
        ({"grades": [0.5]}, [0, 1, 1], None),
        ({}, [0, 0, 0], None),
        ({"grades": [2, 4]}, [None, None], None),
    ],
)
def test_ratings_on_another_scale_than_the_thresholds(tokenizer, options, labels, warned):
    """Labels 0 and 1 under thresholds of a scale up to 5 would all be of the lowest level."""
    content = [{"prompt": "?", "completion": str(n), "label": at} for n, at in enumerate(labels)]
    counts = RowCounts("rows", "train")
    resolved = resolved_default(**options)
    count_rows(Dataset.from_list(content), resolved, counts, {"sequence_len": 64}, tokenizer)
    found = list(counts.warnings())
    assert bool(found) == bool(warned)
    assert warned is None or re.search(warned, found[0])


@pytest.mark.parametrize(
    "content",
    [
        [
            *rows(True, False),
            *rows(True, False, prompt='"Quoted", 12'),
            {"prompt": asked("As turns?"), "completion": "Yes.", "label": True},
        ],
        [
            *rows(True, False),
            {"prompt": "?", "completion": [{"role": "assistant", "content": "!"}], "label": False},
        ],
        [
            {"messages": asked("Text?"), "completion": "Yes.", "label": True},
            {
                "messages": asked([{"type": "text", "text": "Parts?"}]),
                "completion": "No.",
                "label": False,
            },
        ],
    ],
    ids=["prompt", "completion", "content"],
)
def test_check_reads_columns_of_several_types_as_a_training_does(config, entry, tmp_path, content):
    cfg = config([entry("mixed", content)])
    first = first_rows(cfg, "train", 0, 50, load_tokenizer(cfg), str(tmp_path / "tmp"))
    trained = load_datasets(cfg).train_dataset
    assert first.counts.dropped == {} and len(first.kept) == len(content)
    columns = ["prompt_ids", "completion_ids", "label"]
    trained = prepare_tokens(trained, load_tokenizer(cfg), "unpaired", cfg.sequence_len)
    ids = [sorted(map(str, rows.select_columns(columns))) for rows in (first.kept, trained)]
    assert ids[0] == ids[1]
