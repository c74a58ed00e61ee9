"""Renders turns as the two strings that the model is trained on, prompt and completion.

This is the only renderer: for both modes, for training and for the report.

The prompt is what the model sees at inference: the template's rendering of the turns, with its
generation prompt. The completion is what the template appends to it for the answer. Rendered text
is never searched for the template's own text, since an answer may contain the same. Where the two
renderings differ, the position of a turn is found by rendering other contents in its place.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from axolotl.utils.chat_templates import extract_chat_template_args, get_chat_template
from jinja2.exceptions import TemplateError

from .options import ConversationOptions
from .rows import Example, RowError, Turn
from .tokens import special_tokens

Tools = list[dict[str, Any]] | None
PROBES = ("Qx7", "Jz4")
"""Contents that no template splits, with different beginnings and ends."""
CALLS, REASONING = "tool_calls", "reasoning_content"
THOUGHT = "</think>"
THOUGHTS = (REASONING, "reasoning", "thinking", "thought", "function_call")
"""Properties of an answer that hold a part of it besides the content."""
LEAVES_OUT = "the chat template leaves out {}"
ANOTHER_PROMPT = (
    "the conversations in the responses are trained, and not the row's own prompt, which differs,"
)
REPEATED_PROMPT = "the answer begins with the text of its prompt, which is trained with it,"
FORMATTED = (
    "the text has tokens that the chat template writes itself (is it formatted already? then they "
    "are there twice)"
)
SERIALIZED = "the text looks like a list of turns stored as text, which is not read as turns,"
TURNS_IN_TEXT = re.compile(r"""\s*\[?\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
LEAD = 20
"""A prompt of at least so many characters that an answer begins with, after at most as many others,
is no coincidence."""
Shape = tuple[bool, ...]
TAG = re.compile(r"<[^<>\s][^<>]*>|\[[^\[\]\s][^\[\]]*\]")


class Renderer:
    """Renders examples with the chat template of the entry or, if it names none, of the config.

    Args:
        cfg: the chat-template keys of the config.
        options: the entry's options.
        tokenizer: its chat template is used if neither names another.

    Attributes:
        unrendered: number of answers of which a part is not rendered, or whose text is probably
            not meant to be trained as it is, by log message.
    """

    def __init__(
        self, cfg: Mapping[str, Any], options: ConversationOptions, tokenizer: Any
    ) -> None:
        self._tokenizer = tokenizer
        self._kwargs = cfg.get("chat_template_kwargs") or {}
        self._choice = extract_chat_template_args(cfg=cfg, ds_cfg=options.model_dump())
        self._special = tuple(special_tokens(tokenizer).values())
        self._last: tuple[tuple[list[Turn], Tools], str] | None = None
        self._ends: dict[Shape, str] = {}
        self._shows_content: dict[Shape, bool] = {}
        self.unrendered: Counter[str] = Counter()

    @cached_property
    def template(self) -> str:
        """The source text of the chat template."""
        choice, jinja = self._choice
        return get_chat_template(choice, jinja_template=jinja, tokenizer=self._tokenizer)

    @cached_property
    def _written(self) -> list[str]:
        """The special tokens that the template writes."""
        ends = (self._tokenizer.bos_token, self._tokenizer.eos_token)
        return [token for token in self._special if token in ends or token in self.template]

    def __call__(self, example: Example) -> tuple[str, str]:
        """Renders an example as (prompt, completion), together the template's conversation.

        The completion ends with the template's own end of turn. Text after the special token that
        ends the turn (a line break, the header of a next turn) is left out, since no model
        generates it.

        Two templates in three begin a finished answer exactly with their generation prompt. With
        the others the prompt is still what the model sees at inference, and the completion is

        - what follows the common beginning, if the rest of the prompt is white space only (qwen3:
          ``<think>\\n\\n`` before an answer, ``<think>\\n`` before reasoning);
        - the answer, if the generation prompt ends with an empty block that it closes itself
          (gemma4);
        - what follows the last turn of the prompt, if the template formats the turns before it
          differently once they are answered (mistral_v2v3 with a system turn).

        Raises:
            RowError: if the template rejects the turns or does not render them, or if its
                generation prompt and its finished answer contradict each other.
        """
        prompt = self.prompt(example.prompt, example.tools)
        whole = self._apply([*example.prompt, example.completion], example.tools)
        self._check_properties(example, whole)
        completion = _added(prompt, whole)
        if completion is None:
            completion = self._compared(example, prompt, whole)
        completion = self._ended(example, completion)
        if not completion.strip():
            raise RowError("the chat template renders nothing of the answer")
        if THOUGHT in example.completion["content"] and THOUGHT not in completion:
            self.unrendered[LEAVES_OUT.format("reasoning inside the content")] += 1
        if example.ignored_prompt:
            self.unrendered[ANOTHER_PROMPT] += 1
        self._note_text(example)
        return prompt, completion

    def _note_text(self, example: Example) -> None:
        """Counts text that is trained as it is, and was hardly meant to be."""
        asked, answer = example.prompt[-1]["content"].strip(), example.completion["content"]
        if len(asked) >= LEAD and asked in answer[: len(asked) + LEAD]:
            self.unrendered[REPEATED_PROMPT] += 1
        texts = [turn["content"] for turn in (*example.prompt, example.completion)]
        if any(token in text for text in texts for token in self._written):
            self.unrendered[FORMATTED] += 1
        if any(map(TURNS_IN_TEXT.match, texts)):
            self.unrendered[SERIALIZED] += 1

    def prompt(self, turns: list[Turn], tools: Tools = None) -> str:
        """Renders the prompt, including the generation prompt.

        Raises:
            RowError: if the template rejects the turns.
        """
        # The responses of one row are rendered one after another and share their prompt.
        if self._last is None or self._last[0] != (turns, tools):
            self._last = (turns, tools), self._apply(turns, tools, add_generation_prompt=True)
        return self._last[1]

    def _apply(self, turns: list[Turn], tools: Tools, **kwargs: Any) -> str:
        # Without tools the argument is left out: `chat_template_kwargs` may contain some.
        given = {"tools": tools} if tools else {}

        def apply(turns: list[Turn]) -> str:
            return self._tokenizer.apply_chat_template(
                turns,
                chat_template=self.template,
                tokenize=False,
                **{**self._kwargs, **given, **kwargs},
            )

        try:
            try:
                return apply(turns)
            except TypeError:
                # A few templates accept the arguments of a tool call only as JSON text.
                return apply([_with_json_arguments(turn) for turn in turns])
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise RowError(f"the chat template refuses the turns ({roles}): {error}") from error

    def _compared(self, example: Example, prompt: str, whole: str) -> str:
        """The completion, if the prompt is not a prefix of the whole conversation."""
        header = _common_prefix(*self._probed(example))
        if example.completion.get(CALLS):  # these may come before the content
            plain = {"role": example.completion["role"], "content": PROBES[0]}
            header = _common_prefix(header, self._apply([*example.prompt, plain], example.tools))
        answered = len(header) if whole.startswith(header) else None
        completion = _closed(prompt, whole, answered)
        if completion is not None:
            return completion
        # Compare what follows the content of the prompt's last turn, in both renderings.
        *before, last = example.prompt
        prompts, wholes = zip(
            *(
                (
                    self._apply(turns, example.tools, add_generation_prompt=True),
                    self._apply([*turns, example.completion], example.tools),
                )
                for turns in ([*before, _with(last, probe)] for probe in PROBES)
            ),
            strict=True,
        )
        asked, replied = _common_suffix(*prompts), _common_suffix(*wholes)
        if prompt.endswith(asked) and whole.endswith(replied):
            start = len(whole) - len(replied)
            completion = _added(asked, replied)
            if completion is None and answered is not None and answered >= start:
                completion = _closed(asked, replied, answered - start)
            if completion is not None:
                return completion
        same = len(_common_prefix(prompt, whole))
        raise RowError(
            "the chat template's generation prompt and its finished answer contradict each other: "
            f"{prompt[same:][:60]!r} against {whole[same:][:60]!r}. A row with reasoning needs a "
            "generation prompt that leaves the reasoning to the model, a row without it one that "
            "opens no block: see `chat_template_kwargs` (for instance `enable_thinking`) and "
            "`chat_template`"
        )

    def _check_properties(self, example: Example, whole: str) -> None:
        turns = [*example.prompt, example.completion]
        if any(turn.get(CALLS) for turn in turns):
            for number, turn in enumerate(turns):
                if not turn.get(CALLS):
                    continue
                silent = {key: value for key, value in turn.items() if key != CALLS}
                if self._renders_same(turns, number, silent, example.tools, whole):
                    raise RowError(
                        f"the chat template does not render `{CALLS}`, which turn {number} of "
                        f"{len(turns)} has; choose one that does (`chat_template`)"
                    )
        if not self._content_is_rendered(example):
            if not example.completion.get(CALLS):
                raise RowError("the chat template does not render the content of the answer")
            if example.completion["content"].strip():
                self.unrendered[LEAVES_OUT.format(f"content beside `{CALLS}`")] += 1
        for name in THOUGHTS:
            if example.completion.get(name):
                silent = {k: v for k, v in example.completion.items() if k != name}
                if self._renders_same(turns, len(turns) - 1, silent, example.tools, whole):
                    self.unrendered[LEAVES_OUT.format(f"`{name}`")] += 1

    def _renders_same(
        self, turns: Sequence[Turn], number: int, other: Turn, tools: Tools, whole: str
    ) -> bool:
        changed = [*turns[:number], other, *turns[number + 1 :]]
        try:
            return self._apply(changed, tools) == whole
        except RowError:
            return False

    def _content_is_rendered(self, example: Example) -> bool:
        shape = _shape(example)
        if shape not in self._shows_content:
            first, second = self._probed(example)
            self._shows_content[shape] = first != second
        return self._shows_content[shape]

    def _probed(self, example: Example) -> list[str]:
        """The conversation rendered with each of the probes as the content of the answer."""
        return [
            self._apply([*example.prompt, _with(example.completion, probe)], example.tools)
            for probe in PROBES
        ]

    def _ended(self, example: Example, completion: str) -> str:
        """The completion up to the token that ends the turn."""
        eos = self._tokenizer.eos_token
        stripped = completion.rstrip()
        if eos and stripped.endswith(eos) and completion.count(eos) == 1:
            return stripped
        end = self._end(example, completion)
        body = completion[: len(completion) - len(end)]
        if eos and eos in end:
            return body + end[: end.index(eos) + len(eos)]
        stripped = end.rstrip()
        return body + (stripped if stripped.endswith(self._special) else end)

    def _end(self, example: Example, completion: str) -> str:
        """What the template writes after the content of the answer."""
        shape = _shape(example)
        known = self._ends.get(shape)
        if known is None or not completion.endswith(known):
            known = self._ends[shape] = _common_suffix(*self._probed(example))
        return known if completion.endswith(known) else ""


def _shape(example: Example) -> Shape:
    """What decides how a template formats the answer, besides its content."""
    answer = example.completion
    return bool(example.tools), bool(answer.get(CALLS)), bool(answer.get(REASONING))


def _with(turn: Turn, content: str) -> Turn:
    return {**turn, "content": content}


def _with_json_arguments(turn: Turn) -> Turn:
    if not turn.get(CALLS):
        return turn
    calls = []
    for call in turn[CALLS]:
        inner = dict(call.get("function", call))
        if isinstance(inner.get("arguments"), Mapping):
            inner["arguments"] = json.dumps(inner["arguments"], ensure_ascii=False)
        calls.append({**call, "function": inner} if "function" in call else inner)
    return {**turn, CALLS: calls}


def _common_prefix(one: str, other: str) -> str:
    length = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return min(one, other, key=len) if length is None else one[:length]


def _common_suffix(one: str, other: str) -> str:
    return _common_prefix(one[::-1], other[::-1])[::-1]


def _added(prompt: str, whole: str) -> str | None:
    """What a rendering appends to the prompt; None if it does not begin with the prompt.

    White space at the end of the prompt may differ.
    """
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    same = len(_common_prefix(prompt, whole))
    return None if prompt[same:].strip() else whole[same:]


def _closed(prompt: str, whole: str, answered: int | None) -> str | None:
    """The answer, if the prompt ends with a block that it closes itself; otherwise None.

    Args:
        prompt: the prompt.
        whole: the whole conversation.
        answered: where the answer begins in ``whole``, and the block in ``prompt``; None if not
            known. A block that is left open has an odd number of tags.
    """
    if answered is None or prompt[:answered] != whole[:answered]:
        return None
    tags = TAG.findall(prompt[answered:])
    return whole[answered:] if tags and len(tags) % 2 == 0 else None
