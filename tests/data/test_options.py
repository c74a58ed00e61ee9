"""Entries of the YAML: what is accepted, and what each mistake is answered with."""

import copy

import pytest
from axolotl.utils.data.shared import generate_dataset_hash_from_config
from axolotl.utils.dict import DictDefault

import aot_plugin
from aot_plugin.data import resolve_unpaired_datasets
from aot_plugin.data.options import LOADER_KEYS, DefaultOptions

ENTRY = {"path": "rows.jsonl", "type": "chat_template.default"}
LISTWISE = {"path": "rows.jsonl", "type": "chat_template.listwise"}


def as_dicts(entries):
    return [e if isinstance(e, dict) else e.model_dump(exclude_none=True) for e in entries]


def test_our_types_are_rewritten_and_keep_what_the_host_loads_by():
    entry = ENTRY | {
        "split": "train[:5]",
        "name": "preference",
        "data_files": ["a.jsonl"],
        "ds_type": "json",
        "revision": "main",
        "field_label": "verdict",
    }
    before = copy.deepcopy(entry)
    for where in ("datasets", "test_datasets"):
        (rewritten,), options = resolve_unpaired_datasets([entry], where=where)
        assert entry == before
        (rewritten,) = as_dicts([rewritten])
        ((key, resolved),) = options.items()
        assert rewritten.pop("type") == f"aot_plugin.unpaired_{key}"
        rewritten.pop("trust_remote_code", None)
        assert rewritten == {k: entry[k] for k in LOADER_KEYS if k in entry}
        assert resolved["strategy"] == "chat_template.default"
        assert resolved["options"] == {"field_label": "verdict"}
        assert callable(getattr(aot_plugin, f"unpaired_{key}"))


@pytest.mark.parametrize(
    "host_type",
    [
        "chatml.argilla",
        "llama3.ultra",
        "user_defined.default",
        {"field_prompt": "q", "field_completion": "a", "field_label": "ok"},
        None,
    ],
)
def test_the_hosts_types_pass_unchanged(host_type):
    entry = {"path": "rows.jsonl", "type": host_type}
    entries, options = resolve_unpaired_datasets([entry])
    assert entries == [entry]
    assert options == {}


def test_chat_template_alone_is_the_default():
    short = resolve_unpaired_datasets([ENTRY | {"type": "chat_template"}])
    assert short[1] == resolve_unpaired_datasets([ENTRY])[1]


@pytest.mark.parametrize(
    "change",
    [
        {"field_label": "verdict"},
        {"positive_min": 4, "negative_max": 2},
        {"roles": {"user": ["customer"], "assistant": ["agent"]}},
        {"system_prompt": "Be kind."},
        {"chat_template": "chatml"},
        {"chat_template_jinja": "{{ messages }}"},
        {"type": "chat_template.paired"},
        {"name": "other"},
    ],
)
def test_the_hosts_cache_hash_changes_with_every_option(change):
    def host_hash(entry):
        entries = [DictDefault(e) for e in as_dicts(resolve_unpaired_datasets([entry])[0])]
        return generate_dataset_hash_from_config(DictDefault(sequence_len=8), entries, "tokenizer")

    assert host_hash(ENTRY) == host_hash(dict(reversed(ENTRY.items())))
    assert host_hash(ENTRY) != host_hash(ENTRY | change)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"path": "x", "type": "chat_template.defualt"},
            "`datasets[1].type: chat_template.defualt` is not a strategy for unpaired rows; "
            "accepted are chat_template.default, chat_template.paired, chat_template.listwise, the "
            "host's chatml.argilla",
        ),
        ({"type": "chat_template.default"}, "`datasets[1].path` is missing"),
        (
            ENTRY | {"field_lable": "x"},
            "`datasets[1].field_lable` is not an option of this entry's type; "
            f"accepted are {', '.join((*LOADER_KEYS, *DefaultOptions.model_fields))}",
        ),
        (ENTRY | {"data_files": "a.jsonl"}, "`datasets[1].data_files: a.jsonl` is wrong"),
        (ENTRY | {"shards": 4}, "`datasets[1].shards` is not an option"),
        (ENTRY | {"field_label": 3}, "`datasets[1].field_label: 3` is wrong"),
        (ENTRY | {"positive_min": 4}, "`positive_min` and `negative_max` go together"),
        (ENTRY | {"positive_min": "x", "negative_max": 1}, "`datasets[1].positive_min: x` is wro"),
        (
            ENTRY | {"positive_min": 2, "negative_max": 4},
            "`datasets[1]`: `positive_min: 2` must be above `negative_max: 4`",
        ),
        (
            ENTRY | {"field_prompt": "p", "field_messages": "m"},
            "`field_messages` and `field_prompt` both name the prompt",
        ),
        (ENTRY | {"chat_template": "nope"}, "Template 'nope' not found"),
        (ENTRY | {"chat_template": "jinja"}, "`jinja_template` cannot be None"),
        (
            ENTRY | {"chat_template": "chatml", "chat_template_jinja": "x"},
            "`chat_template_jinja` needs `chat_template: jinja`, not 'chatml'",
        ),
        (LISTWISE, "name the responses once"),
        (LISTWISE | {"field_responses": "a", "field_completion": ["b", "c"]}, "name the responses"),
        (
            LISTWISE | {"field_completion": ["b", "c"], "field_label": "x"},
            "`field_label` must have the form of `field_completion`",
        ),
        (
            LISTWISE | {"field_completion": ["b", "c"], "field_label": ["x"]},
            "`field_label` must have the form of `field_completion`",
        ),
        (
            LISTWISE | {"field_completion": ["b", "c", "d"], "field_preference": "x"},
            "`field_preference` compares two columns",
        ),
        (
            LISTWISE
            | {"field_completion": ["b", "c"], "field_preference": "x", "best_and_worst": True},
            "`field_preference` and `best_and_worst` both decide the labels",
        ),
        (
            LISTWISE
            | {"field_responses": "a", "best_and_worst": True}
            | {"positive_min": 2, "negative_max": 1},
            "`best_and_worst` and `positive_min` both decide the labels",
        ),
        (
            LISTWISE | {"field_responses": "a", "lower_is_better": True},
            "`lower_is_better` needs `best_and_worst: true`",
        ),
        ("rows.jsonl", "`datasets[1]` must be a mapping with `path` and `type`"),
    ],
)
def test_mistakes(entry, message):
    with pytest.raises(ValueError) as error:
        resolve_unpaired_datasets([ENTRY, entry])
    assert message in str(error.value)
    assert "datasets[1]" in str(error.value)
