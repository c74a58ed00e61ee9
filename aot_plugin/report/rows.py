"""Reads evaluation rows from a JSON Lines file, with the token ids that training gives them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..data.accounting import FAULTS
from ..data.images import COLUMNS
from ..data.labels import Drop, parse_label
from ..data.options import ConversationOptions
from ..data.render import Renderer
from ..data.rows import examples
from ..data.tokens import COMPLETIONS, token_ids
from .scores import Mode

OPTIONS = ConversationOptions()

_SHAPES = (
    "a row is {prompt|messages, chosen, rejected}, {prompt|messages, completion, label} or "
    "{messages, label} with the answer for a last turn; conversations as responses need no prompt"
)

Row = Mapping[str, Any]


class Sequence(NamedTuple):
    """Token ids of a prompt and of one completion."""

    prompt: list[int]
    completion: list[int]


def read_rows(path: str | os.PathLike[str]) -> tuple[Mode, list[Row]]:
    """Reads a JSON Lines file.

    Returns:
        The mode, the same for all rows, and the rows.

    Raises:
        ValueError: if a line can't be used; names file, line and what is missing.
    """
    rows: list[Row] = []
    modes: set[Mode] = set()
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not an object; {_SHAPES}")
        if any(row.get(name) for name in COLUMNS):
            raise ValueError(
                f"{path}, line {number}: rows with images can't be scored here; compare the runs' "
                "own evaluations"
            )
        mode = _mode_of(row)
        if mode is None:
            raise ValueError(f"{path}, line {number}: found keys {sorted(row)}; {_SHAPES}")
        modes.add(mode)
        if len(modes) > 1:
            raise ValueError(f"{path}, line {number}: paired and unpaired rows in one file")
        try:
            rows.append(row if mode == "paired" else _labelled(row))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    return modes.pop(), rows


def _mode_of(row: Row) -> Mode | None:
    if {"chosen", "rejected"} <= row.keys():
        return "paired"
    answered = "completion" in row or "messages" in row
    return "unpaired" if answered and "label" in row else None


def _labelled(row: Row) -> Row:
    """The row with its label as a bool. All forms of labels that training accepts are accepted.

    Raises:
        ValueError: if the row has no label.
    """
    label = parse_label(row["label"])
    if isinstance(label, Drop):
        raise ValueError(f"`label`: {row['label']!r} is no label")
    return {**row, "label": label}


def sequences_of(
    row: Row,
    mode: Mode,
    render: Renderer | None,
    tokenizer: Any,
    options: ConversationOptions = OPTIONS,
) -> list[Sequence]:
    """The sequences of a row, chosen before rejected, with the token ids that training gives them.

    Args:
        row: a row from ``read_rows``.
        mode: its mode.
        render: the run's renderer. None uses prompt and completion as plain text, with the
            tokenizer's begin-of-sequence and end-of-sequence tokens.
        tokenizer: the run's tokenizer.
        options: options of the run's entry that concern turns.

    Raises:
        ValueError: if the row can't be read or rendered.
    """
    fields: tuple[str, ...] = COMPLETIONS[mode]
    if render is None:
        values: list[Any] = [row.get("prompt"), *(row.get(field) for field in fields)]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"plain rows need strings for prompt and {' and '.join(fields)}")
        texts = [(values[0], completion) for completion in values[1:]]
        empty = next((f for f, (_, text) in zip(fields, texts, strict=True) if not text), None)
        if empty:
            raise ValueError(f"empty {empty}")
    else:
        prompted = mode == "paired" or "completion" in row
        if not prompted:  # a whole conversation, whose last turn is the answer
            fields = ("messages",)
        responses = [(row[field], field, True) for field in fields]
        texts = []
        for field, found in zip(fields, examples(row, responses, options, prompted), strict=True):
            if isinstance(found, Drop):
                raise ValueError(f"`{field}`: {FAULTS.get(found, found.value)}")
            texts.append(render(found))
    ids = token_ids(
        [prompt for prompt, _ in texts], [[text] for _, text in texts], tokenizer, render is None
    )
    if not all(prompt for prompt, _ in ids):
        raise ValueError("empty prompt: the first token of a completion needs one before it")
    return [Sequence(prompt, completion) for prompt, completion in ids]
