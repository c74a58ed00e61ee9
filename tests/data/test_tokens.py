"""The tokens that are trained on are those that the tokenizer's own chat template renders."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import FAMILIES, write_rows
from datasets import Dataset, concatenate_datasets
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aot_plugin.data import prepare_tokens, resolve_unpaired_datasets
from aot_plugin.data.loading import load_datasets
from aot_plugin.data.strategy import transform_for
from aot_plugin.data.tokens import features, rows_cut, same_ids

SYSTEM = {"role": "system", "content": "Answer in one word."}
TURNS = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "And another?\n"},
]
CONVERSATIONS = [
    [TURNS[0], {"role": "assistant", "content": "Blue."}],
    [SYSTEM, TURNS[0], {"role": "assistant", "content": "Blue, with blanks. "}],
    [*TURNS, {"role": "assistant", "content": "Green.\n\nOr teal."}],
    [SYSTEM, *TURNS, {"role": "assistant", "content": "Grün 🟢"}],
]


def prepare(conversations, tokenizer, **options):
    """The rows that `chat_template.default` makes of conversations, labels alternating."""
    entry = {"path": "rows", "type": "chat_template.default", **options}
    _, resolved = resolve_unpaired_datasets([entry])
    transform = transform_for({}, *resolved.values())
    batch = {
        "prompt": [turns[:-1] for turns in conversations],
        "completion": [turns[-1:] for turns in conversations],
        "label": [number % 2 == 0 for number in range(len(conversations))],
    }
    return Dataset.from_dict(transform(batch, tokenizer=tokenizer), features=features("unpaired"))


def prepared_rows(dataset, tokenizer, mode="unpaired", max_length=None):
    return prepare_tokens(dataset, tokenizer, mode, max_length)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_templates(family, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir(family))
    prepared = prepared_rows(prepare(CONVERSATIONS, tokenizer), tokenizer, max_length=256)
    assert len(prepared) == len(CONVERSATIONS)
    for row, turns in zip(prepared, CONVERSATIONS, strict=True):
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(turns)["input_ids"]
        assert row["prompt_ids"] == prompt
        # Templates of the ChatML kind put a line break after the token that ends the turn, and
        # with it generation: nothing is trained after it.
        end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
        assert len(whole) - end <= 2
        assert row["prompt_ids"] + row["completion_ids"] == whole[:end]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_character_is_lost_where_a_token_crosses_the_border(family, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir(family))
    turns = [TURNS[0], {"role": "assistant", "content": "  \n Blue."}]
    (row,) = prepared_rows(prepare([turns], tokenizer), tokenizer, max_length=None)
    prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
    assert row["prompt_ids"] == prompt
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"]) == text


def test_a_template_without_end_of_turn_gets_eos_once(tokenizer):
    template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    options = {"chat_template": "jinja", "chat_template_jinja": template}
    (row,) = prepare(CONVERSATIONS[:1], tokenizer, **options)
    assert row["completion"] == "Blue."
    assert row["template_completion_ids"].count(tokenizer.eos_token_id) == 1
    assert row["template_completion_ids"][-1] == tokenizer.eos_token_id


def test_an_end_of_turn_token_other_than_eos_is_the_end(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir("chatml"))
    tokenizer.eos_token = "</s>"
    (row,) = prepare(CONVERSATIONS[:1], tokenizer)
    assert tokenizer.convert_ids_to_tokens(row["template_completion_ids"])[-2:] == [
        ".",
        "<|im_end|>",
    ]


def test_a_reasoning_block_that_only_the_generation_prompt_opens(tokenizer):
    """The answer would be trained within a block that nothing closes."""
    template = (
        "{% for turn in messages %}<|im_start|>{{ turn['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|><think>{% endif %}"
    )
    options = {"chat_template": "jinja", "chat_template_jinja": template}
    with pytest.raises(ValueError, match=r"contradict each other: .<think>. against .Blue"):
        prepare(CONVERSATIONS[:1], tokenizer, **options)


def test_prompts_that_fill_the_length_are_dropped(tokenizer):
    dataset = prepare(CONVERSATIONS, tokenizer)
    lengths = [len(ids) for ids in dataset["template_prompt_ids"]]
    prepared = prepared_rows(dataset, tokenizer, max_length=max(lengths))
    assert len(prepared) == sum(length < max(lengths) for length in lengths) < len(dataset)


@pytest.mark.parametrize("family", ["mistral", "chatml"])
def test_mixed_with_rows_of_the_hosts_strategies(family, model_dir, trl_prepare):
    """Rows of text have TRL's tokens, which begin with the begin-of-sequence token, once."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir(family))
    ours = prepare(CONVERSATIONS, tokenizer)
    host = ours.select_columns(["prompt", "completion", "label"])
    mixed = prepared_rows(concatenate_datasets([host, ours]), tokenizer, max_length=256)
    alone = prepared_rows(ours, tokenizer, max_length=256)
    trl = trl_prepare(family)(host)
    of_host, of_ours = mixed.select(range(4)), mixed.select(range(4, 8))
    bos = tokenizer.bos_token_id
    for name in ("prompt_ids", "completion_ids", "label"):
        assert of_ours[name] == alone[name]
    assert of_host["completion_ids"] == trl["completion_ids"] == alone["completion_ids"]
    for ids, theirs in zip(of_host["prompt_ids"], trl["prompt_ids"], strict=True):
        assert ids[0] == bos != ids[1]
        assert theirs == (ids if family == "chatml" else [bos, *ids])


@pytest.mark.parametrize("paired", [False, True])
def test_text_rows_have_one_begin_and_one_end(paired, model_dir, trl_prepare):
    """Rows as the host's strategies render them: TRL's tokens but for a second begin or end."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir("chatml"))
    tokenizer.eos_token = "</s>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    texts = ["Red.<|im_end|>", "Blue.", "Green.</s>", "Grey.<|im_end|></s>"]
    rows = {"prompt": ["<s>Name one.", "Name one.", "<s>Name one.", "Name one."]}
    if paired:
        rows |= {"chosen": texts, "rejected": texts[::-1]}
    else:
        rows |= {"completion": texts, "label": [True, False, True, False]}
    mode = "paired" if paired else "unpaired"
    prepared = prepared_rows(Dataset.from_dict(rows), tokenizer, mode)
    trl = trl_prepare("chatml", paired, eos_token="</s>")(Dataset.from_dict(rows))

    def texts_of(column, dataset=prepared):
        return [tokenizer.decode(ids).replace(" ", "") for ids in dataset[column]]

    assert texts_of("prompt_ids") == ["<s>Nameone."] * 4
    ends = ["Red.<|im_end|>", "Blue.</s>", "Green.</s>", "Grey.<|im_end|></s>"]
    if paired:
        assert texts_of("chosen_ids") == ends
        assert texts_of("rejected_ids") == ends[::-1]
        assert [ids[-1] for ids in trl["chosen_ids"]] == [tokenizer.eos_token_id] * 4
    else:
        assert texts_of("completion_ids") == ends
    assert prepared["prompt_ids"][1] == trl["prompt_ids"][1]
    name = "chosen_ids" if paired else "completion_ids"
    assert prepared[name][1:] == trl[name][1:]


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.parametrize("family", ["smollm2", "mistral", "llama3"])
def test_a_format_that_ends_in_a_blank(mode, family, model_dir, trl_prepare):
    """TRL loses the first word, which is a token with that blank; we lose no character."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir(family))
    texts = ["Blue is one.", "e", "\nNo.", " two blanks"]
    rows = {"prompt": ["Q: Name a colour.\nA: "] * 4}
    if mode == "paired":
        rows |= {"chosen": texts, "rejected": ["Never."] * 4}
    else:
        rows |= {"completion": texts, "label": [True, False, True, False]}
    name = "chosen_ids" if mode == "paired" else "completion_ids"
    prepared = prepared_rows(Dataset.from_dict(rows), tokenizer, mode)
    prompt = tokenizer(rows["prompt"][0])["input_ids"]
    lost = 0
    trl = trl_prepare(family, mode == "paired")(Dataset.from_dict(rows))
    for row, theirs, text in zip(prepared, trl, texts, strict=True):
        assert row["prompt_ids"] == prompt
        whole = tokenizer.decode(row["prompt_ids"] + row[name], skip_special_tokens=True)
        assert whole == rows["prompt"][0] + text
        assert row[name][-1] == tokenizer.eos_token_id
        kept = tokenizer.decode(theirs["prompt_ids"] + theirs[name], skip_special_tokens=True)
        lost += kept != rows["prompt"][0] + text
    assert lost


THINKING = """{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{%- endfor %}{{ '<|im_end|>\\n' }}{%- endif %}
{%- for turn in messages %}
  {{- '<|im_start|>' + turn['role'] + '\\n' }}
  {%- if turn['role'] == 'assistant' and turn['reasoning_content'] and loop.last %}
    {{- '<think>\\n' + turn['reasoning_content'] + '\\n</think>\\n\\n' }}
  {%- endif %}
  {{- turn['content'] }}
  {%- for call in turn['tool_calls'] or [] %}
    {{- '<tool_call>\\n' + call['function'] | tojson + '\\n</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
  {%- if open_thinking %}{{- '<think>\\n' }}{%- endif %}
{%- endif %}"""
"""A template of Qwen's kind: tools, tool calls, and the reasoning of the last turn."""


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = tool("weather", city={"type": "string"})
CLOCK = tool("clock", zone={"type": "integer", "enum": [0, 1]})
ASKED = {"role": "user", "content": "How warm is it in Rome?"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [call("weather", city="Rome")]}
ANSWERED = {"role": "tool", "content": "21"}
TOOL_ROWS = [
    # The call itself is the completion; it has no text.
    {"messages": [ASKED, CALLED], "tools": [WEATHER]},
    {
        "messages": [
            ASKED,
            CALLED | {"reasoning_content": "Look it up."},
            ANSWERED,
            {"role": "assistant", "content": "21 °C.", "reasoning_content": "It says 21."},
        ],
        "tools": [WEATHER, CLOCK],
    },
    {
        "messages": [
            {"role": "user", "content": "What time is it?"},
            CALLED | {"reasoning_content": "A clock.", "tool_calls": [call("clock", zone=1)]},
        ],
        "tools": [CLOCK],
    },
    {"messages": [ASKED, {"role": "assistant", "content": "Warm."}], "tools": None},
]


@pytest.mark.parametrize("form", ["jsonl", "tools as JSON", "parquet"])
def test_tools_and_reasoning_are_rendered(form, model_dir, config, tmp_path):
    """Through the host's loading of a file; Parquet's columns of structs give the rows each other's
    members, as null."""
    rows = [row | {"label": n % 2 == 0} for n, row in enumerate(TOOL_ROWS)]
    if form == "tools as JSON":
        rows = [row | {"tools": json.dumps(row["tools"])} for row in rows]
    path = str(tmp_path / f"rows.{form}")
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_rows(Path(path), rows)
    entry = {
        "path": path,
        "type": "chat_template.default",
        "chat_template_jinja": THINKING,
    }
    cfg = config([entry], "smollm2", skip_prepare_dataset=True, sequence_len=2048)
    tokenizer = AutoTokenizer.from_pretrained(model_dir("smollm2"))
    prepared = prepared_rows(load_datasets(cfg).train_dataset, tokenizer, max_length=2048)
    assert len(prepared) == len(TOOL_ROWS)
    for row, source in zip(prepared, TOOL_ROWS, strict=True):
        given = {"tools": source["tools"], "chat_template": THINKING}
        turns = source["messages"]
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, **given)
        whole = tokenizer.apply_chat_template(turns, **given)["input_ids"]
        text = tokenizer.decode(whole)
        assert ("# Tools" in text) == bool(source["tools"])
        assert row["prompt_ids"] == prompt["input_ids"]
        trained = row["prompt_ids"] + row["completion_ids"]
        assert trained == whole[: len(trained)]
        assert tokenizer.decode(whole[len(trained) :]) == "\n"


def tool_pairs():
    """Pairs whose chosen response is the last turn of a conversation with tools."""
    wrong = {"role": "assistant", "content": "I do not know."}
    return [
        {
            "messages": row["messages"][:-1],
            "chosen": row["messages"][-1],
            "rejected": wrong | {"reasoning_content": "No idea."},
            "tools": row["tools"],
        }
        for row in TOOL_ROWS
    ]


def paired_entry(tmp_path, rows, form, **options):
    path = str(tmp_path / f"pairs.{form}")
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_rows(Path(path), rows)
    kept = ("role", "content", "reasoning_content", "tool_calls")
    return {
        "path": path,
        "type": "chat_template.default",
        "chat_template": "jinja",
        "chat_template_jinja": THINKING,
        "message_property_mappings": {name: name for name in kept},
    } | options


@pytest.mark.parametrize("kind", ["chat_template.default", "chat_template.argilla_chat"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_tools_of_pairs_are_rendered(form, kind, model_dir, config, tmp_path):
    rows = tool_pairs()
    if kind.endswith("argilla_chat"):
        for row in rows:
            turns = row.pop("messages")
            row |= {name: [*turns, row[name]] for name in ("chosen", "rejected")}
    entry = paired_entry(tmp_path, rows, form, type=kind)
    cfg = config(
        [entry], "smollm2", aot_mode="paired", skip_prepare_dataset=True, sequence_len=2048
    )
    tokenizer = AutoTokenizer.from_pretrained(model_dir("smollm2"))
    prepared = prepared_rows(load_datasets(cfg).train_dataset, tokenizer, "paired")
    assert len(prepared) == len(rows)
    for row, source in zip(prepared, rows, strict=True):
        given = {"tools": source["tools"], "chat_template": THINKING}
        for name in ("chosen", "rejected"):
            turns = (
                source[name] if "messages" not in source else [*source["messages"], source[name]]
            )
            ids = tokenizer.apply_chat_template(turns, **given)["input_ids"]
            trained = row["prompt_ids"] + row[f"{name}_ids"]
            assert trained == ids[: len(trained)]
            assert tokenizer.decode(ids[len(trained) :]) == "\n"
        assert ("# Tools" in tokenizer.decode(row["prompt_ids"])) == bool(source["tools"])


def test_tools_that_a_text_type_leaves_out(config, tmp_path, caplog):
    texts = [
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?", "tools": [CLOCK]} for _ in "ab"
    ]
    path = write_rows(tmp_path / "texts.jsonl", texts)
    entry = {"path": path, "type": "chatml.prompt_pairs"}
    cfg = config([entry], aot_mode="paired", skip_prepare_dataset=True)
    assert len(load_datasets(cfg).train_dataset) == 2
    assert "texts.jsonl: the column `tools` has no effect" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"field_tools": "functions"}, "row 0: there is no column `functions`"),
        ({"field_tools": "broken"}, "row 2: `broken`: '{' is not JSON"),
        ({"type": "chatml.ultra"}, r"datasets\[0\]\.chat_template` is not an option"),
    ],
)
def test_tools_of_pairs_that_are_wrong(options, message, config, tmp_path):
    rows = [row | {"broken": "{" if n == 2 else None} for n, row in enumerate(tool_pairs())]
    entry = paired_entry(tmp_path, rows, "jsonl", **options)
    with pytest.raises(ValueError, match=message):
        load_datasets(config([entry], aot_mode="paired", skip_prepare_dataset=True))


def test_a_reasoning_block_that_the_generation_prompt_has_opened(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir("smollm2"))
    resolved = {"strategy": "chat_template.default", "source": {"path": "rows"}}
    options = {"chat_template_jinja": THINKING}
    template = {"chat_template_kwargs": {"open_thinking": True}}
    transform = transform_for(template, resolved | {"options": options})
    reasoned = ANSWERED | {"role": "assistant", "reasoning_content": "It says 21."}
    row = transform({"messages": [[ASKED, reasoned]], "label": [True]}, tokenizer=tokenizer)
    assert row["prompt"][0].endswith("<|im_start|>assistant\n<think>\n")
    assert row["completion"] == ["It says 21.\n</think>\n\n21<|im_end|>"]
    # Without reasoning, or with a call, the block would stay open.
    for last in (reasoned | {"reasoning_content": None}, CALLED):
        with pytest.raises(ValueError, match="contradict each other"):
            transform({"messages": [[ASKED, last]], "label": [True]}, tokenizer=tokenizer)


ALIKE = [
    ("Yes.", "Yes."),
    ("Yes.", " Yes."),
    ("Yes.", "Yes. "),
    ("caf\u00e9", "cafe\u0301"),
    ("\u4e00", "\u4e01"),
    ("a <end>", "a<end>"),
    ("Yes.", "No."),
]


def bytewise(prefix=False, normalizer=None, end=None):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if normalizer is not None:
        backend.normalizer = normalizer
    if end is not None:
        backend.add_special_tokens([end])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def wordwise():
    backend = Tokenizer(models.WordLevel({"Yes": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize(
    "tokenizer",
    [
        bytewise(),
        bytewise(prefix=True),
        bytewise(normalizer=normalizers.NFC()),
        bytewise(normalizer=normalizers.Strip()),
        bytewise(end=AddedToken("<end>", lstrip=True)),
        wordwise(),
    ],
    ids=["bytes", "prefix", "NFC", "strip", "lstrip", "words"],
)
def test_texts_that_become_the_same_ids(tokenizer):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert same_ids(ALIKE, tokenizer) == [ids(a) == ids(b) for a, b in ALIKE]


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_become_the_same_ids_of_a_family(family, model_dir):
    test_texts_that_become_the_same_ids(AutoTokenizer.from_pretrained(model_dir(family)))


def test_rows_that_are_cut_are_counted():
    ids = {"prompt_ids": [[1, 2]] * 3, "chosen_ids": [[3], [3, 4], []]}
    rows = Dataset.from_dict(ids | {"rejected_ids": [[3, 4], [3], [3, 4, 5]]})
    assert [rows_cut(rows, "paired", limit) for limit in (3, 4, 5)] == [3, 1, 0]
    rows = rows.select([2, 0]).rename_column("chosen_ids", "completion_ids")
    assert [rows_cut(rows, "unpaired", limit) for limit in (1, 2, 3)] == [2, 1, 0]
