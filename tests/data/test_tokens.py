"""The tokens that are trained on are those that the tokenizer's own chat template renders."""

import pytest
from data_helpers import FAMILIES
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer

from aot_plugin.data import prepare_tokens, resolve_unpaired_datasets
from aot_plugin.data.strategy import FEATURES, transform_for

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
    return Dataset.from_dict(transform(batch, tokenizer=tokenizer), features=FEATURES)


def never(dataset):
    raise AssertionError("TRL is not to tokenize rows of our strategies")


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_templates(family, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir(family))
    prepared = prepare_tokens(prepare(CONVERSATIONS, tokenizer), never, max_length=256)
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
    (row,) = prepare_tokens(prepare([turns], tokenizer), never, max_length=None)
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
    template = (
        "{% for turn in messages %}<|im_start|>{{ turn['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|><think>{% endif %}"
    )
    options = {"chat_template": "jinja", "chat_template_jinja": template}
    (row,) = prepare(CONVERSATIONS[:1], tokenizer, **options)
    assert row["prompt"].endswith("<|im_end|><|im_start|><think>")
    assert row["completion"] == "Blue.<|im_end|>"


def test_prompts_that_fill_the_length_are_dropped(tokenizer):
    dataset = prepare(CONVERSATIONS, tokenizer)
    lengths = [len(ids) for ids in dataset["template_prompt_ids"]]
    prepared = prepare_tokens(dataset, never, max_length=max(lengths))
    assert len(prepared) == sum(length < max(lengths) for length in lengths) < len(dataset)


@pytest.mark.parametrize("family", ["mistral", "chatml"])
def test_mixed_with_rows_of_the_hosts_strategies(family, model_dir, trl_prepare):
    """TRL tokenizes those rows, with its second begin-of-sequence token, and none of ours."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir(family))
    ours = prepare(CONVERSATIONS, tokenizer)
    host = ours.select_columns(["prompt", "completion", "label"])
    mixed = prepare_tokens(concatenate_datasets([host, ours]), trl_prepare(family), max_length=256)
    alone = prepare_tokens(ours, never, max_length=256)
    of_host, of_ours = mixed.select(range(4)), mixed.select(range(4, 8))
    for name in ("prompt_ids", "completion_ids", "label"):
        assert of_ours[name] == alone[name]
    assert of_host["prompt_ids"] == [[tokenizer.bos_token_id, *ids] for ids in alone["prompt_ids"]]
    assert of_host["completion_ids"] == alone["completion_ids"]
