"""Columns of JSON files that hold values of several types, and what ``datasets`` makes of them.

It reads a file in chunks of 10 MiB. If the values of a column in the first chunk have several types
(text and lists of turns, say), it stores the JSON of each value, as Arrow's type "arrow.json", and
decodes it when a row is read. If they first differ in a later chunk, or in another file, the column
is one of strings by then. From there to the end every text is replaced by its JSON, in quotes and
with escapes, and nothing decodes it.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path as FilePath
from types import NoneType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

WINDOW = 1000
"""Rows that are read at once."""

CHUNK = 10 << 20
"""Bytes that `datasets` reads at once."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")

_NEARLY_A_NUMBER = re.compile(r"-?\d[\d.]*|-")
"""What its parser takes for a number, and Python's does not: "01", "1.", "-"."""

Path = tuple[str, ...]
"""Names of members below a column."""


def is_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json"


def may_hold_lists(kind: pa.DataType) -> bool:
    """Whether the values of a column can be anything but text and numbers."""
    return pa.types.is_nested(kind) or is_json(kind)


def mixed_columns(dataset: Dataset, content: str = "content") -> list[str]:
    """Columns in which text and other values stand for each other: the text itself, or the
    ``content`` of turns. Such a text is changed if it is JSON by itself."""
    return [
        name
        for name in dataset.column_names
        if any(
            _holds_both(dataset, name, path)
            for path, kind in _leaves(_type(dataset, name))
            if is_json(kind) and path[-1:] in ((), (content,))
        )
    ]


def with_text(dataset: Dataset) -> Dataset:
    """The dataset with columns of text and numbers as strings where they are stored as JSON.

    Whatever a function of the host writes into such a column would be decoded again.
    """
    stored = [name for name in dataset.column_names if is_json(_type(dataset, name))]
    texts = [n for n in stored if all(type(v) in (str, int, float, NoneType) for v in dataset[n])]
    if not texts:
        return dataset

    def write(rows: dict[str, list[Any]]) -> dict[str, list[str | None]]:
        return {n: [None if v is None else str(v) for v in rows[n]] for n in texts}

    features = Features({**dataset.features, **dict.fromkeys(texts, Value("string"))})
    return dataset.map(write, batched=True, features=features)


def encoded_texts(
    dataset: Dataset, columns: Collection[str], files: Sequence[FilePath] = ()
) -> tuple[str, int] | None:
    """The first column of JSON files whose later texts are their JSON (see above).

    Such a column ends with values that are all JSON, most of them texts in quotes, and has other
    text before.

    Args:
        dataset: the rows as they were loaded.
        columns: those that are read.
        files: the local ones that the rows come from, if they are known. One of a single chunk
            can't be wrong.

    Returns:
        Its name, and the row from which on its text is wrong; None if there is no such column.
    """
    if dataset.info.builder_name != "json":
        return None
    if len(files) == 1 and files[0].suffix not in COMPRESSED and files[0].stat().st_size <= CHUNK:
        return None
    for name in filter(columns.__contains__, dataset.column_names):
        for path, kind in _leaves(_type(dataset, name)):
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                first = _encoded_end(_from_the_end(dataset, name, path))
                if first is not None:
                    return name, first
    return None


def _encoded_end(values: Iterable[tuple[int, str]]) -> int | None:
    first, quoted, others, is_escaped = None, 0, 0, False
    for row, text in values:
        value = _decoded(text)
        if value is text:
            # Texts in quotes may be the answers themselves. No writer but this one puts a backslash
            # before a slash; without one, the value that began it must be there, and be a rarity.
            return first if is_escaped or quoted > others > 0 else None
        if isinstance(value, str):
            first, quoted = row, quoted + 1
            is_escaped |= "\\/" in text or "\\u" in text
        else:
            others += 1
    return None  # all of the column is JSON: it was written like this


def _decoded(text: str) -> Any:
    """What ``datasets`` takes a text to be the JSON of; the text itself if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None if _NEARLY_A_NUMBER.fullmatch(text) else text


def _from_the_end(dataset: Dataset, name: str, path: Path) -> Iterator[tuple[int, str]]:
    rows = dataset.select_columns(name).with_format("arrow")
    for stop in range(len(rows), 0, -WINDOW):
        start = max(stop - WINDOW, 0)
        column = rows[start:stop][name].to_pylist()
        for row in range(stop - 1, start - 1, -1):
            yield from ((row, text) for text in _texts(column[row - start], path))


def _texts(value: Any, path: Path) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, list):
        for item in value:
            yield from _texts(item, path)
    elif path:
        yield from _texts(value[path[0]], path[1:])
    else:
        yield value


def _leaves(kind: pa.DataType, path: Path = ()) -> Iterator[tuple[Path, pa.DataType]]:
    if pa.types.is_struct(kind):
        for member in kind:
            yield from _leaves(member.type, (*path, member.name))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaves(kind.value_type, path)
    else:
        yield path, kind


def _holds_both(dataset: Dataset, name: str, path: Path) -> bool:
    """Whether some of the values are text and some are not."""
    text = other = False
    for chunk in dataset.data.column(name).chunks:
        values = _below(chunk, path).storage
        is_text = pc.starts_with(values, '"')
        text |= bool(pc.any(is_text).as_py())
        other |= bool(pc.any(pc.invert(is_text)).as_py())
    return text and other


def _below(values: pa.Array, path: Path) -> Any:
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = values.flatten()
    return _below(pc.struct_field(values, path[0]), path[1:]) if path else values


def _type(dataset: Dataset, name: str) -> pa.DataType:
    return dataset.data.schema.field(name).type
