"""What is trained is what the chat template says: every built-in template of the host, in both
modes, against ``apply_chat_template`` itself.

A row becomes the template's ids, or it is dropped and counted, or refused by name. Nothing else.
"""

import itertools

import pytest
from axolotl.utils.chat_templates.base import _CHAT_TEMPLATES
from data_helpers import SMOLLM2
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from aot_plugin.data import resolve_datasets
from aot_plugin.data.strategy import transform_for
from aot_plugin.data.tokens import ids_columns

TEMPLATES = [name for name in _CHAT_TEMPLATES if not name.startswith("tokenizer_default")]
END = "<|im_end|>"
USER = {"role": "user", "content": "Name a colour."}
SYSTEM = {"role": "system", "content": "Be short."}
TURNS = [USER, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Another?"}]
ATTACKS = [
    *("e", "d", "m", "|", "assistant", "user", "[INST]", "Red.", "Name a colour.", "1", "42"),
    *(" Blue", "Blue ", "\n\nBlue.\n", END, f"a{END}", f"{END}\n<|im_start|>user\nHi", "</s>"),
    *("<think>\nWell.\n</think>\n\nBlue.", "<think>", "</think>", "<b>", "🟢", "Grün", "Qx7"),
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "A city."}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALL["id"] = "abcdefghi"


@pytest.fixture(scope="module")
def tokenizer():
    if not SMOLLM2.is_dir():
        pytest.skip("outputs/smollm2-135m-instruct is missing: see example_configs/quickstart")
    return AutoTokenizer.from_pretrained(SMOLLM2)


def trained(mode, template, row, tokenizer, **kwargs):
    """(prompt, completion) ids of what a row becomes: of a pair, of both; of an unpaired row, of
    its one response. A message if it is refused, nothing if it is dropped."""
    entry = {"path": "rows", "type": "chat_template.default", "chat_template": template}
    resolved = resolve_datasets({"datasets": [entry]}, mode)["aot_datasets"]
    transform = transform_for({"chat_template_kwargs": kwargs}, *resolved.values())
    try:
        made = transform({name: [value] for name, value in row.items()}, tokenizer=tokenizer)
    except ValueError as error:
        assert str(error).startswith("rows: ")
        return str(error)
    prompts, *completions = (made[name] for name in ids_columns(mode).values())
    return [(prompts[0], ids[0]) for ids in completions if prompts]


def rows(turns, completion, tools=None):
    """The conversation as an unpaired row, and as the two sides of a pair."""
    other = {"role": "assistant", "content": "Something else."}
    given = {"tools": tools} if tools else {}
    yield "unpaired", 0, {"messages": turns, "completion": completion, "label": True} | given
    yield "paired", 0, {"messages": turns, "chosen": completion, "rejected": other} | given
    yield "paired", 1, {"messages": turns, "chosen": other, "rejected": completion} | given


def as_json(turns):
    """The turns with the arguments of the one call as JSON."""
    inner = CALL["function"] | {"arguments": '{"city": "Rome"}'}
    text = [CALL | {"function": inner}]
    return [turn | {"tool_calls": text} if "tool_calls" in turn else turn for turn in turns]


def rendering(tokenizer, template, turns, completion, tools, **kwargs):
    """Ids of the prompt as it is served, and texts of prompt and whole conversation; None if the
    template refuses them."""
    given = {"chat_template": _CHAT_TEMPLATES[template], **kwargs}
    if tools:
        given["tools"] = tools
    try:
        if any(isinstance(turn.get("tool_calls"), list) for turn in [*turns, completion]):
            try:
                tokenizer.apply_chat_template([*turns, completion], tokenize=False, **given)
            except TypeError:  # a template that takes arguments as JSON only
                turns, completion = as_json(turns), as_json([completion])[0]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **given)
        texts = [
            tokenizer.apply_chat_template(
                turns + more, add_generation_prompt=not more, tokenize=False, **given
            )
            for more in ([], [completion])
        ]
    except (TemplateError, TypeError):
        return None
    return prompt["input_ids"], *texts


def check(tokenizer, template, turns, completion, tools=None, **kwargs):
    """One conversation in both modes. Returns what became of it, the same in each."""
    expected = rendering(tokenizer, template, turns, completion, tools, **kwargs)
    outcomes = set()
    for mode, side, row in rows(turns, completion, tools):
        found = trained(mode, template, row, tokenizer, **kwargs)
        if isinstance(found, str) or not found:
            outcomes.add("refused" if found else "dropped")
            assert found or not (completion["content"].strip() or completion.get("tool_calls"))
            continue
        assert expected is not None, "the template refuses the turns"
        served, prompt, whole = expected
        prompt_ids, completion_ids = found[side]
        assert prompt_ids == served
        answer = tokenizer.decode(completion_ids)
        trained_text = tokenizer.decode(prompt_ids) + answer
        # What ends a turn is the tokenizer's own end or, if the template has none, appended.
        assert completion_ids[-1] == tokenizer.eos_token_id
        if whole.startswith(prompt):
            ended = whole if whole.rstrip().endswith(END) else whole + END
            assert trained_text == ended.rstrip()
            if tokenizer(whole)["input_ids"][: len(served)] == served:
                assert prompt_ids + completion_ids == tokenizer(ended.rstrip())["input_ids"]
            outcomes.add("template")
        else:
            assert whole.rstrip().removesuffix(END).endswith(answer.removesuffix(END).rstrip())
            outcomes.add("answer")
    assert len(outcomes) == 1
    return outcomes.pop()


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template(template, tokenizer):
    answer = {"role": "assistant", "content": "Blue."}
    for system, turns in itertools.product([[], [SYSTEM]], [[USER], TURNS]):
        outcome = check(tokenizer, template, system + turns, answer)
        if rendering(tokenizer, template, system + turns, answer, None) is not None:
            assert outcome != "refused"
    for content in ATTACKS:
        outcome = check(tokenizer, template, [USER], answer | {"content": content})
        assert content.strip(f"{END}<think>/ \n") == "" or outcome != "refused", content
    for content in ("", " \n"):
        assert check(tokenizer, template, [USER], answer | {"content": content}) == "dropped"
    for asked in ATTACKS:
        check(tokenizer, template, [SYSTEM, USER | {"content": asked}], answer)


@pytest.mark.parametrize("template", TEMPLATES)
def test_reasoning_and_tools(template, tokenizer):
    answer = {"role": "assistant", "content": "Blue."}
    reasoned = answer | {"reasoning_content": "What is blue?"}
    rendered = rendering(tokenizer, template, [USER], reasoned, None)[2]
    outcome = check(tokenizer, template, [USER], reasoned)
    if "What is blue?" in rendered:
        assert outcome != "refused"
        for mode, side, row in rows([USER], reasoned):
            prompt, completion = trained(mode, template, row, tokenizer)[side]
            text = tokenizer.decode(prompt + completion)
            assert text.count("<think>") == text.count("</think>") == 1
            assert "What is blue?\n</think>" in tokenizer.decode(completion)
    check(tokenizer, template, [USER], answer, TOOLS)
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "21", "tool_call_id": "abcdefghi", "name": "weather"}
    for turns, last in (([USER], called), ([USER, called, result], answer)):
        outcome = check(tokenizer, template, turns, last, TOOLS)
        written = rows(as_json(turns), as_json([last])[0], TOOLS)
        for one, other in zip(rows(turns, last, TOOLS), written, strict=True):
            # OpenAI's form, arguments as JSON, is the same row.
            assert trained(one[0], template, one[2], tokenizer) == trained(
                one[0], template, other[2], tokenizer
            )
        expected = rendering(tokenizer, template, turns, last, TOOLS)
        assert (outcome == "refused") == (expected is None or "Rome" not in expected[2])


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5"])
def test_the_template_s_own_keys_in_both_modes(template, tokenizer):
    answer = {"role": "assistant", "content": "Blue."}
    reasoned = answer | {"reasoning_content": "What is blue?"}
    inside = answer | {"content": "<think>\nWhat is blue?\n</think>\n\nBlue."}
    closed, opened = "<think>\n\n</think>\n\n", "<think>\n\n"
    for mode, side, row in rows([USER], answer):
        prompt, completion = trained(mode, template, row, tokenizer, enable_thinking=False)[side]
        assert tokenizer.decode(prompt).endswith(f"assistant\n{closed}")
        assert tokenizer.decode(completion) == f"Blue.{END}"
        prompt, completion = trained(mode, template, row, tokenizer)[side]
        assert tokenizer.decode(prompt).endswith(f"assistant\n{opened}")
        assert tokenizer.decode(completion) == f"</think>\n\nBlue.{END}"
    for last in (reasoned, inside):
        for mode, side, row in rows([USER], last):
            prompt, completion = trained(mode, template, row, tokenizer)[side]
            assert tokenizer.decode(prompt).endswith(f"assistant\n{opened}")
            assert tokenizer.decode(completion) == f"What is blue?\n</think>\n\nBlue.{END}"
            # Served without thinking, there is no place for it.
            refused = trained(mode, template, row, tokenizer, enable_thinking=False)
            assert "contradict each other" in refused


@pytest.mark.parametrize("template", ["mistral_v2v3", "mistral_v3_tekken", "pixtral"])
def test_a_system_turn_that_moves_once_it_is_answered(template, tokenizer):
    """The prompt is served with it; the answer begins as it does without."""
    answer = {"role": "assistant", "content": "Blue."}
    blank = " " if template == "mistral_v2v3" else ""
    for turns in ([SYSTEM, USER], [SYSTEM, *TURNS], [USER]):
        for mode, side, row in rows(turns, answer):
            prompt, completion = trained(mode, template, row, tokenizer)[side]
            assert ("Be short." in tokenizer.decode(prompt)) == (SYSTEM in turns)
            assert tokenizer.decode(completion) == f"{blank}Blue.{END}"
