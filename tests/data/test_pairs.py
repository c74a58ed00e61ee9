"""Pairs through the host's own loading: which turns are trained, and what is refused or dropped."""

import json

import pytest
from data_helpers import write_rows
from transformers import AutoTokenizer

from aot_plugin.data import prepare_tokens
from aot_plugin.data.loading import load_datasets

USER = {"role": "user", "content": "Name a colour."}
RED = {"role": "assistant", "content": "Red."}
MORE = {"role": "user", "content": "Another?"}
BLUE = {"role": "assistant", "content": "Blue."}
PINK = {"role": "assistant", "content": "Pink."}
PROMPT = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
LONGER = f"{PROMPT}Red.<|im_end|>\n<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def load(config, model_dir, tmp_path):
    """``load(rows, **entry)``: the texts of the ids that a paired run trains."""

    def run(rows, mode="paired", **entry):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        path = write_rows(folder / "rows.jsonl", rows)
        entry = {"path": path, "type": "chat_template.default"} | entry
        cfg = config([entry], "smollm2", aot_mode=mode, chat_template="chatml")
        tokenizer = AutoTokenizer.from_pretrained(model_dir("smollm2"))
        prepared = prepare_tokens(load_datasets(cfg).train_dataset, tokenizer, mode, None)
        names = ("chosen", "rejected") if mode == "paired" else ("completion",)
        return [
            tuple(tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", *names))
            for row in prepared
        ]

    return run


SPLIT = (LONGER, "Blue.<|im_end|>", "Pink.<|im_end|>")


@pytest.mark.parametrize("kind", ["chat_template.default", "chat_template.argilla_chat"])
@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, RED, MORE, BLUE], "rejected": [USER, RED, MORE, PINK]},
        {"messages": [USER], "chosen": [RED, MORE, BLUE], "rejected": [RED, MORE, PINK]},
        {"messages": [USER, RED, MORE], "chosen": BLUE, "rejected": [PINK]},
        {"messages": [USER, RED, MORE], "chosen": "Blue.", "rejected": "Pink."},
        {"messages": [USER, RED, MORE, BLUE], "chosen": BLUE, "rejected": PINK},
        {"prompt": [USER, RED, MORE], "chosen": BLUE, "rejected": PINK},
        # A list of turns that says the end of the prompt again, and one that says all of it.
        {"messages": [USER, RED, MORE], "chosen": [MORE, BLUE], "rejected": [MORE, PINK]},
        {"messages": [USER], "chosen": [USER, RED, MORE, BLUE], "rejected": [RED, MORE, PINK]},
        # Conversations as JSON, and rows of which others have the other column.
        {"messages": json.dumps([USER, RED, MORE]), "chosen": BLUE, "rejected": json.dumps([PINK])},
        {"messages": None, "prompt": [USER, RED, MORE], "chosen": BLUE, "rejected": PINK},
        {
            "messages": [USER, RED, MORE],
            "prompt": "not looked at",
            "chosen": [BLUE | {"content": [{"type": "text", "text": "Blue"}, {"text": "."}]}],
            "rejected": [PINK],
        },
    ],
)
def test_the_last_turn_is_trained_and_those_before_it_are_prompt(row, kind, load):
    assert load([row], type=kind) == [SPLIT]


def test_the_bare_name_of_the_type(load):
    row = {"messages": [USER, RED, MORE], "chosen": BLUE, "rejected": PINK}
    assert load([row], type="chat_template") == [SPLIT]


def test_an_answer_about_turns_is_text(load):
    """JSON counts as turns where the prompt is JSON, too, or among them."""
    turns = json.dumps([{"role": "assistant", "content": "Hello"}])
    told = json.dumps([USER, {"role": "assistant", "content": "Hello"}])
    rows = [
        {"messages": [USER], "chosen": turns, "rejected": "Red."},
        {"prompt": USER["content"], "chosen": turns, "rejected": "Red."},
        {"prompt": USER["content"], "chosen": told, "rejected": json.dumps([USER, RED])},
        {"prompt": "Write JSON.", "chosen": told, "rejected": "No."},
    ]
    chosen = [found[1].removesuffix("<|im_end|>") for found in (load([row])[0] for row in rows)]
    assert chosen == [turns, turns, "Hello", told]


def test_one_letter_answers(load):
    rows = [{"messages": [USER], "chosen": one, "rejected": two} for one, two in ("ed", "me", "dm")]
    expected = [(PROMPT, f"{one}<|im_end|>", f"{two}<|im_end|>") for one, two in ("ed", "me", "dm")]
    assert sorted(load(rows)) == sorted(expected)


def test_pairs_that_say_nothing_are_dropped_and_named(load, caplog):
    good = {"chosen": [USER, RED], "rejected": [USER, BLUE]}
    same = {"chosen": [USER, RED], "rejected": [USER, RED]}
    rendered_same = {"chosen": [USER, RED], "rejected": [USER, RED | {"name": "bob"}]}
    other = {"chosen": [USER, RED, MORE, BLUE], "rejected": [USER, PINK, MORE, BLUE]}
    empty = {"chosen": [USER, RED], "rejected": [USER, RED | {"content": " "}]}
    twice = {"chosen": [USER, RED, BLUE], "rejected": [USER, RED, PINK]}
    rows = [good, same, other, empty, rendered_same, twice, good]
    assert load(rows) == [(PROMPT, "Red.<|im_end|>", "Blue.<|im_end|>")] * 2
    assert "identical (row 1, 4): chosen and rejected are the same" in caplog.text
    assert "1 dropped as other prompt (row 2): chosen and rejected answer different" in caplog.text
    assert "1 dropped as empty (row 3)" in caplog.text
    assert "1 dropped as unasked (row 5): an answer follows another one" in caplog.text
    (table,) = (r.getMessage() for r in caplog.records if "rows of the paired" in r.getMessage())
    assert table.splitlines()[1].split()[2:5] == ["rows", "pairs", "empty"]
    assert table.splitlines()[2].split()[2:] == ["7", "2", "1", "1", "2", "1"]


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_the_table_comes_before_the_error_that_sends_to_it(mode, load, caplog):
    rows = [{"messages": [USER], "chosen": RED, "rejected": RED}] * 3
    with pytest.raises(ValueError, match=r"no rows are left to train on.*the table above"):
        load(rows, mode, type=f"chat_template.{'default' if mode == 'paired' else 'paired'}")
    assert f"{3 if mode == 'paired' else 6} dropped as identical" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [USER, RED], "chosen": BLUE, "rejected": PINK},
            r"row 0: `messages` ends with an answer \('Red.'\)",
        ),
        (
            {"messages": [{"role": "boss", "content": "Hi"}], "chosen": BLUE, "rejected": PINK},
            "row 0: `messages`: role 'boss' is unknown; known are user, human",
        ),
        ({"messages": [USER], "chosen": 4, "rejected": 5}, "row 0: `chosen`: 4 is neither text"),
        (
            {"messages": [USER], "chosen": BLUE | {"content": [{"type": "image"}]}, "rejected": ""},
            "row 0: `chosen`: .* is not a part with text",
        ),
        (
            {"messages": [USER], "chosen": BLUE | {"tool_calls": [{"a": "b"}]}, "rejected": PINK},
            "row 0: the chat template does not render `tool_calls`, which turn 1 of 2 has",
        ),
        (
            {"messages": [USER, BLUE | {"content": "", "tool_calls": [{"a": "b"}]}, MORE]}
            | {"chosen": BLUE, "rejected": PINK},
            "row 0: the chat template does not render `tool_calls`, which turn 1 of 4 has",
        ),
        (
            {"messages": [USER], "chosen": BLUE},
            "row 0: there is no column `rejected`.*; `aot_mode: unpaired` reads",
        ),
        (
            {"messages": [USER], "chosen": BLUE, "rejected": PINK, "images": ["a.png"]},
            "row 0: an image can't be read: .*a.png",
        ),
    ],
)
def test_what_can_t_be_trained_is_named(row, message, load):
    with pytest.raises(ValueError, match=rf"rows\.jsonl.*{message}"):
        load([row])


def test_reasoning_that_the_template_leaves_out_is_named(load, caplog):
    thought = BLUE | {"reasoning_content": "Let me see."}
    assert load([{"messages": [USER], "chosen": thought, "rejected": PINK}]) == [
        (PROMPT, "Blue.<|im_end|>", "Pink.<|im_end|>")
    ]
    assert "leaves out `reasoning_content` in 1 answers" in caplog.text


@pytest.mark.parametrize("name", ["reasoning", "thinking", "function_call"])
def test_parts_of_an_answer_under_other_names_are_named(name, load, caplog):
    assert load([{"messages": [USER], "chosen": BLUE | {name: "hm"}, "rejected": PINK}])
    assert f"the chat template leaves out `{name}` in 1 answers" in caplog.text


def test_another_prompt_beside_whole_conversations_is_named(load, caplog):
    row = {"messages": [MORE], "chosen": [USER, RED], "rejected": [USER, BLUE]}
    assert load([row]) == [(PROMPT, "Red.<|im_end|>", "Blue.<|im_end|>")]
    assert "not the row's own prompt, which differs, in 2 answers" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "chosen", "said"),
    [
        ("Name a colour, please.", "Human: Name a colour, please.\nAssistant: Red.", "begins with"),
        ("<|im_start|>user\nHi<|im_end|>\n", "Red.", "the chat template writes itself"),
        ("Name a colour.", "Red.<|im_end|>", "the chat template writes itself"),
        ("Hi", "[{'role': 'assistant', 'content': 'Red.'}]", "a list of turns stored as text"),
        ("Name a colour, please.", "Red. Did you say: Name a colour, please?", None),
    ],
)
def test_text_that_is_hardly_meant_as_it_is_is_named(prompt, chosen, said, load, caplog):
    assert load([{"prompt": prompt, "chosen": chosen, "rejected": "No."}])
    found = [line for line in caplog.messages if said and said in line]
    assert len(found) == bool(said), caplog.messages
    assert " answers" not in caplog.text or said


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_an_answer_that_looks_like_a_transcript(mode, load):
    """Beside a prompt it is an answer; alone it is a conversation (hh-rlhf)."""
    text = "\n\nHuman: Name a colour.\n\nAssistant: Red."
    if mode == "paired":
        rows = [{"prompt": "Write.", "chosen": text, "rejected": "No."}]
        alone = [{"chosen": text, "rejected": text.replace("Red", "Blue")}]
    else:
        rows = [{"prompt": "Write.", "completion": text, "label": n == 0} for n in range(2)]
        alone = [
            {"completion": text.replace("Red", w), "label": w == "Red"} for w in ("Red", "Blue")
        ]
    asked = PROMPT.replace("Name a colour.", "Write.")
    found = load(rows, mode)
    assert all(row[:2] == (asked, f"{text}<|im_end|>") for row in found) and found
    assert {row[0] for row in load(alone, mode)} == {PROMPT}


def test_misspelt_keys_of_a_user_defined_type(load):
    for mode, key in (("paired", "feild_chosen"), ("unpaired", "field_lable")):
        with pytest.raises(ValueError, match=rf"`datasets\[0\].type.{key}` is not a key of a user"):
            load([TEXT], mode, type={"field_prompt": "prompt", key: "x"})


TEXT = {"prompt": "Name a colour.", "question": "Name a colour.", "instruction": "Name a colour."}


@pytest.mark.parametrize(
    ("mode", "kind", "row", "message"),
    [
        (
            "paired",
            "chatml.argilla_chat",
            {"chosen": [USER, RED, MORE, BLUE], "rejected": [USER, RED, MORE, PINK]},
            r"`chosen` holds 4 turns \(user, assistant, user, assistant\), which type chatml",
        ),
        (
            "paired",
            "llama3.argilla_chat",
            {"chosen": [{"role": "system", "content": "Be short."}, USER, RED]}
            | {"rejected": [{"role": "system", "content": "Be short."}, USER, PINK]},
            r"`chosen` holds 3 turns \(system, user, assistant\)",
        ),
        (
            "paired",
            "chatml.argilla_chat",
            {"chosen": [USER, RED], "rejected": [MORE, PINK]},
            "`rejected` answers another prompt than the row's",
        ),
        (
            "paired",
            "chatml.ultra",
            {"chosen": [MORE, RED], "rejected": [USER, PINK]},
            "another",
        ),
        (
            "paired",
            "chatml.ultra",
            {"chosen": [USER, RED | {"tool_calls": [{"a": "b"}]}], "rejected": [USER, PINK]},
            "`chosen` holds `tool_calls`",
        ),
        (
            "paired",
            "chatml.intel",
            {"chosen": [USER, RED], "rejected": [PINK]},
            "holds turns",
        ),
        ("paired", "chatml.intel", {"chosen": "a", "rejected": None}, "`rejected` is null"),
        (
            "paired",
            "chatml.intel",
            {"question": None, "chosen": "a", "rejected": "b"},
            " is null",
        ),
        (
            "paired",
            {"field_chosen": "chosen"},
            {"chosen": RED, "rejected": PINK},
            "`chosen` holds dict, which type user-defined",
        ),
        ("paired", None, {"prompt": [USER], "chosen": [RED], "rejected": [PINK]}, "holds turns"),
        (
            "unpaired",
            "chatml.ultra",
            {"completion": [USER, RED], "label": True},
            "holds turns",
        ),
        (
            "unpaired",
            "llama3.argilla_chat",
            {"completion": [USER, RED | {"tool_calls": [{"a": "b"}]}], "label": True},
            "`completion` holds `tool_calls`",
        ),
    ],
)
def test_what_a_text_type_can_t_represent_is_refused(mode, kind, row, message, load):
    with pytest.raises(ValueError, match=rf"rows\.jsonl.*{message}"):
        load([TEXT | row, TEXT | row | {"label": False}], mode, type=kind)


@pytest.mark.parametrize(
    ("mode", "kind", "row"),
    [
        ("paired", "chatml.argilla_chat", {"chosen": [USER, RED], "rejected": [USER, PINK]}),
        ("paired", "llama3.ultra", {"chosen": [USER, RED], "rejected": [USER, PINK]}),
        ("paired", "chatml.intel", {"chosen": "a", "rejected": "b", "system": None}),
        (
            "paired",
            "zephyr.nectar",
            {"answers": [{"answer": word, "rank": n} for n, word in enumerate("abc")]},
        ),
        ("unpaired", "chatml.argilla_chat", {"completion": [USER, RED, MORE, BLUE]}),
        ("unpaired", "llama3.ultra", {"completion": "Blue."}),
    ],
)
def test_what_a_text_type_represents_is_trained(mode, kind, row, load):
    rows = [TEXT | row | {"label": n == 0} for n in range(2)]
    assert len(load(rows, mode, type=kind)) == 2


def test_equal_texts_of_a_text_type_are_dropped_and_named(load, caplog):
    rows = [{"question": f"Q{n}", "chosen": "a", "rejected": "ab"[n % 2]} for n in range(4)]
    assert len(load(rows, type="chatml.intel")) == 2
    assert "2 pairs of the train datasets have the same text" in caplog.text


def test_held_out_prompts_that_are_trained_are_counted(config, tmp_path, caplog):
    rows = [{"prompt": f"Q{n // 2}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(8)]
    entry = {"path": write_rows(tmp_path / "rows.jsonl", rows), "type": "chat_template.default"}
    others = [row | {"prompt": f"{row['prompt']}?"} for row in rows[:4]]
    other = {**entry, "path": write_rows(tmp_path / "other.jsonl", others)}
    load_datasets(config([entry], "smollm2", aot_mode="paired", test_datasets=[other]))
    assert "held-out" not in caplog.text
    more = {**entry, "path": write_rows(tmp_path / "more.jsonl", others + rows[:3])}
    load_datasets(config([entry], "smollm2", aot_mode="paired", test_datasets=[more]))
    assert "3 of 7 held-out rows have a prompt that is trained on" in caplog.text


@pytest.mark.parametrize(
    ("kind", "template", "differs"),
    [
        ("chatml.intel", "chatml", False),
        ("chatml.intel", "llama3", True),
        ("llama3.intel", "llama3", False),
        ("llama3.intel", "chatml", True),
        ("chatml.intel", "mistral_v1", True),
    ],
)
def test_a_type_that_writes_another_form_than_the_template(
    kind, template, differs, config, tmp_path, caplog
):
    """The template is what is saved with the model, and what it will be asked by."""
    rows = [{"question": f"Q{n}", "chosen": "a", "rejected": "b"} for n in range(2)]
    entry = {"path": write_rows(tmp_path / "rows.jsonl", rows), "type": kind}
    load_datasets(config([entry], "smollm2", aot_mode="paired", chat_template=template))
    assert (f"its type {kind} writes prompts that end in" in caplog.text) == differs
