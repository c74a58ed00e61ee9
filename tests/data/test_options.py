"""Entries of the YAML: what is accepted, and what each mistake is answered with."""

import copy

import pytest
from axolotl.utils.data.shared import generate_dataset_hash_from_config
from axolotl.utils.dict import DictDefault

import aot_plugin
from aot_plugin.data import resolve_datasets, resolve_unpaired_datasets
from aot_plugin.data.options import LOADER_KEYS, DefaultOptions

ENTRY = {"path": "rows.jsonl", "type": "chat_template.default"}
HOST = {"path": "rows.jsonl", "type": "chatml.argilla"}
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
    for where in ("datasets", "test_datasets"):
        (rewritten,), options = resolve_unpaired_datasets([entry], where=where)
        (rewritten,) = as_dicts([rewritten])
        rewritten.pop("trust_remote_code", None)
        assert rewritten == {key: value for key, value in entry.items() if value is not None}
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
        {"weight": 0.5},
        {"weight": 2},
        {"shards": 2},
        {"shards": 2, "shards_idx": 1},
    ],
)
def test_the_hosts_cache_hash_changes_with_every_option(change):
    def host_hash(entry):
        entries = [DictDefault(e) for e in as_dicts(resolve_unpaired_datasets([entry])[0])]
        return generate_dataset_hash_from_config(DictDefault(sequence_len=8), entries, "tokenizer")

    assert host_hash(ENTRY) == host_hash(dict(reversed(ENTRY.items())))
    if set(change) & {"weight", "shards"}:
        assert host_hash(HOST) != host_hash(HOST | change)
    assert host_hash(ENTRY) != host_hash(ENTRY | change)


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_weights_that_repeat_rows(mode):
    entry = {"path": "rows.jsonl", "type": "chatml.intel" if mode == "paired" else "chatml.argilla"}
    for change, message in (
        ({"dataset_exact_deduplication": True}, "would take them out again"),
        ({"val_set_size": 0.1}, "copies of one row on both sides of the split"),
        ({"test_datasets": [entry | {"weight": 2}]}, "`test_datasets[0].weight: 2` repeats rows"),
    ):
        for weight in (1.5, 1):
            cfg = {"datasets": [entry, entry | {"weight": weight}]} | change
            if weight == 1 and "test_datasets" not in change:
                resolve_datasets(cfg, mode)
                continue
            with pytest.raises(ValueError) as error:
                resolve_datasets(cfg, mode)
            assert message in str(error.value)


PAIRS = {"path": "rows.jsonl", "type": "chat_template.default"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            PAIRS | {"type": "chat_template.paird"},
            "is not a strategy for paired rows; accepted are",
        ),
        (PAIRS | {"type": "chat_template.paired"}, "is not a strategy for paired rows"),
        (PAIRS | {"field_choosen": "x"}, "`datasets[0].field_choosen` is not an option of this"),
        (PAIRS | {"weight": True}, "`datasets[0].weight: True` is wrong"),
        (PAIRS | {"shards": 2.5}, "`datasets[0].shards: 2.5` is wrong"),
        ("rows.jsonl", "`datasets[0]` must be a mapping"),
    ],
)
def test_mistakes_in_paired_entries(entry, message):
    with pytest.raises(ValueError) as error:
        resolve_datasets({"datasets": [entry]}, "paired")
    assert message in str(error.value)


def test_an_evaluation_that_the_host_would_read_by_other_options():
    """A function of the user's is given the options of the training entry; ours is not."""
    for kind in ("chat_template.default", "data_helpers.write_rows"):
        one = PAIRS | {"type": kind}
        other = one | {"path": "more.jsonl", "field_chosen": "better"}
        both = {"datasets": [one, other], "test_datasets": [one, other]}
        exchanged = {"datasets": [one, other], "test_datasets": [other]}
        more = {"datasets": [one], "test_datasets": [one, one]}
        resolve_datasets(both, "paired")
        if kind == "chat_template.default":
            resolve_datasets(exchanged, "paired")
            resolve_datasets(more, "paired")
            continue
        with pytest.raises(ValueError, match=r"`test_datasets\[0\]`.* in `field_chosen`: give"):
            resolve_datasets(exchanged, "paired")
        with pytest.raises(ValueError, match=r"options of `datasets\[1\]`, which differs in all"):
            resolve_datasets(more, "paired")


@pytest.mark.parametrize("kind", ["chatml.intel", "llama3.ultra", {"field_prompt": "question"}])
def test_keys_that_the_hosts_text_types_do_not_read(kind):
    for key, value in (("field_chosen", "better"), ("chat_template", "llama3")):
        entry = {"path": "rows.jsonl", "type": kind, key: value}
        with pytest.raises(ValueError, match=rf"`datasets\[0\].{key}` is not an option of this"):
            resolve_datasets({"datasets": [entry]}, "paired")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"path": "x", "type": "chat_template.defualt"},
            "`datasets[1].type: chat_template.defualt` is not a strategy for unpaired rows; "
            "accepted are chat_template.default, chat_template.paired, chat_template.listwise, "
            "chat_template.threads, the host's chatml.argilla",
        ),
        ({"type": "chat_template.default"}, "`datasets[1].path` is missing"),
        (
            ENTRY | {"field_lable": "x"},
            "`datasets[1].field_lable` is not an option of this entry's type; did you mean `field_"
            f"label`? Accepted are {', '.join((*LOADER_KEYS, *DefaultOptions.model_fields))}",
        ),
        (ENTRY | {"label_field": "x"}, "did you mean `field_label`?"),
        (ENTRY | {"data_files": "a.jsonl"}, "`datasets[1].data_files: a.jsonl` is wrong"),
        (ENTRY | {"shards": 0}, "`datasets[1].shards: 0` is wrong"),
        (
            ENTRY | {"shards": 2, "shards_idx": 2},
            "`shards_idx: 2` needs a `shards` above it, not 2",
        ),
        (ENTRY | {"shards_idx": 0}, "`shards_idx: 0` needs a `shards` above it, not None"),
        (ENTRY | {"preprocess_shards": 4}, "`datasets[1].preprocess_shards` is not an option"),
        (ENTRY | {"weight": 0}, "`datasets[1].weight: 0` is wrong: Input should be greater"),
        (ENTRY | {"weight": float("nan")}, "`datasets[1].weight: nan` is wrong"),
        (ENTRY | {"weight": "half"}, "`datasets[1].weight: half` is wrong"),
        (HOST | {"weight": -1}, "`datasets[1].weight: -1` is wrong"),
        (
            HOST | {"field_label": "ok"},
            "`datasets[1].field_label` is not an option of this entry's",
        ),
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
