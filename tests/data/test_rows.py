"""From rows to examples, without tokenizer or host."""

import pytest
from datasets import Dataset

from aot_plugin.data import resolve_unpaired_datasets
from aot_plugin.data.labels import Drop
from aot_plugin.data.rows import Example
from aot_plugin.data.strategy import arranged, outcomes

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be kind."}


def read(row, kind="default", **options):
    entry = {"path": "rows.jsonl", "type": f"chat_template.{kind}", **options}
    _, resolved = resolve_unpaired_datasets([entry])
    return [o for _, row in outcomes([row], *resolved.values(), numbers=[17]) for o in row]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello.", "label": True},
        {"prompt": [USER], "completion": "Hello.", "label": True},
        {"prompt": USER, "completion": ANSWER, "label": True},
        {"prompt": [USER], "completion": [ANSWER], "label": True},
        {"messages": [USER], "completion": "Hello.", "label": True},
        {"messages": [USER, ANSWER], "label": True},
        {"prompt": "Hi", "completion": [USER, ANSWER], "label": True},
        {"completion": [USER, ANSWER], "label": True},
        {"completion": "\n\nHuman: Hi\n\nAssistant: Hello.", "label": True},
    ],
)
def test_forms_of_one_example(row):
    assert read(row) == [Example([USER], ANSWER, True)]


def test_multi_turn_and_system_from_turns_column_and_option():
    turns = [USER, ANSWER, USER]
    with_system = [Example([SYSTEM, *turns], ANSWER, False)]
    rest = {"completion": "Hello.", "label": 0}
    assert read({"prompt": [SYSTEM, *turns], **rest}) == with_system
    assert read({"prompt": turns, "system": "Be kind.", **rest}) == with_system
    assert read({"prompt": turns, "tone": "Be kind.", **rest}, field_system="tone") == with_system
    assert read({"prompt": turns, **rest}, system_prompt="Be kind.") == with_system
    # What the row says goes before the option.
    assert read({"prompt": [SYSTEM, *turns], **rest}, system_prompt="No.") == with_system
    assert read({"prompt": turns, "system": "Be kind.", **rest}, system_prompt="No.") == with_system
    assert read({"prompt": turns, "system": None, **rest}, system_prompt="Be kind.") == with_system
    for system in (SYSTEM, [SYSTEM]):
        assert read({"prompt": turns, "system": system, **rest}) == with_system
        assert read({"prompt": turns, "system": system, **rest}, field_system="system")


def test_a_column_named_system_that_is_no_system_prompt():
    """Without `field_system` it may be the number or the settings of a system."""
    row = {"prompt": "Hi", "completion": "Hello.", "label": True}
    for system in (7, [], ["llama", "gpt"], {"model": "gpt", "temperature": 0.7}):
        assert read(row | {"system": system}) == [Example([USER], ANSWER, True)]
    assert read(row | {"system": []}, field_system="system") == [Example([USER], ANSWER, True)]
    for system in (7, ["llama"], {"model": "gpt"}):
        with pytest.raises(ValueError, match=r"row 17: `system`: .* is not text"):
            read(row | {"system": system}, field_system="system")
    for system in ([SYSTEM, SYSTEM], USER):
        with pytest.raises(ValueError, match=r"row 17: `system`: .* is not one system turn"):
            read(row | {"system": system})


@pytest.mark.parametrize(
    "prompt",
    [
        "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Hi\n\nAssistant:",
        "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nHi",
    ],
)
def test_transcripts_as_prompt(prompt):
    row = {"prompt": prompt, "completion": "Hello.", "label": True}
    assert read(row) == [Example([USER, ANSWER, USER], ANSWER, True)]


def test_turns_after_the_completion_s_first_are_a_longer_prompt():
    row = {"prompt": [USER], "completion": [ANSWER, USER, ANSWER], "label": True}
    assert read(row) == [Example([USER, ANSWER, USER], ANSWER, True)]


def test_mapped_roles_and_properties():
    row = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello.", "thought": "Greet."},
        ],
        "verdict": "good",
    }
    mapping = {"role": "from", "content": "value", "reasoning_content": "thought"}
    found = read(
        row,
        field_messages="conversations",
        field_label="verdict",
        message_property_mappings=mapping,
    )
    assert found == [Example([USER], ANSWER | {"reasoning_content": "Greet."}, True)]
    row["conversations"][0]["from"] = "customer"
    with pytest.raises(ValueError, match="role 'customer' is unknown; known are user, human"):
        read(
            row,
            field_messages="conversations",
            field_label="verdict",
            message_property_mappings=mapping,
        )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": None, "completion": "Hello.", "label": True},
        {"prompt": " ", "completion": "Hello.", "label": True},
        {"prompt": [], "completion": "Hello.", "label": True},
        {"prompt": [SYSTEM], "completion": "Hello.", "label": True},
        {"prompt": "Hi", "completion": None, "label": True},
        {"prompt": "Hi", "completion": "\n", "label": True},
        {"prompt": "Hi", "completion": [], "label": True},
        {"prompt": "Hi", "completion": [{"role": "assistant", "content": None}], "label": True},
        {"messages": [USER], "label": True},
        {"messages": [USER, ANSWER, USER], "label": True},
    ],
)
def test_empty(row):
    assert read(row) == [Drop.EMPTY]


def test_unlabeled():
    assert read({"prompt": "Hi", "completion": "Hello.", "label": None}) == [Drop.UNLABELED]


@pytest.mark.parametrize(
    ("rating", "label"), [(5, True), (4, True), ("3.5", None), (2, False), (1, False)]
)
def test_ratings(rating, label):
    row = {"prompt": "Hi", "completion": "Hello.", "stars": rating}
    (found,) = read(row, field_label="stars", positive_min=4, negative_max=2)
    assert found == (Drop.BETWEEN if label is None else Example([USER], ANSWER, label))


def test_paired_forms():
    bad = {"role": "assistant", "content": "What?"}
    expected = [Example([USER], ANSWER, True), Example([USER], bad, False)]
    for row in (
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"},
        {"messages": [USER], "chosen": ANSWER, "rejected": bad},
        {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, bad]},
        {"chosen": [USER, ANSWER], "rejected": [USER, bad]},
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: What?",
        },
    ):
        assert read(row, "paired") == expected
    # The half that can be used is used.
    row = {"prompt": "Hi", "chosen": "Hello.", "rejected": ""}
    assert read(row, "paired") == [expected[0], Drop.EMPTY]


def test_listwise_in_a_list_column():
    def labels(ratings, **options):
        row = {
            "instruction": "Hi",
            "completions": [
                {"response": f"Answer {i}.", "scores": {"overall": rating}}
                for i, rating in enumerate(ratings)
            ],
        }
        found = read(
            row,
            "listwise",
            field_prompt="instruction",
            field_responses="completions",
            field_label="scores.overall",
            **options,
        )
        for i, outcome in enumerate(found):
            if isinstance(outcome, Example):
                assert outcome.prompt == [USER]
                assert outcome.completion["content"] == f"Answer {i}."
        return [o.label if isinstance(o, Example) else o.value for o in found]

    between, unlabeled = "between thresholds", "unlabeled"
    assert labels([8, "3", 5, None], positive_min=7, negative_max=4) == [
        True,
        False,
        between,
        unlabeled,
    ]
    assert labels([], positive_min=7, negative_max=4) == []
    assert labels([2, 9, "N/A", 5], best_and_worst=True) == [False, True, unlabeled, between]
    assert labels([2, 9, 5], best_and_worst=True, lower_is_better=True) == [True, False, between]
    assert labels([5, 5], best_and_worst=True) == [between, between]
    assert labels([1, 0, True]) == [True, False, True]


def test_listwise_in_columns():
    row = {"prompt": "Hi", "a": "Hello.", "b": "What?", "a_safe": True, "b_safe": False}
    bad = {"role": "assistant", "content": "What?"}
    expected = [Example([USER], ANSWER, True), Example([USER], bad, False)]
    columns = {"field_completion": ["a", "b"]}
    assert read(row, "listwise", **columns, field_label=["a_safe", "b_safe"]) == expected
    for preference, labels in ((-2, (True, False)), (3, (False, True))):
        found = read(row | {"win": preference}, "listwise", **columns, field_preference="win")
        assert tuple(outcome.label for outcome in found) == labels
    found = read(row | {"win": 0}, "listwise", **columns, field_preference="win")
    assert found == [Drop.BETWEEN, Drop.BETWEEN]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"prompt": "Hi", "completion": "Hello.", "label": "meh"},
            {},
            "rows.jsonl, row 17: `label`: 'meh' is not a label; accepted are true/false",
        ),
        (
            {"prompt": "Hi", "completion": "Hello.", "stars": "many"},
            {"field_label": "stars", "positive_min": 4, "negative_max": 2},
            "row 17: `stars`: 'many' is not a number",
        ),
        (
            {"prompt": "Hi", "completion": "Hello.", "stars": "4,5"},
            {"field_label": "stars", "grades": [2, 4]},
            "row 17: `stars`: '4,5' is not a number; write a decimal point",
        ),
        (
            {"instruction": "Hi", "output": "Hello.", "label": True},
            {},
            "row 17: there is no column `completion`; the row has instruction, output, label; name "
            "the column with `field_completion` (or `field_messages`, if it holds whole",
        ),
        (
            {"question": "Hi", "completion": "Hello.", "label": True},
            {},
            "name the column with `field_prompt` (or `field_messages`) of the entry",
        ),
        (
            {"prompt": "Hi", "completion": "Hello.", "ok": True},
            {},
            "there is no column `label`; the row has prompt, completion, ok; name the column with "
            "`field_label` of the entry",
        ),
        (
            {"prompt;completion;label": "Hi;Hello.;good"},
            {},
            "if this is a CSV file, separate its cells by commas, not by semicolons",
        ),
        (
            {"prompt": "Hi", "completion": "Hello.", "label": True},
            {"field_prompt": "question"},
            "row 17: there is no column `question`; the row has prompt, completion, label",
        ),
        (
            {"prompt": "Hi", "completion": "Hello.", "label": True},
            {"field_completion": "response"},
            "there is no column `response`",
        ),
        (
            {"prompt": "Hi", "completion": "Hello.", "label": True},
            {"field_system": "sys"},
            "there is no column `sys`",
        ),
        (
            {"prompt": 3, "completion": "Hello.", "label": True},
            {},
            "3 is neither text nor a list of turns",
        ),
        (
            {"prompt": [{"from": "human"}], "completion": "Hello.", "label": True},
            {},
            "is not a turn with `role` and `content`; set `message_property_mappings`",
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"image": 1}]}],
                "completion": "!",
                "label": 1,
            },
            {},
            "`prompt`: {'image': 1} is not a part with text",
        ),
        (
            {"prompt": "Hi", "completion": "Hello.", "label": True, "tools": "{"},
            {},
            "row 17: `tools`: '{' is not JSON",
        ),
        (
            {"prompt": "Hi", "completion": "Hello.", "label": True, "tools": ["clock"]},
            {},
            "row 17: `tools`: ['clock'] is not a list of tools",
        ),
        (
            {"prompt": "Hi", "completion": "Hello.", "label": True},
            {"field_tools": "functions"},
            "there is no column `functions`",
        ),
    ],
)
def test_errors_name_dataset_row_field_and_value(row, options, message):
    with pytest.raises(ValueError) as error:
        read(row, **options)
    assert message in str(error.value)


def tree(*messages):
    names = ("message_id", "parent_id", "role", "text", "rank")
    return [dict(zip(names, message, strict=True)) for message in messages]


TREE = tree(
    ("c", "a2", "prompter", "Why?", None),
    ("a1", "p", "assistant", "No.", 1),
    ("p", None, "prompter", "Hi", None),
    ("a2", "p", "assistant", "Hello.", 0),
    ("d1", "c", "assistant", "Because.", 2),
    ("d2", "c", "assistant", "So that.", 1),
    ("d3", "c", "assistant", "Hm.", None),
    ("e", "d1", "prompter", "Thanks.", None),
    ("f", "e", "assistant", "Sure.", 0),
    ("g", "lost", "assistant", "Where?", 0),
    ("h", "lost", "assistant", "Here!", 1),
)


def read_threads(messages, **options):
    entry = {"path": "trees.jsonl", "type": "chat_template.threads", **options}
    (resolved,) = resolve_unpaired_datasets([entry])[1].values()
    rows = arranged(Dataset.from_list(messages), resolved)
    return [o for _, row in outcomes(rows, resolved, numbers=range(len(rows))) for o in row]


def test_threads_of_a_tree():
    """Messages in any order; answers are ranked at every level of the tree."""

    def says(text):
        return {"role": "assistant", "content": text}

    deeper = [USER, ANSWER, {"role": "user", "content": "Why?"}]
    expected = [
        Example([USER], says("No."), False),
        Example([USER], ANSWER, True),
        Example(deeper, says("Because."), False),
        Example(deeper, says("So that."), True),
        Drop.UNLABELED,
        Drop.BETWEEN,  # an only answer
        *[Drop.EMPTY] * 2,  # to a message that is missing
    ]
    assert read_threads(TREE) == expected
    renamed = [{f"{key}_": value for key, value in message.items()} for message in TREE]
    fields = {"id": "message_id_", "parent": "parent_id_"}
    fields |= {name: f"{name}_" for name in ("text", "role", "rank")}
    assert read_threads(renamed, **{f"field_{k}": v for k, v in fields.items()}) == expected


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (TREE, {"field_rank": "place"}, "trees.jsonl: there is no column `place` (`field_rank`)"),
        ([*TREE, TREE[0]], {}, "trees.jsonl: two messages have the `message_id` 'c'"),
        (
            tree(("a", "b", "assistant", "x", 0), ("b", "a", "prompter", "y", None)),
            {},
            "trees.jsonl: the message 'b' is above itself",
        ),
        (TREE, {"field_prompt": "text"}, "`field_prompt` has no meaning where each row is one"),
    ],
)
def test_trees_that_can_t_be_read(messages, options, message):
    with pytest.raises(ValueError) as error:
        read_threads(messages, **options)
    assert message in str(error.value)
