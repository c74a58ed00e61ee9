"""What the host's types without a chat template can't represent in a row.

Such a type formats some columns as text: perhaps only two turns of a conversation, a list in Python
notation, or null as the word None. None of that fails. So the type itself is probed, to see which
columns it reads and what becomes of a row whose turns have marks as contents.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from .json_columns import may_hold_lists

Strategy = Callable[[dict[str, Any]], Mapping[str, Any]]
CALLS = "tool_calls"


def first_unrepresented(
    dataset: Dataset, strategy: Strategy, texts: Sequence[str]
) -> tuple[int, str] | None:
    """Finds the first row of which a type loses a part.

    Args:
        dataset: the rows.
        strategy: the type's function, from a row to its texts.
        texts: the names of the texts, the prompt's first.

    Returns:
        The row's number and what is lost; None if nothing is.
    """
    if not len(dataset):
        return None
    columns = columns_read(dataset[0], strategy)
    for name in columns:
        if dataset.data.column(name).null_count:
            number = next(n for n, value in enumerate(dataset[name]) if value is None)
            if _null_shows(dataset[number], name, strategy, texts):
                return number, f'`{name}` is null; remove the row, or write an empty text as ""'
    nested = [name for name in columns if may_hold_lists(dataset.data.column(name).type)]
    if not nested:
        return None
    known: dict[tuple[Any, ...], str | None] = {}
    for number, row in enumerate(dataset):
        for name in nested:
            if type(row[name]) in (str, int, float):
                continue  # in a column of several types
            shape = (name, _shape(row[name]))
            if shape not in known:
                known[shape] = _lost(row, name, strategy, texts)
            problem = known[shape] or _other_prompt(row, name, strategy, texts)
            if problem is not None:
                return number, problem
    return None


def columns_read(row: dict[str, Any], strategy: Strategy) -> list[str]:
    """The columns that a strategy reads; none if it fails, which is reported elsewhere."""
    read: list[str] = []

    class Watched(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            read.append(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            read.append(key)
            return super().get(key, default)

    try:
        strategy(Watched(row))
    except Exception:
        return []
    return [name for name in dict.fromkeys(read) if name in row]


def _null_shows(row: dict[str, Any], name: str, strategy: Strategy, texts: Sequence[str]) -> bool:
    absent, empty = (_made(row | {name: value}, strategy, texts) for value in (None, ""))
    return absent is not None and absent != empty


def _shape(value: Any) -> Any:
    """What decides whether a type can represent a value: roles and presence of tool calls."""
    if not isinstance(value, list):
        return type(value).__name__
    return tuple(
        (turn.get("role"), bool(turn.get(CALLS))) if isinstance(turn, Mapping) else None
        for turn in value
    )


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in value)
    )


def _lost(row: dict[str, Any], name: str, strategy: Strategy, texts: Sequence[str]) -> str | None:
    value = row[name]
    made = _made(row, strategy, texts)
    if made is None:
        return None  # the host reports why
    if str(value) in "".join(made):
        return f"`{name}` holds {'turns' if _is_conversation(value) else type(value).__name__}"
    if not _is_conversation(value):
        return None
    if any(turn.get(CALLS) for turn in value):
        return f"`{name}` holds `{CALLS}`"
    marks = [f"@{name} {number}@" for number in range(len(value))]
    marked = [{**turn, "content": mark} for turn, mark in zip(value, marks, strict=True)]
    made = _made(row | {name: marked}, strategy, texts)
    if made is None:
        return None
    prompt, answers = made[0], "".join(made[1:])
    # The first of two turns is the prompt, which may also be in another column.
    complete = len(value) <= 2 or all(mark in prompt for mark in marks[:-1])
    if not complete or marks[-1] not in answers:
        roles = ", ".join(str(turn["role"]) for turn in value)
        return f"`{name}` holds {len(value)} turns ({roles})"
    return None


def _other_prompt(
    row: dict[str, Any], name: str, strategy: Strategy, texts: Sequence[str]
) -> str | None:
    """The problem of a conversation whose earlier turns are not in the row's prompt, if so."""
    value = row[name]
    made = _made(row, strategy, texts) if _is_conversation(value) else None
    if made is None or all(str(turn["content"]) in made[0] for turn in value[:-1]):
        return None
    return f"`{name}` answers another prompt than the row's"


def _made(row: dict[str, Any], strategy: Strategy, texts: Sequence[str]) -> list[str] | None:
    """The texts of a row; None if the type fails."""
    try:
        found = {**row, **strategy(dict(row))}
        return [str(found[name]) for name in texts]
    except Exception:
        return None
