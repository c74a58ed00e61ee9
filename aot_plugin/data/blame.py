"""Which row it was: the host's own strategies fail with a bare KeyError or a template's TypeError.

Nothing here runs before the host has failed, except for one look at the columns of a pair, where a
template may render an absent response as the word None.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from axolotl.loaders import load_tokenizer
from axolotl.prompt_strategies.dpo import load as load_dpo
from axolotl.prompt_strategies.kto import load as load_kto
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset, DatasetDict

from .options import ConversationOptions
from .tools import TOOL_TYPES

LOG = get_logger("axolotl.aot_plugin.data")
TOOLS = ConversationOptions.model_fields["field_tools"].default
TEXTS = {"paired": ("prompt", "chosen", "rejected"), "unpaired": ("prompt", "completion")}
"""The columns that a strategy of the host has to give, each with text in it."""


class BadRow(ValueError):
    """An error that names its row already."""


@contextlib.contextmanager
def naming_the_row(cfg: Any) -> Iterator[None]:
    """An error of the host's loading, with the entry, the row and its columns in front.

    Raises:
        ValueError: from the host's error, if a row or a file is found to be its cause.
    """
    try:
        yield
    except BadRow:
        raise
    except Exception as error:
        found = next(_problems(cfg, error), None)
        if found is None:
            raise
        raise ValueError(found) from error


def check_pairs(dataset: Dataset, entry: Any) -> None:
    """No response of a pair may be absent, and no tools may be forgotten.

    Raises:
        BadRow: with the number of the first row that lacks a response, or that has tools which
            the entry's type would render if it were told to.
    """
    _check_tools(dataset, entry)
    for field in (entry.get("field_chosen") or "chosen", entry.get("field_rejected") or "rejected"):
        if field not in dataset.column_names or not _nulls(dataset.data.column(field)):
            continue
        for number, response in enumerate(dataset[field]):
            last = response[-1] if isinstance(response, list) and response else response
            if isinstance(last, dict):
                last = last.get("tool_calls") if last.get("content") is None else last["content"]
            if last is None:
                raise BadRow(
                    f"{entry['path']}, row {number}: `{field}` is null; remove the row, or write "
                    'an empty response as ""'
                )


def _check_tools(dataset: Dataset, entry: Any) -> None:
    # An entry with `field_tools` has a type of ours by now; rows that need no type go to TRL, which
    # renders their tools.
    kind = entry.get("type")
    if TOOLS not in dataset.column_names or not kind or str(kind).startswith("aot_plugin."):
        return
    number = next((n for n, tools in enumerate(dataset[TOOLS]) if tools), None)
    if number is None:
        return
    if kind == "chat_template" or kind in TOOL_TYPES:
        raise BadRow(
            f"{entry['path']}, row {number} has `{TOOLS}`: write `field_tools: {TOOLS}` in the "
            "entry to have them rendered, or remove the column"
        )
    LOG.warning(
        "%s: the column `%s` has no effect: its type renders without a chat template",
        entry["path"],
        TOOLS,
    )


def _nulls(column: pa.ChunkedArray) -> int:
    """How many responses may be absent; 0 for nearly all datasets, at no cost."""
    nulls = column.null_count
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    if pa.types.is_struct(column.type) and column.type.get_field_index("content") >= 0:
        nulls += pc.struct_field(column, "content").null_count
    return nulls


def _problems(cfg: Any, error: Exception) -> Iterator[str]:
    # Arrow takes text of a JSON file that is no UTF-8, and fails when a row is looked at.
    unreadable = isinstance(error, UnicodeDecodeError)
    for where in ("datasets", "test_datasets"):
        for index, entry in enumerate(cfg.get(where) or []):
            try:
                dataset = load_dataset_with_config(entry, cfg.hf_use_auth_token)
            except Exception as failure:
                yield f"`{where}[{index}]`: {entry['path']} can't be read: {_root(failure)}"
                continue
            kind = entry["type"]
            ours = isinstance(kind, str) and kind.startswith("aot_plugin.unpaired_")
            if ours and not unreadable:
                continue  # our own types name their rows themselves
            strategy = _strategy(cfg, kind, index) if kind and not ours else _as_it_is
            if strategy is None:
                continue  # the host says why
            rows = dataset["train"] if isinstance(dataset, DatasetDict) else dataset
            texts = () if ours else TEXTS[cfg["aot_mode"]]
            if (problem := _bad_row(rows, strategy, texts, cfg)) is not None:
                number, what = problem
                columns = ", ".join(rows.column_names)
                yield (
                    f"{entry['path']}, row {number}: {what} (type {_type_name(kind, cfg)}; the row "
                    f"has {columns})"
                )


def _type_name(kind: Any, cfg: Any) -> str:
    """What the user has written as ``type``."""
    if not isinstance(kind, str):
        return "user-defined" if kind else "none"
    resolved = (cfg["aot_datasets"] or {}).get(kind.removeprefix("aot_plugin.paired_"))
    return resolved["strategy"] if resolved else kind


def _strategy(cfg: Any, kind: Any, index: int) -> Callable[..., Any] | None:
    load = load_kto if cfg["aot_mode"] == "unpaired" else load_dpo
    name = "user_defined.default" if isinstance(kind, DictDefault) else kind
    strategy = load(name, cfg, dataset_idx=index)
    return strategy[0] if isinstance(strategy, tuple) else strategy


def _as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    return row


def _bad_row(
    rows: Dataset, strategy: Callable[..., Any], texts: tuple[str, ...], cfg: Any
) -> tuple[int, str] | None:
    takes = inspect.signature(strategy).parameters
    more = {"tokenizer": load_tokenizer(cfg)} if "tokenizer" in takes else {}
    for number in range(len(rows)):
        try:
            row = rows[number]
            made = {**row, **strategy(dict(row), **more)}
        except KeyError as error:
            return number, f"there is no {error}"
        except Exception as error:
            return number, f"{type(error).__name__}: {error}"
        for name in texts:
            if not made.get(name):
                return number, f"`{name}` is empty"
    return None


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
