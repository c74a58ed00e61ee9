"""Rows with images, in the form that TRL's collators read.

Such a row keeps its turns and its images: TRL renders the former with the processor's chat template
when it collates them, since only the processor knows how many tokens an image takes. Our strategies
read the turns as they read those of text. A ``MARK`` stands for each image meanwhile.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from axolotl.utils.data import utils
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import List as ListOf

from .blame import BadRow
from .labels import Drop
from .levels import LEVEL
from .rows import Example, Row, RowError, Turn
from .strategy import columns_of, mode_of, parsed_options, rendered, rows_of
from .weights import WEIGHT

COLUMNS = ("image", "images")
"""Columns that hold the images of a row: one, or a list."""

MARK = "\ufffc image of aot_plugin \ufffc"
"""Stands for an image in the text of a turn."""

REMOTE = ("http://", "https://")
BATCH = 1000


def has_images(dataset: Dataset) -> bool:
    """Whether a column of a dataset holds images."""
    return any(_count(dataset, name) for name in COLUMNS if name in dataset.column_names)


def _count(dataset: Dataset, name: str) -> int:
    column = dataset.data.column(name)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.sum(pc.list_value_length(column)).as_py() or 0
    return column.length() - column.null_count


def check_images(
    dataset: Dataset, path: str, numbers: Sequence[int] | np.ndarray | None = None
) -> list[int]:
    """Checks that each row has images, and that those that are no addresses can be read.

    Args:
        dataset: rows, for which ``has_images``.
        path: their dataset, for messages.
        numbers: the rows' numbers in it, for messages; default 0, 1, 2, ...

    Returns:
        The number of images of each row.

    Raises:
        BadRow: naming the row; or if the installed Axolotl does not train such rows.
    """
    if not hasattr(utils, "is_vision_dataset"):
        raise BadRow(
            f"{path}: there is a column of images, and the installed Axolotl trains preferences on "
            "text only; 0.21 takes images"
        )
    found = []
    numbers = range(len(dataset)) if numbers is None else numbers
    for number, images in zip(numbers, _images(dataset), strict=True):
        if not images:
            raise BadRow(
                f"{path}, row {number}: there is no image, but other rows have some; rows of text "
                "alone can't be mixed with them: remove it"
            )
        for image in images:
            try:
                _look_at(image)
            except Exception as error:
                raise BadRow(f"{path}, row {number}: an image can't be read: {error}") from error
        found.append(len(images))
    return found


def _images(dataset: Dataset) -> Iterator[list[Any]]:
    """The images of each row as they are stored, not decoded."""
    names = [name for name in COLUMNS if name in dataset.column_names]
    for batch in dataset.select_columns(names).with_format("arrow").iter(BATCH):
        columns = {name: batch.column(name).to_pylist() for name in names}
        # With both columns, `images` counts, as it does for the collator.
        for row in rows_of(columns):
            images = row.get("images") or [row.get("image")]
            yield [image for image in images if image is not None]


def _look_at(image: Any) -> None:
    """Opens an image, of which this reads the header only."""
    from PIL import Image
    from transformers.image_utils import load_image

    stored = image if isinstance(image, Mapping) else {"path": image}
    if stored.get("bytes") is not None:
        Image.open(BytesIO(stored["bytes"])).close()
    elif os.path.isfile(stored["path"]):
        Image.open(stored["path"]).close()
    elif not str(stored["path"]).startswith(REMOTE):
        load_image(stored["path"])  # base64, or an error that says what is accepted


def with_turns(dataset: Dataset, resolved: Mapping[str, Any]) -> Dataset:
    """The examples that one of our strategies makes of rows with images.

    Args:
        dataset: the rows.
        resolved: the entry's value in ``aot_datasets``.

    Returns:
        Prompts and completions as lists of turns whose content is a list of parts, beside the
        columns of images.

    Raises:
        ValueError: as ``read``.
    """
    mode, numbers = mode_of(resolved), range(len(dataset))
    made = [(n, row) for n, row in read(dataset, resolved, numbers) if not isinstance(row, Drop)]
    rows = columns_of([row for _, row in made], mode, parsed_options(resolved))
    part = {"type": Value("string"), "text": Value("string")}
    turns = ListOf({"role": Value("string"), "content": ListOf(part)})
    others = {"label": Value("bool"), WEIGHT: Value("float64"), LEVEL: Value("float64")}
    features = Features({name: others.get(name, turns) for name in rows})
    kept = dataset.select([number for number, _ in made])
    kept = kept.select_columns([name for name in COLUMNS if name in dataset.column_names])
    return concatenate_datasets([kept, Dataset.from_dict(rows, features)], axis=1)


def read(
    dataset: Dataset,
    resolved: Mapping[str, Any],
    numbers: Sequence[int] | np.ndarray,
    images: Sequence[int] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """``strategy.rendered`` for rows with images: prompts and completions are turns.

    Args:
        dataset: the rows.
        resolved: the entry's value in ``aot_datasets``.
        numbers: the rows' numbers, for messages.
        images: from ``check_images``; with it, prompts are refused that have places for more.

    Raises:
        ValueError: if a row can't be read; names dataset, row and what is wrong.
    """
    text = dataset.remove_columns([n for n in COLUMNS if n in dataset.column_names])
    if parsed_options(resolved).chat_template:
        raise BadRow(
            f"{resolved['source']['path']}: rows with images are rendered with the processor's "
            "chat template, or with a `chat_template` at the top level of the config; move that of "
            "the entry there"
        )
    path, found = resolved["source"]["path"], dict(zip(numbers, images or (), strict=False))

    def marked() -> Iterator[Row]:
        for number, row in zip(numbers, text, strict=True):
            try:
                yield _marked(row)
            except RowError as error:
                raise BadRow(f"{path}, row {number}: {error}") from None

    for number, made in rendered(marked(), resolved, _turns, numbers):
        if found and not isinstance(made, Drop):
            parts = [part["type"] for turn in made[0] for part in turn["content"]]
            if (places := parts.count("image")) > found[number]:
                raise BadRow(
                    f"{path}, row {number}: its prompt has places for {places} images, but the "
                    f"row has {found[number]}"
                )
        yield number, made


def _turns(example: Example) -> tuple[list[Turn], list[Turn]]:
    """An example's prompt and its completion, their contents as lists of parts.

    Raises:
        RowError: if it has what TRL's collators do not take with images.
    """
    if example.tools:
        raise RowError("tools can't be trained with images")
    turns = [*example.prompt, example.completion]
    for turn in turns:
        if further := turn.keys() - {"role", "content"}:
            raise RowError(f"`{min(further)}` of a turn can't be trained with images")
        if MARK in turn["content"] and turn["role"] != "user":
            raise RowError("only turns of the user can hold images")
    *prompt, completion = ({**turn, "content": _parts(turn["content"])} for turn in turns)
    return prompt, [completion]


def _parts(content: str) -> list[dict[str, str | None]]:
    parts: list[dict[str, str | None]] = []
    for text in content.split(MARK):
        parts += [{"type": "image", "text": None}, {"type": "text", "text": text}]
    _, *parts = parts  # no image comes before the first mark
    return [part for part in parts if part["text"] != ""] or parts


def _marked(value: Any) -> Any:
    """A row, or a value in it, whose parts of type image are text."""
    if isinstance(value, Mapping):
        if value.get("type") == "image":
            if any(v is not None for k, v in value.items() if k not in ("type", "text")):
                raise RowError(
                    "a turn holds an image itself; move it to the column `images`, and leave "
                    '`{"type": "image"}` in its place'
                )
            return {"type": "text", "text": MARK}
        return {key: _marked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked(item) for item in value]
    return value
