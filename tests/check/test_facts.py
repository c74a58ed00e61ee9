"""What `check` says of a config, against what is counted by hand or done by a training."""

import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from axolotl.loaders import load_tokenizer
from data_helpers import write_rows
from transformers import AutoTokenizer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from aot_plugin.check.facts import Facts, Lengths
from aot_plugin.check.loading import load_facts
from aot_plugin.check.text import PIECE, shortened, size, written
from aot_plugin.data import prepare_tokens
from aot_plugin.data.loading import load_datasets

LONG = "word " * 300


def plain(facts: Facts) -> str:
    """The text without its line breaks, which depend on paths."""
    return " ".join(written(facts, colours=False).split())


def pair(question: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    turns = {"chosen": chosen, "rejected": rejected}
    answers = {name: {"role": "assistant", "content": text} for name, text in turns.items()}
    return {"messages": [{"role": "user", "content": question}], **answers, **more}


PAIRS = [pair(f"Question {i}?", f"Yes, {i}.", f"No {i}, never.") for i in range(6)]
LABELLED = [
    {"prompt": f"Question {i // 2}", "completion": f"Answer {i}.", "label": i % 3 == 0}
    for i in range(9)
]


@pytest.fixture
def entry(tmp_path: Path) -> Any:
    def make(rows: list[dict[str, Any]], file: str = "rows", **keys: Any) -> dict[str, Any]:
        path = write_rows(tmp_path / f"{file}.jsonl", rows)
        return {"path": path, "type": "chat_template.default"} | keys

    return make


@pytest.fixture
def check(raw_config: Any, tmp_path: Path) -> Any:
    """``check(entries, **keys)``: the facts of a config, as a user writes it."""

    def make(entries: list[dict[str, Any]], rows: int = 200, **keys: Any) -> Facts:
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(raw_config(entries, **keys)))
        return load_facts(path, rows)

    return make


def test_pairs_are_counted(check: Any, entry: Any) -> None:
    bad = [
        pair("Same?", "Yes.", "Yes."),
        pair("", "Yes.", "No."),
        pair("Long?", LONG, "No."),
        pair("Long, too?", "Yes.", LONG),
    ]
    facts = check([entry([*PAIRS, *bad])], aot_mode="paired")
    (found,) = facts.entries
    assert (found.where, found.kind, found.more) == ("datasets[0]", "chat_template.default", False)
    assert (found.counts.rows, found.counts.pairs) == (10, 6)
    assert found.counts.dropped == {"identical": 1, "empty": 1, "too long": 2}
    assert found.lengths is not None and found.lengths.longer == 2
    assert len(found.lengths.tokens) == 2 * 8
    assert "2 rows are longer than `sequence_len: 256`: Axolotl drops" in plain(facts)


def test_labels_levels_and_weights_are_counted(check: Any, entry: Any) -> None:
    stars = [
        {"prompt": f"Q{i}", "completion": f"A{i}", "stars": n, "w": i}
        for i, n in enumerate([1, 2, 3, 4, 5, None])
    ]
    graded = entry(stars, "stars", field_label="stars", grades=[2, 4], field_weight="w")
    facts = check([entry(LABELLED), graded])
    labelled, rated = facts.entries
    assert (labelled.counts.positive, labelled.counts.negative) == (3, 6)
    assert labelled.levels == {} and labelled.weights is None
    # The first has weight 0.
    assert rated.levels == {0.5: 2, 1.0: 2}
    assert rated.weights == (1.0, 2.5, 4.0)
    assert rated.counts.dropped == {"unlabeled": 1, "weight 0": 1}
    assert len(labelled.prompts) == 5 and labelled.prompts.total() == 9


def test_types_of_the_host(check: Any, entry: Any) -> None:
    rows = [*LABELLED, {"prompt": "Long", "completion": LONG, "label": False}]
    (found,) = check([entry(rows, type="chatml.ultra")]).entries
    assert (found.kind, found.counts.positive, found.counts.negative) == ("chatml.ultra", 3, 6)
    assert found.counts.dropped == {"too long": 1}
    pairs = [
        {"system": "", "question": f"Q {i}", "chosen": f"Yes {i}", "rejected": f"No {i}"}
        for i in range(4)
    ]
    pairs[1]["rejected"] = pairs[1]["chosen"]
    facts = check([entry(pairs, type="chatml.intel")], aot_mode="paired")
    (found,) = facts.entries
    assert (found.counts.pairs, found.counts.dropped) == (3, {"identical": 1})
    assert "Yes 0" in facts.shown[0].parts[1].text


def test_no_more_rows_are_read_than_asked(
    check: Any, entry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, every = [], datasets.IterableDataset.iter

    def counted(stream: datasets.IterableDataset, *args: Any, **keys: Any) -> Any:
        for table in every(stream, *args, **keys):
            read.append(len(table))
            yield table

    monkeypatch.setattr(datasets.IterableDataset, "iter", counted)
    labels = ["good", "bad", *["good"] * 7, "perhaps"]
    rows = [{"prompt": f"Q{i}", "completion": "A.", "label": at} for i, at in enumerate(labels)]
    rows += 30 * rows[:1]
    facts = check([entry(rows, weight=0.5)], rows=9)
    (found,) = facts.entries
    assert read == [9 + 1]  # one to know whether there are more
    assert (found.counts.rows, found.more, found.mixing) == (9, True, {"weight": 0.5})
    assert "the first 9 rows, there are more" in plain(facts)
    with pytest.raises(ValueError, match=r"rows.jsonl, row 9: .*'perhaps' is not a label"):
        check([entry(rows)], rows=10)


def test_rows_that_cannot_be_streamed(check: Any, entry: Any, tmp_path: Path) -> None:
    (found,) = check([entry(LABELLED, ds_type="json", split="train[2:]")], rows=5).entries
    assert (found.counts.rows, found.counts.positive, found.more) == (5, 2, True)
    datasets.Dataset.from_list(LABELLED).save_to_disk(tmp_path / "saved")
    saved = {"path": str(tmp_path / "saved"), "type": "chat_template.default"}
    (found,) = check([saved]).entries
    assert (found.counts.positive, found.counts.negative, found.more) == (3, 6, False)


@pytest.mark.parametrize("strategy", ["drop", "truncate"])
@pytest.mark.parametrize("family", ["smollm2", "mistral"])
@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_what_is_shown_is_what_is_trained(
    mode: str, family: str, strategy: str, check: Any, entry: Any, config: Any
) -> None:
    if mode == "paired":
        rows = [PAIRS[0], pair("Long?", LONG, "No."), *PAIRS[1:]]
    else:
        rows = [{"prompt": "Long", "completion": LONG, "label": True}, *LABELLED[1:]]
    keys = {"aot_mode": mode, "family": family, "excess_length_strategy": strategy}
    shown = check([entry(rows)], **keys).shown

    cfg = config([entry(rows)], **keys)
    tokenizer = load_tokenizer(cfg)
    dataset = prepare_tokens(load_datasets(cfg).train_dataset, tokenizer, mode, cfg.sequence_len)
    kind = DataCollatorForPreference if mode == "paired" else DataCollatorForUnpairedPreference
    batch = kind(pad_token_id=0, max_length=cfg.sequence_len)(list(dataset))
    trained = {
        (tuple(ids[~mask & seen].tolist()), tuple(ids[mask & seen].tolist()))
        for ids, mask, seen in zip(
            batch["input_ids"],
            batch["completion_mask"].bool(),
            batch["attention_mask"].bool(),
            strict=True,
        )
    }
    assert len(shown) == 3
    cut = 0
    for row in shown:
        prompt, *completions = row.parts
        assert [part.trained for part in row.parts] == [False, *[True] * len(completions)]
        for part in completions:
            assert (tuple(prompt.ids), tuple(part.ids)) in trained
            assert tokenizer.decode([*prompt.ids, *part.ids]) == prompt.text + part.text
            if family == "smollm2":  # whose ids lose nothing
                assert tokenizer(part.text, add_special_tokens=False)["input_ids"] == part.ids
            cut += len(prompt.ids) + len(part.ids) == cfg.sequence_len
    assert cut == (strategy == "truncate")


def test_every_label_is_shown(check: Any, entry: Any) -> None:
    rows = sorted(LABELLED, key=lambda row: row["label"])
    facts = check([entry(rows)])
    assert [row.parts[1].name for row in facts.shown] == ["positive", "negative", "negative"]
    facts = check([entry(rows), entry(rows, "other")])
    assert [row.where for row in facts.shown] == ["datasets[0]", "datasets[1]", "datasets[0]"]


def test_lengths() -> None:
    found = Lengths(tokens=list(range(1, 101)), limit=98, longer=2, strategy="drop")
    assert (found.median, found.most, found.longest) == (50, 95, 100)
    one = Lengths(tokens=[7], limit=98, longer=0, strategy="drop")
    assert (one.median, one.most, one.longest) == (7, 7, 7)


def test_a_step(check: Any, entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"micro_batch_size": 3, "gradient_accumulation_steps": 4}
    step = check([entry(LABELLED)], **keys).step
    assert (step.rows, step.together, step.labels) == (12, 12, {"positive": 4.0, "negative": 8.0})
    step = check([entry(LABELLED)], aot_batch="micro_batch", **keys).step
    assert (step.rows, step.together, step.labels) == (12, 3, {"positive": 1.0, "negative": 2.0})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert check([entry(LABELLED)], **keys).step.rows == 24


def test_labels_beside_graded_rows_are_levels(check: Any, entry: Any) -> None:
    stars = [{"prompt": f"Q{i}", "completion": "A", "label": n} for i, n in enumerate([1, 3, 5])]
    graded = entry(stars, "stars", grades=[2, 4])
    cut = {"micro_batch_size": 6, "gradient_accumulation_steps": 1}
    step = check([entry(LABELLED), graded], aot_draw="balanced", **cut).step
    assert step.labels == {"level 1": 2.0, "level 0": 2.0, "level 0.5": 2.0}


def test_hints(check: Any, entry: Any) -> None:
    keys = {"aot_mode": "paired", "micro_batch_size": 1}
    assert "Hint: one pair alone" in plain(check([entry(PAIRS)], **keys))
    text = plain(check([entry(PAIRS)], aot_batch="micro_batch", **keys))
    assert "Hint: one pair alone" in text and "each micro-batch of each rank, 1 pair." in text
    rare = [{**row, "label": i == 0} for i, row in enumerate(LABELLED)]
    assert "Hint: often there is no positive row" in plain(check([entry(rare)]))
    hint = plain(check([entry(rare)])).partition("which divides the variance ")[2]
    assert hint.startswith("of a step's gradient by about 2.5; an epoch then reads the rows of the")
    assert "rarest one 8 times." in hint
    cut = {"micro_batch_size": 4, "gradient_accumulation_steps": 2}
    even = plain(check([entry(rare)], aot_draw="balanced", **cut))
    assert "On average 4 positive, 4 negative, in equal numbers." in even
    assert "Hint: often" not in even and "`aot_draw: balanced` draws" not in even
    bad = [{**row, "label": i == 8} for i, row in enumerate(LABELLED)]
    assert "Hint: all of the rows looked at are negative." in plain(check([entry(bad)], rows=8))
    stars = [{**row, "label": 5} for row in LABELLED]
    graded = check([entry(stars, grades=[0.3, 0.6])], rows=8)
    assert "Hint: all of the rows looked at are level 1." in plain(graded)
    assert "No row was kept" in plain(check([entry(PAIRS)], aot_mode="paired", sequence_len=1))


def test_first_rows_of_one_level_say_nothing_of_the_others(check: Any, entry: Any) -> None:
    rated = [{**row, "label": 5 if i < 4 else 1} for i, row in enumerate(LABELLED)]
    by_rating = entry(rated, grades=[2, 4])
    assert "on another scale" not in plain(check([by_rating], rows=4))
    low = entry([{**row, "label": 1} for row in LABELLED], file="low", grades=[2, 4])
    assert "low.jsonl: all 9 responses are of the lowest level by the thresholds 2, 4;" in plain(
        check([by_rating, low])
    )


def test_rows_held_out_at_random(check: Any, entry: Any) -> None:
    """Several rows of a prompt would stand on both sides."""
    assert "hold out rows" not in plain(check([entry(PAIRS)], aot_mode="paired"))
    text = plain(check([entry(PAIRS)], aot_mode="paired", val_set_size=0.5))
    assert "`val_set_size: 0.5` will hold out rows at random. ==" in text
    text = plain(check([entry(PAIRS * 2)], aot_mode="paired", val_set_size=2))
    assert "`val_set_size: 2` will hold out rows at random. Hint: some prompts have several" in text


def test_warnings(check: Any, entry: Any) -> None:
    empty = [{**LABELLED[0], "completion": ""}]
    text = plain(check([entry(empty + LABELLED)]))
    assert "Warning: " in text and "1 dropped as empty (row 0): " in text
    assert "Warning" not in plain(check([entry(LABELLED)]))


def test_memory(check: Any, entry: Any, model_dir: Any) -> None:
    keys = {"aot_mode": "paired", "micro_batch_size": 3, "bf16": False, "fp16": False}
    memory = check([entry(PAIRS)], gradient_checkpointing=True, **keys).memory
    model = yaml.safe_load((Path(model_dir("chatml")) / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model_dir("chatml"))
    assert memory is not None
    sizes = (model["vocab_size"], model["num_hidden_layers"], model["hidden_size"])
    assert (memory.vocabulary, memory.layers, memory.width) == sizes
    turns = [[*PAIRS[0]["messages"], PAIRS[0]["rejected"]]]
    text = tokenizer.apply_chat_template(turns, tokenize=False)[0].rstrip("\n")
    longest = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert memory.longest == longest
    assert memory.tokens(longest) == 6 * longest
    assert memory.logits(longest) == 4 * 6 * longest * model["vocab_size"]
    assert memory.chunk(longest) == memory.logits(longest)  # smaller than a chunk
    assert memory.chunk(10**6) <= 2**26 < memory.logits(10**6)
    assert memory.per_token == 4 * sizes[1] * sizes[2]
    assert size(3 * 2**30) == "3.0 GiB" and size(1536) == "1.5 KiB" and size(2**26) == "64 MiB"


def test_without_weights_and_without_traces(
    check: Any, entry: Any, model_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_dir("chatml"), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    facts = check([entry(LABELLED)], base_model=str(bare), test_datasets=[entry(LABELLED, "held")])
    assert [found.where for found in facts.entries] == ["datasets[0]", "test_datasets[0]"]
    assert {path.name for path in tmp_path.iterdir()} <= {
        *("bare", "config.yml", "rows.jsonl", "held.jsonl", "cache")
    }
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_without_the_config_of_the_model(check: Any, entry: Any, model_dir: Any) -> None:
    keys = {"base_model": "nobody/nothing", "tokenizer_config": str(model_dir("chatml"))}
    facts = check([entry(LABELLED)], **keys)
    assert facts.memory is None and facts.entries[0].counts.positive == 3
    said = "Not known: the config of `nobody/nothing` can't be loaded here"
    assert said in plain(facts)


def test_rows_that_no_training_can_use(check: Any, entry: Any) -> None:
    positive = [row for row in LABELLED if row["label"]]
    facts = check([entry(positive)])
    assert facts.failure is not None and "all 3 rows are positive" in facts.failure
    assert check([entry(positive)], rows=2).failure is None  # others may follow
    facts = check([entry([pair("Same?", "Yes.", "Yes.")])], aot_mode="paired")
    assert facts.failure is not None and "no rows are left" in facts.failure
    assert facts.shown == []
    with pytest.raises(ValueError, match="exceeds configured sequence_len"):
        check(
            [entry([*PAIRS, pair("Long?", LONG, "No.")])],
            aot_mode="paired",
            excess_length_strategy="raise",
        )


def test_the_text(check: Any, entry: Any) -> None:
    bell = pair("Ring\n\tit", "\x1b[31mDing", "Dong")
    facts = check([entry([bell, *PAIRS])], family="smollm2", aot_mode="paired")
    text, coloured = written(facts, False), written(facts, True)
    assert "\x1b" not in text and "\\x1b[31mDing" in text and "| \\tit" in text
    assert "\x1b[32m+ \\x1b[31mDing<|im_end|>" in coloured
    assert "    | <|im_start|>assistant\n" in text
    text = "a" * PIECE + "b" * PIECE
    assert shortened(text) == f"{'a' * 300} […600 characters…] {'b' * 300}"
    assert shortened("a" * PIECE) == "a" * PIECE
