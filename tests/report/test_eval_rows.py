import json
from types import SimpleNamespace

import pytest

from aot_plugin.report.rows import read_rows, render


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
        ([PAIR | {"messages": []}], r"line 1: found keys"),
        ([SINGLE | {"label": "yes"}], r"line 1: found keys"),
        ([PAIR, SINGLE], r"line 2: paired and unpaired rows"),
        ([], r"rows.jsonl: no rows"),
    ],
)
def test_bad_files_are_explained(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path, *rows))


class Characters:
    """A tokenizer whose ids are code points and whose template is <role:content>."""

    chat_template = "x"
    eos_token = "$"

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        assert not tokenize
        text = "".join(f"<{m['role']}:{m['content']}>\n" for m in messages)
        return text + ("<assistant:" if add_generation_prompt else "")


def texts(sequence):
    return tuple("".join(map(chr, ids)) for ids in sequence)


@pytest.mark.parametrize(
    "completion",
    ["c", {"role": "assistant", "content": "c"}, [{"role": "assistant", "content": "c"}]],
)
@pytest.mark.parametrize("prompt", ["p", [{"role": "user", "content": "p"}]])
def test_the_completion_is_what_the_template_adds(prompt, completion):
    row = {"prompt": prompt, "chosen": completion}
    assert texts(render(Characters(), row, "chosen")) == ("<user:p>\n<assistant:", "c>")


def test_plain_text():
    assert texts(render(Characters(), PAIR, "rejected", plain=True)) == ("p", "r$")


def test_what_cannot_be_rendered_is_explained():
    with pytest.raises(ValueError, match="need strings for prompt and completion"):
        render(Characters(), SINGLE, "completion", plain=True)
    bare = SimpleNamespace(chat_template=None)
    with pytest.raises(ValueError, match="no chat template; use --plain"):
        render(bare, PAIR, "chosen")
    with pytest.raises(ValueError, match="empty prompt"):
        render(Characters(), PAIR | {"prompt": ""}, "chosen", plain=True)
    tokenizer = Characters()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="empty chosen"):
        render(tokenizer, PAIR | {"chosen": ""}, "chosen", plain=True)
    tokenizer.apply_chat_template = lambda messages, **_: str(len(messages))
    with pytest.raises(ValueError, match="renders the prompt differently"):
        render(tokenizer, PAIR, "chosen")
