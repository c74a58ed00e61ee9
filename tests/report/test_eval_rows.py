import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from aot_plugin.data.options import ConversationOptions
from aot_plugin.data.render import Renderer
from aot_plugin.report.rows import read_rows, sequences_of
from aot_plugin.report.scoring import run_renderer


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n\n")
    return path


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
SINGLE = {"messages": [{"role": "user", "content": "p"}], "completion": "c", "label": True}


@pytest.mark.parametrize(("row", "mode"), [(PAIR, "paired"), (SINGLE, "unpaired")])
def test_kinds(row, mode, tmp_path):
    assert read_rows(write(tmp_path, row, "", row)) == (mode, [row, row])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, "{"], r"rows.jsonl, line 2: not JSON"),
        (["[1]"], r"line 1: not an object"),
        ([{"prompt": "p", "chosen": "c"}], r"line 1: found keys \['chosen', 'prompt'\]"),
        ([SINGLE | {"label": "maybe"}], r"line 1: 'maybe' is not a label; accepted are true/false"),
        ([SINGLE | {"label": None}], r"line 1: `label`: None is no label"),
        ([PAIR, SINGLE], r"line 2: paired and unpaired rows"),
        ([], r"rows.jsonl: no rows"),
    ],
)
def test_bad_files_are_explained(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path, *rows))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def test_lines_end_with_line_breaks_only(tmp_path):
    """Unicode has more ends of lines, which JSON may hold as they are."""
    row = PAIR | {"chosen": "a\u2028b\u0085c"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path) == ("paired", [row])


def test_the_run_s_options(tokenizer):
    options = ConversationOptions(system_prompt="Be short.", roles={"assistant": ["bot"]})
    render = Renderer({}, options, tokenizer)
    row = PAIR | {"chosen": {"role": "bot", "content": "c"}}
    sequence, _ = sequences_of(row, "paired", render, tokenizer, options)
    assert "Be short." in tokenizer.decode(sequence.prompt)
    assert tokenizer.decode(sequence.completion) == "c<|im_end|>"


def texts(tokenizer, row, mode, cfg=None, plain=False):
    render = None if plain else Renderer(cfg or {}, ConversationOptions(), tokenizer)
    found = sequences_of(row, mode, render, tokenizer)
    return [tuple(tokenizer.decode(ids) for ids in sequence) for sequence in found]


@pytest.mark.parametrize(
    "completion",
    ["c", {"role": "assistant", "content": "c"}, [{"role": "assistant", "content": "c"}]],
)
@pytest.mark.parametrize("prompt", ["p", [{"role": "user", "content": "p"}]])
def test_the_completion_is_what_the_template_adds(prompt, completion, tokenizer):
    row = {"prompt": prompt, "chosen": completion, "rejected": "r"}
    (asked, answer), other = texts(tokenizer, row, "paired")
    assert asked.endswith("<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n")
    assert answer == "c<|im_end|>"
    assert other == (asked, "r<|im_end|>")


def test_a_template_without_end_and_one_that_opens_a_block(tokenizer):
    """As in training: an end-of-sequence token is put where none is, and a block that the
    generation prompt has opened goes on in the completion."""
    bare = {"chat_template": "jinja"}
    bare["chat_template_jinja"] = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    )
    assert texts(tokenizer, PAIR, "paired", bare)[0] == ("user: p", "assistant: c<|im_end|>")
    (asked, answer), _ = texts(tokenizer, PAIR, "paired", {"chat_template": "qwen3"})
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n")
    assert answer == "</think>\n\nc<|im_end|>"
    closed = {"chat_template": "qwen3", "chat_template_kwargs": {"enable_thinking": False}}
    assert texts(tokenizer, PAIR, "paired", closed)[0][1] == "c<|im_end|>"


def test_plain_text(tokenizer):
    assert texts(tokenizer, PAIR, "paired", plain=True) == [
        ("p", "c<|im_end|>"),
        ("p", "r<|im_end|>"),
    ]


def test_what_cannot_be_rendered_is_explained(tokenizer):
    with pytest.raises(ValueError, match="need strings for prompt and completion"):
        texts(tokenizer, SINGLE, "unpaired", plain=True)
    with pytest.raises(ValueError, match="empty prompt"):
        texts(tokenizer, PAIR | {"prompt": ""}, "paired", plain=True)
    with pytest.raises(ValueError, match="empty chosen"):
        texts(tokenizer, PAIR | {"chosen": ""}, "paired", plain=True)
    with pytest.raises(ValueError, match="`chosen`: there is no prompt, or no response"):
        texts(tokenizer, PAIR | {"chosen": ""}, "paired")
    with pytest.raises(ValueError, match="`rejected`: 5 is neither text nor a list of turns"):
        texts(tokenizer, PAIR | {"rejected": 5}, "paired")
    bare = SimpleNamespace(chat_template=None)
    with pytest.raises(ValueError, match="no chat template; use --plain"):
        run_renderer(Path("nowhere"), bare)


@pytest.mark.parametrize("label", [True, 1, "good", "1"])
def test_labels_as_in_training(label, tmp_path):
    mode, (row,) = read_rows(write(tmp_path, SINGLE | {"label": label}))
    assert (mode, row["label"]) == ("unpaired", True)


def test_the_answer_is_the_last_turn(tokenizer, tmp_path):
    answer = {"role": "assistant", "content": "c"}
    whole = {"messages": [*SINGLE["messages"], answer], "label": True}
    mode, (row,) = read_rows(write(tmp_path, whole))
    render = Renderer({}, ConversationOptions(), tokenizer)
    expected = sequences_of(SINGLE, mode, render, tokenizer)
    assert sequences_of(row, mode, render, tokenizer) == expected
