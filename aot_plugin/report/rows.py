"""Evaluation rows from a JSON Lines file, rendered to token ids by a tokenizer's chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .scores import Mode

_FIELDS: dict[Mode, tuple[str, str]] = {
    "paired": ("chosen", "rejected"),
    "unpaired": ("completion", "label"),
}
_SHAPES = (
    "a row is {prompt|messages, chosen, rejected} or {prompt|messages, completion, label} "
    "with a label of true or false"
)

Row = Mapping[str, Any]


class Sequence(NamedTuple):
    """One completion after its prompt, as token ids."""

    prompt: list[int]
    completion: list[int]


def read_rows(path: str | os.PathLike[str]) -> tuple[Mode, list[Row]]:
    """The rows of a JSON Lines file and their kind, the same for all.

    Raises ValueError naming file, line and what is missing.
    """
    rows: list[Row] = []
    modes: set[Mode] = set()
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not an object; {_SHAPES}")
        mode = _mode_of(row)
        if mode is None:
            raise ValueError(f"{path}, line {number}: found keys {sorted(row)}; {_SHAPES}")
        modes.add(mode)
        if len(modes) > 1:
            raise ValueError(f"{path}, line {number}: paired and unpaired rows in one file")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")
    return modes.pop(), rows


def _mode_of(row: Row) -> Mode | None:
    if ("prompt" in row) == ("messages" in row):
        return None
    for mode, fields in _FIELDS.items():
        if all(field in row for field in fields):
            return None if mode == "unpaired" and not isinstance(row["label"], bool) else mode
    return None


def render(tokenizer: Any, row: Row, field: str, plain: bool = False) -> Sequence:
    """Token ids of the row's prompt and of the completion `row[field]`.

    The prompt is a list of messages, or a string that becomes a user message; the completion is a
    string, one message, or a list of messages. Both are rendered by the tokenizer's chat template;
    what follows the rendered prompt (with its generation prompt) is the completion, end-of-turn
    token included, white space at its end not (a template's newline between turns is nothing that
    a model answers, and the host's strategies drop it as well). With plain=True both must be
    strings and are taken as they are, the completion followed by the end-of-text token.

    Raises ValueError if the template is missing or doesn't extend the prompt, or for an empty
    completion.
    """
    prompt = row["messages"] if "messages" in row else row["prompt"]
    if plain:
        if not isinstance(prompt, str) or not isinstance(row[field], str):
            raise ValueError(f"plain rows need strings for prompt and {field}")
        before, after = prompt, row[field] + (tokenizer.eos_token or "")
    else:
        before, after = _by_chat_template(tokenizer, prompt, row[field])
    sequence = Sequence(*(_token_ids(tokenizer, text) for text in (before, after)))
    if not sequence.completion:
        raise ValueError(f"empty {field}")
    if not sequence.prompt:
        raise ValueError("empty prompt: the first token of a completion needs one before it")
    return sequence


def _by_chat_template(tokenizer: Any, prompt: Any, completion: Any) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use --plain for rows of plain text")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    elif isinstance(completion, dict):
        completion = [completion]
    before = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*messages, *completion], tokenize=False)
    if not whole.startswith(before):
        raise ValueError(
            "the chat template renders the prompt differently when a completion follows, so the "
            f"completion can't be told apart:\n{before!r}\n{whole!r}"
        )
    return before, whole[len(before) :].rstrip()


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
