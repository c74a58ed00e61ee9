"""Conversation trees stored as one message per row (OpenAssistant/oasst1)."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from .options import ThreadsOptions

Messages = Mapping[Any, Mapping[str, Any]]


def threads(dataset: Dataset, options: ThreadsOptions) -> Dataset:
    """Builds one row per message that the assistant has answered.

    The row holds the conversation up to the message, the answers to it with their ranks and, with
    ``field_weight``, the message's weight under that name. The columns that the options name are
    held in memory.

    Args:
        dataset: messages, in any order.
        options: the entry's options.

    Returns:
        Rows of ``prompt`` (turns; None if a message above is missing) and ``replies`` (a list of
        ``text`` and ``rank``), in the order of the first answer.

    Raises:
        ValueError: if a column is missing, two messages have the same id, or a message is its own
            ancestor.
    """
    columns = {
        "id": options.field_id,
        "parent": options.field_parent,
        "text": options.field_text,
        "role": options.field_role,
        "rank": options.field_rank,
        **({"weight": options.field_weight} if options.field_weight else {}),
    }
    for option, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"there is no column `{column}` (`field_{option}`); the rows have "
                f"{', '.join(dataset.column_names)}"
            )
    messages: dict[Any, dict[str, Any]] = {}
    for batch in dataset.select_columns(list(columns.values())).iter(1000):
        for cells in zip(*(batch[column] for column in columns.values()), strict=True):
            message = dict(zip(columns, cells, strict=True))
            if message["id"] in messages:
                raise ValueError(f"two messages have the `{options.field_id}` {message['id']!r}")
            messages[message["id"]] = message
    answers: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for message in messages.values():
        if message["role"] in options.roles["assistant"] and message["parent"] is not None:
            answers[message["parent"]].append({key: message[key] for key in ("text", "rank")})
    rows = {
        "prompt": [_conversation(key, messages) for key in answers],
        "replies": list(answers.values()),
    }
    if options.field_weight:
        rows[options.field_weight] = [messages.get(key, {}).get("weight", 0) for key in answers]
    return Dataset.from_dict(rows)


def _conversation(key: Any, messages: Messages) -> list[dict[str, Any]] | None:
    """The turns from the root of the tree down to a message; None if one of them is missing."""
    path: dict[Any, dict[str, Any]] = {}
    while key is not None:
        if key in path:
            raise ValueError(f"the message {key!r} is above itself")
        if key not in messages:
            return None
        message = messages[key]
        path[key] = {"role": message["role"], "content": message["text"]}
        key = message["parent"]
    return list(path.values())[::-1]
