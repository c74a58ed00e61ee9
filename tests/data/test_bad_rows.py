"""Malformed rows and files through the host's own loading, with the plugin: each is an error that
names file and row, or a correct data set that accounts for every row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.chat_templates import get_chat_template
from harness import config, paired_rows, unpaired_rows, word_tokenizer, write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

MANY = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LONG = "long " * 20_000
Row = dict[str, Any]
Load = Callable[..., list[Row]]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of a few words, which loads in no time, and the config of a model."""
    tokenizer = word_tokenizer(
        get_chat_template("chatml"), ["user", "assistant"], ["<|im_start|>"], eos_token="<|im_end|>"
    )
    path = tmp_path_factory.mktemp("small")
    tokenizer.save_pretrained(path)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(path)
    return path


@pytest.fixture
def load(small_model: Path, tmp_path: Path) -> Load:
    """``load(content, mode)``: the prepared rows of a file with these bytes or rows."""
    serial = iter(range(10**6))

    def run(content: bytes | list[Row], mode: str, suffix: str = "jsonl", **keys: Any) -> list[Row]:
        path = tmp_path / f"rows{next(serial)}.{suffix}"  # no cache of an earlier file
        if not isinstance(content, bytes):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(content)
        cfg = config(small_model, path, tmp_path / "out", aot_mode=mode, dataset_num_proc=0)
        cfg["datasets"] = [{"path": str(path), "type": "chat_template.default"}]
        cfg |= {"skip_prepare_dataset": False, "dataset_prepared_path": f"{path}.prepared", **keys}
        loaded = load_cfg(str(write_config(tmp_path / "config.yml", cfg)))
        rows = PluginManager.get_instance().load_datasets(loaded).train_dataset.to_list()
        written = next(Path(f"{path}.prepared").glob("*/aot_row_counts.json"), None)
        if written is not None:
            (counts,) = json.loads(written.read_text())
            dropped = counts["dropped"]
            kept = counts["pairs"] if mode == "paired" else counts["positive"] + counts["negative"]
            assert counts["rows"] == kept + sum(dropped.values())
            assert [row.get("label") for row in rows].count(True) == counts["positive"]
            assert len(rows) == kept
            run.dropped = dropped  # type: ignore[attr-defined]
        return rows

    return run


UNPAIRED: dict[str, tuple[Callable[[Row], Row], str]] = {
    "as it should be": (lambda row: row, "kept"),
    "prompt null": (lambda row: row | {"prompt": None}, "empty"),
    "prompt empty": (lambda row: row | {"prompt": ""}, "empty"),
    "prompt blank": (lambda row: row | {"prompt": " \n\t"}, "empty"),
    "prompt missing": (lambda row: {k: v for k, v in row.items() if k != "prompt"}, "empty"),
    "prompt misspelt": (
        lambda row: {"promt" if k == "prompt" else k: v for k, v in row.items()},
        "empty",
    ),
    "completion null": (lambda row: row | {"completion": None}, "empty"),
    "completion empty": (lambda row: row | {"completion": ""}, "empty"),
    "completion missing": (
        lambda row: {k: v for k, v in row.items() if k != "completion"},
        "empty",
    ),
    "label null": (lambda row: row | {"label": None}, "unlabeled"),
    "label missing": (lambda row: {k: v for k, v in row.items() if k != "label"}, "unlabeled"),
    "prompt long": (lambda row: row | {"prompt": LONG}, "too long"),
    "completion long": (lambda row: row | {"completion": LONG}, "too long"),
    "control characters": (lambda row: row | {"completion": "a\x00b\u202e\ud83d\ude00"}, "kept"),
    "special token": (lambda row: row | {"completion": "<|im_end|><|im_start|>user"}, "kept"),
    "more columns": (lambda row: row | {"prompts": 7, "chosen": "x"}, "kept"),
}
"""What is done to a row, and what is to become of it."""

WRONG: dict[str, Callable[[Row], Row]] = {
    "prompt a number": lambda row: row | {"prompt": 7},
    "prompt an object": lambda row: row | {"prompt": {"text": "x"}},
    "prompt a list": lambda row: row | {"prompt": ["x", "y"]},
    "completion a number": lambda row: row | {"completion": 1.5},
    "completion a boolean": lambda row: row | {"completion": False},
    "completion of another role": lambda row: (
        row | {"completion": [{"role": "bot", "content": "x"}]}
    ),
    "completion without content": lambda row: row | {"completion": [{"role": "assistant"}]},
    "label a word": lambda row: row | {"label": "meh"},
    "label a rating": lambda row: row | {"label": 5},
    "label a list": lambda row: row | {"label": [True]},
}


@pytest.mark.slow
@MANY
@given(kinds=st.lists(st.sampled_from(sorted(UNPAIRED)), max_size=6))
def test_unpaired_rows_are_kept_or_counted(kinds: list[str], load: Load) -> None:
    good = unpaired_rows(len(kinds) + 4)
    rows = [UNPAIRED[kind][0](row) for kind, row in zip(kinds, good, strict=False)]
    rows += good[len(kinds) :]  # three are enough for both labels
    fates = [UNPAIRED[kind][1] for kind in kinds]
    prepared = load(rows, "unpaired")
    assert len(prepared) == len(rows) - sum(fate != "kept" for fate in fates)
    expected = {fate: fates.count(fate) for fate in set(fates) - {"kept"}}
    assert load.dropped == expected  # type: ignore[attr-defined]
    for row in prepared:
        assert row["prompt"].strip() and row["template_completion_ids"]


@pytest.mark.slow
@MANY
@given(
    kind=st.sampled_from(sorted(WRONG)),
    at=st.integers(0, 5),
    everywhere=st.booleans(),
    good=st.integers(3, 6),
)
def test_an_unpaired_row_of_the_wrong_type_is_named(
    kind: str, at: int, everywhere: bool, good: int, load: Load
) -> None:
    rows = unpaired_rows(max(good, at + 1))
    rows = [WRONG[kind](row) if everywhere or i == at else row for i, row in enumerate(rows)]
    with pytest.raises(ValueError, match=r"rows\d+\.jsonl(, row \d+: | can't be read: )") as error:
        load(rows, "unpaired")
    if ", row " in str(error.value):
        assert f", row {0 if everywhere else at}: " in str(error.value)


TURN = {"role": "assistant", "content": "house river"}
PAIRED: dict[str, tuple[Callable[[Row], Row], str]] = {
    "as it should be": (lambda row: row, "kept"),
    "chosen null": (lambda row: row | {"chosen": None}, "empty"),
    "rejected null": (lambda row: row | {"rejected": None}, "empty"),
    "chosen missing": (lambda row: {k: v for k, v in row.items() if k != "chosen"}, "empty"),
    "chosen without text": (lambda row: row | {"chosen": TURN | {"content": None}}, "empty"),
    "chosen says nothing": (lambda row: row | {"chosen": TURN | {"content": ""}}, "empty"),
    "chosen of another role": (lambda row: row | {"chosen": TURN | {"role": "bot"}}, "error"),
    "messages null": (lambda row: row | {"messages": None}, "empty"),
    "messages missing": (lambda row: {k: v for k, v in row.items() if k != "messages"}, "empty"),
    "messages answered": (lambda row: row | {"messages": [*row["messages"], TURN]}, "error"),
    "messages with the chosen answer": (
        lambda row: row | {"messages": [*row["messages"], row["chosen"]]},
        "kept",
    ),
    "chosen long": (lambda row: row | {"chosen": TURN | {"content": LONG}}, "too long"),
    "messages long": (
        lambda row: row | {"messages": [{"role": "user", "content": LONG}]},
        "too long",
    ),
    "equal responses": (lambda row: row | {"rejected": row["chosen"]}, "identical"),
    "more columns": (lambda row: row | {"note": "x"}, "kept"),
}


@pytest.mark.slow
@MANY
@given(kinds=st.lists(st.sampled_from(sorted(PAIRED)), min_size=1, max_size=4))
def test_pairs_are_kept_or_counted_or_named(kinds: list[str], load: Load) -> None:
    good = paired_rows(len(kinds) + 2)
    rows = [PAIRED[kind][0](row) for kind, row in zip(kinds, good, strict=False)] + good[-2:]
    fates = [PAIRED[kind][1] for kind in kinds]
    if "error" not in fates:
        dropped = [fate for fate in fates if fate != "kept"]
        assert len(load(rows, "paired")) == len(rows) - len(dropped)
        expected = {fate: dropped.count(fate) for fate in set(dropped)}
        assert load.dropped == expected  # type: ignore[attr-defined]
        return
    with pytest.raises(ValueError, match=r"rows\d+\.jsonl(, row \d+: | can't be read: )") as error:
        load(rows, "paired")
    named = [i for i in range(len(rows)) if f", row {i}: " in str(error.value)]
    assert not named or fates[named[0]] == "error"


FILES: dict[str, bytes] = {
    "empty": b"",
    "blank lines": b"\n\n\n",
    "not UTF-8": b'{"prompt": "\xff\xfe", "completion": "x", "label": true}\n',
    "half a row": b'{"prompt": "a", "completion": "b", "label": true}\n{"prompt": "a", "comp',
    "no JSON": b"prompt,completion,label\na,b,true\n",
    "a binary": bytes(range(256)) * 20,
    "a list of numbers": b"[1, 2, 3]\n",
}


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_data_set_is_named(name: str, mode: str, load: Load) -> None:
    with pytest.raises(ValueError, match=r"rows0\.jsonl|`datasets`: no rows are left"):
        load(FILES[name], mode)


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_duplicates_are_kept_unless_the_hosts_key_says_otherwise(mode: str, load: Load) -> None:
    rows = (paired_rows(3) if mode == "paired" else unpaired_rows(3)) * 3
    assert len(load(rows, mode)) == 9
    assert len(load(rows, mode, dataset_exact_deduplication=True)) == 3


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.parametrize("strategy", ["drop", "truncate"])
def test_nothing_is_left_after_truncation(mode: str, strategy: str, load: Load) -> None:
    """Prompts that fill the sequence leave completions of length zero."""
    rows = paired_rows(4) if mode == "paired" else unpaired_rows(4)
    for row in rows:
        row |= {"prompt": LONG} if mode == "unpaired" else {"messages": LONG}
    for _ in range(2):  # what was prepared for the first run is no other error for the second
        with pytest.raises(ValueError, match=r"no rows are left to train on"):
            load(rows, mode, excess_length_strategy=strategy)


@pytest.mark.parametrize(
    ("entry", "rows", "said"),
    [
        ({"type": "chatml.intel"}, [{"question": "q", "chosen": "c"}], "row 0: .*'rejected'"),
        ({"type": "chatml.ultra"}, [{"prompt": "q", "chosen": [], "rejected": []}], "row 0: Index"),
        ({}, [{"prompt": "q", "chosen": "c", "rejected": ""}], "row 0: `rejected` is empty"),
        ({"type": {"field_chosen": "good"}}, [{"prompt": "q", "bad": "c"}], "row 0: "),
    ],
)
def test_a_row_that_a_type_of_the_hosts_cant_read_is_named(
    entry: Row, rows: list[Row], said: str, load: Load, tmp_path: Path
) -> None:
    path = tmp_path / "host.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"host\.jsonl, {said}"):
        load([], "paired", datasets=[{"path": str(path), **entry}])
