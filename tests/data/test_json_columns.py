"""JSON files whose columns hold values of several types, as `datasets` stores them."""

from pathlib import Path

import pytest
from axolotl.loaders import load_tokenizer
from data_helpers import write_rows
from datasets import load_dataset

from aot_plugin.data.first_rows import first_rows
from aot_plugin.data.json_columns import encoded_texts, mixed_columns
from aot_plugin.data.loading import load_datasets, row_counts

TEXT = 'Café "tea" and/or milk:\n1. stone'


def said(content, role="user"):
    return [{"role": role, "content": content}]


def rows(n, **columns):
    return [
        {"prompt": f"River {i}?", "completion": TEXT, "label": i % 2 == 0} | columns
        for i in range(n)
    ]


@pytest.fixture
def files(tmp_path):
    """``files(parts)``: a directory with a JSON file for each list of rows."""

    def make(*parts):
        folder = tmp_path / "parts"
        folder.mkdir()
        for number, part in enumerate(parts):
            write_rows(folder / f"part-{number}.jsonl", part)
        return str(folder)

    return make


ODD = {
    "a number": {"completion": 7},
    "turns": {"completion": said("Yes.", "assistant")},
    "a prompt of turns": {"prompt": said("Lake?")},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_texts_that_became_json_in_a_later_file_are_refused(config, files, tmp_path, odd, at):
    """Otherwise they are trained with quotes and escapes."""
    part = rows(2)
    part.insert(at, {**rows(1)[0], **odd})
    (name,) = odd
    data = {"path": files(rows(3), part), "type": "chat_template.default", "split": "train"}
    first = 4 if at == 0 else 3
    message = rf"parts, row {first}: .*`{name}` by its JSON"
    cfg = config([data])
    with pytest.raises(ValueError, match=message):
        load_datasets(cfg)
    with pytest.raises(ValueError, match=message):
        first_rows(cfg, "train", 0, 200, load_tokenizer(cfg), str(tmp_path / "tmp"))


def test_contents_of_turns_that_became_json(config, files):
    conversations = rows(3, prompt=said("Tea/coffee?"))
    parts = [*rows(2, prompt=said("Tea/coffee?")), *rows(1, prompt=said([{"text": "Why?"}]))]
    data = {"path": files(conversations, parts), "type": "chat_template.default", "split": "train"}
    with pytest.raises(ValueError, match=r"row 3: .*`prompt` by its JSON"):
        load_datasets(config([data]))


def test_a_later_chunk_of_a_large_file(tmp_path):
    many = rows(3000, completion="word " * 800)
    path = write_rows(tmp_path / "large.jsonl", [*many, *rows(2), *rows(1, completion=7)])
    dataset = load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "c"))
    assert dataset[3000]["completion"] != TEXT
    name, first = encoded_texts(dataset, {"completion"}, [Path(path)])
    assert name == "completion" and first < 3000


@pytest.mark.parametrize(
    "parts",
    [
        (rows(3), rows(3)),
        (rows(3), rows(3, completion=7)),
        (rows(3), [*rows(1, completion='"Quoted"'), *rows(1, completion='"Quoted too"')]),
        (rows(3), [*rows(1, completion=""), *rows(1, completion='"Quoted"')]),
        (rows(3), [*rows(1, completion="12"), *rows(1, completion="null")]),
        (rows(3, completion='"Quoted"'), rows(3, completion='{"answer": 1}')),
        ([*rows(3), *rows(1, completion=7)], rows(3)),
    ],
    ids=[
        "text",
        "numbers",
        "quotes",
        "an empty text",
        "text like JSON",
        "answers in JSON",
        "in the first file",
    ],
)
def test_files_that_are_read_rightly(parts, files):
    dataset = load_dataset(files(*parts), split="train")
    assert encoded_texts(dataset, {"prompt", "completion"}) is None
    assert dataset["completion"][-1] == parts[-1][-1]["completion"] or len(parts[-1]) == 3


def test_what_a_slice_leaves_of_a_wrong_part(config, files):
    """The value that began it is cut off; its escapes are a writer's that no other text has."""
    path = files(rows(3), [*rows(2), *rows(1, completion=7)])
    data = {"path": path, "type": "chat_template.default", "split": "train[:4]"}
    with pytest.raises(ValueError, match=r"row 3: .*`completion` by its JSON"):
        load_datasets(config([data]))


def test_labels_as_answers(config, files):
    """Without a sign of escapes: most of what follows is in quotes."""
    part = [*rows(2, completion="positive"), *rows(1, completion=7)]
    path = files(rows(3, completion="negative"), part)
    data = {"path": path, "type": "chat_template.default", "split": "train"}
    with pytest.raises(ValueError, match=r"row 3: .*`completion` by its JSON"):
        load_datasets(config([data]))


JSON_ANSWERS = {
    "sorted": ["I can't.", '{"a": 1}', '"Paris"'],
    "code": ["print", "True", "'a'", '"abc"', "3", "[1, 2]"],
    "an empty text": ["Some.", "", '"Quoted."', ""],
}


@pytest.mark.parametrize("answers", JSON_ANSWERS.values(), ids=JSON_ANSWERS)
def test_answers_that_are_json_by_themselves(config, tmp_path, answers):
    content = [
        {**rows(1)[0], "completion": a or " ", "label": i > 0} for i, a in enumerate(answers)
    ]
    path = write_rows(tmp_path / "rows.jsonl", content)
    trained = load_datasets(config([{"path": path, "type": "chat_template.default"}]))
    assert len(trained.train_dataset) == sum(bool(answer) for answer in answers)


def test_a_column_that_nobody_reads(config, files):
    part = [*rows(2, id="b/0"), *rows(1, id=1)]
    data = {"type": "chat_template.default", "split": "train"}
    path = files(rows(3, id="a/0"), part)
    assert len(load_datasets(config([{"path": path, **data}])).train_dataset) == 6


CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}
MIXED = {
    "text and turns": ([*rows(2), *rows(1, prompt=said("Why?"))], ["prompt"]),
    "text and parts": (
        rows(2, prompt=said("Why?")) + rows(2, prompt=said([{"type": "text", "text": "How?"}])),
        ["prompt"],
    ),
    "turns with calls": ([*rows(2, prompt=said("Why?")), *rows(1, prompt=[CALL])], []),
    "turns with names": (
        rows(2, prompt=said("Why?")) + rows(1, prompt=[{**said("How?")[0], "name": "Ann"}]),
        [],
    ),
    "tools": (rows(1, tools=[{"name": "f"}]) + rows(1, tools=[{"name": "g", "strict": True}]), []),
    "another column": (rows(1, source="web") + rows(1, source=["web"]), ["source"]),
}


@pytest.mark.parametrize(("content", "mixed"), MIXED.values(), ids=MIXED)
def test_columns_in_which_text_and_others_stand_for_each_other(content, mixed, tmp_path):
    """Only there text that is JSON by itself comes out as another value."""
    path = write_rows(tmp_path / "rows.jsonl", content)
    dataset = load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "c"))
    assert mixed_columns(dataset) == mixed


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({"field_prompt": "data.p"}, {"data": {"p": "Why?"}}),
        ({"type": "chat_template.listwise", "field_completion": ["a", "b"]}, {"a": "x", "b": "y"}),
        ({"field_prompt": "q"}, {"q": "Why?"}),
    ],
    ids=["a member", "a list of columns", "a column"],
)
def test_the_columns_that_are_read_are_named(config, tmp_path, options, columns):
    name, value = next(iter(columns.items()))
    turns = {"p": said("How?")} if isinstance(value, dict) else said("How?", "assistant")
    if "field_prompt" in options:
        turns = {"p": said("How?")} if isinstance(value, dict) else said("How?")
    else:
        options = {**options, "field_label": ["la", "lb"]}
        columns = {**columns, "la": True, "lb": False}
    content = [*rows(2, **columns, unread="x"), *rows(2, **{**columns, name: turns, "unread": 1})]
    path = write_rows(tmp_path / "rows.jsonl", content)
    cfg = config([{"path": path, "type": "chat_template.default", **options}])
    ((counts,),) = row_counts(cfg, load_tokenizer(cfg)).values()
    expected = [] if name == "data" else [name]
    assert counts.mixed == expected


def test_a_second_column_of_prompts_is_not_read(config, tmp_path):
    messages = [{"messages": said("Why?")}, {"messages": "Why?"}, {}]
    content = [{**rows(1)[0], "label": bool(i), **more} for i, more in enumerate(messages)]
    path = write_rows(tmp_path / "rows.jsonl", content)
    cfg = config([{"path": path, "type": "chat_template.default"}])
    ((counts,),) = row_counts(cfg, load_tokenizer(cfg)).values()
    assert counts.mixed == [] and counts.responses == 3


HOST = {"question": "Q?", "system": "", "chosen": "Good.", "rejected": "Bad."}


@pytest.mark.parametrize("kind", ["chatml.intel", {"field_prompt": "question"}])
def test_turns_among_text_with_a_type_of_the_host(config, tmp_path, kind):
    """It would write them as Python shows them."""
    content = [HOST, HOST, {**HOST, "chosen": said("Good.", "assistant")}]
    path = write_rows(tmp_path / "rows.jsonl", content)
    data = {"path": path, "type": kind}
    with pytest.raises(ValueError, match=r"row 2.*`chosen` holds turns"):
        load_datasets(config([data], aot_mode="paired"))


@pytest.mark.parametrize("kind", ["chatml.intel", {"field_prompt": "question"}])
def test_numbers_among_text_with_a_type_of_the_host(config, tmp_path, kind):
    """Its text is text all the same: identical pairs are dropped, and `check` shows the tokens."""
    content = [HOST, {**HOST, "chosen": 7}, {**HOST, "chosen": "Same.", "rejected": "Same."}]
    content = [{**row, "id": number or "zero"} for number, row in enumerate(content)]
    path = write_rows(tmp_path / "rows.jsonl", content)
    cfg = config([{"path": path, "type": kind}], aot_mode="paired")
    first = first_rows(cfg, "train", 0, 9, load_tokenizer(cfg), str(tmp_path / "tmp"))
    assert first.counts.mixed == ["chosen"]
    trained = load_datasets(cfg).train_dataset
    assert len(trained) == len(first.kept) == 2
    assert sorted(text[0] for text in trained["chosen"]) == ["7", "G"]


def test_rows_without_a_type(config, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*rows(2), *rows(1, completion=7)])
    trained = load_datasets(config([{"path": path}])).train_dataset
    assert sorted(trained["completion"]) == ["7", TEXT, TEXT]
    turns = [*rows(2), *rows(1, completion=said("!", "assistant"))]
    path = write_rows(tmp_path / "turns.jsonl", turns)
    with pytest.raises(ValueError, match=r"`completion` holds turns: write `type: chat_template"):
        load_datasets(config([{"path": path}]))
