"""Names the rows that the host's own strategies can't handle.

These strategies fail with a bare KeyError or a template's TypeError, which names no row. Other rows
do not fail, but would be trained on with a part missing or altered; these are found as well.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from axolotl.loaders import load_tokenizer
from axolotl.prompt_strategies.dpo import load as load_dpo
from axolotl.prompt_strategies.kto import load as load_kto
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset, DatasetDict

from .host_types import columns_read, first_unrepresented
from .json_columns import may_hold_lists
from .options import ConversationOptions

LOG = get_logger("axolotl.aot_plugin.data")
TOOLS = ConversationOptions.model_fields["field_tools"].default
TEXTS = {"paired": ("prompt", "chosen", "rejected"), "unpaired": ("prompt", "completion")}
"""The columns that a strategy of the host must produce, each with non-empty text."""


class BadRow(ValueError):
    """An error whose message already names its row."""


@contextlib.contextmanager
def naming_the_row(cfg: Any) -> Iterator[None]:
    """Replaces an error of the host's loading by one that names the entry, the row and its columns.

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


def check_host_type(dataset: Dataset, entry: Any, cfg: Any) -> None:
    """Checks that a type that is not ours writes everything in its rows as text.

    Raises:
        BadRow: if it would lose a part of a row, the first of which is named; or if the entry has
            no type and its columns hold turns instead of text.
    """
    kind, texts = entry.get("type"), TEXTS[cfg["aot_mode"]]
    instead = "write `type: chat_template.default`"
    if not kind:
        turns = [name for name in texts if _holds_turns(dataset, name)]
        if turns:
            raise BadRow(f"{entry['path']}: `{turns[0]}` holds turns: {instead} in its entry")
        LOG.warning_once(  # `check` loads an entry twice
            "%s: its entry has no `type`, so its text is trained as it is, without a chat "
            "template; for a chat model, %s",
            entry["path"],
            instead,
        )
        return
    strategy, how = _loaded(DictDefault({**cfg, "datasets": [entry]}), kind, 0)
    if entry.get("field_weight") and how.get("remove_columns") == "__all__":
        raise BadRow(
            f"{entry['path']}: type {_type_name(kind)} removes all columns of the rows, and with "
            "them the weights; remove `field_weight`, or let the type name the columns"
        )
    if strategy is None or not strategy.__module__.startswith("axolotl."):
        return  # the host reports why; or it is the user's own function, free to leave things out
    problem = first_unrepresented(dataset, strategy, texts)
    if problem is not None:
        number, what = problem
        name = _type_name(kind)
        raise BadRow(
            f"{entry['path']}, row {number}: {what}, which type {name} can't represent; {instead} "
            "(docs/datasets.md), or fix the row"
        )
    is_rendered = isinstance(kind, str) and not strategy.__module__.endswith(".passthrough")
    if is_rendered and (ends := _other_ends(dataset, strategy, cfg)):
        LOG.warning(
            "%s: its type %s writes prompts that end in %r, and the chat template, which is saved "
            "with the model, in %r. Who asks the model by its template will ask in another form "
            "than was trained; `type: chat_template.default` renders with the template",
            *(entry["path"], kind, *ends),
        )
    if TOOLS in dataset.column_names and any(dataset[TOOLS]):
        LOG.warning(
            "%s: the column `%s` has no effect: its type renders without a chat template",
            entry["path"],
            TOOLS,
        )


def columns_of_host_type(dataset: Dataset, entry: Any, cfg: Any) -> list[str]:
    """The columns that a type which is not ours reads; all, if that can't be said."""
    kind = entry.get("type")
    if not kind:
        return list(TEXTS[cfg["aot_mode"]])
    strategy, _ = _loaded(DictDefault({**cfg, "datasets": [entry]}), kind, 0)
    read = columns_read(dataset[0], strategy) if strategy is not None and len(dataset) else []
    return read or dataset.column_names


def _other_ends(dataset: Dataset, strategy: Callable[..., Any], cfg: Any) -> tuple[str, str] | None:
    """How the first prompt ends, and how the chat template ends one; None if in the same way, or if
    that can't be said."""
    tokenizer = load_tokenizer(cfg)
    if not tokenizer.chat_template or not len(dataset):
        return None
    question = "Qx7"
    try:
        prompt = str(strategy(dict(dataset[0]))["prompt"]).rstrip()
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
    except Exception:
        return None  # a faulty row is named later; a template may want more than one turn
    end = asked.rpartition(question)[2].strip()
    return None if prompt.endswith(end) else (prompt[-len(end) :], end)


def _holds_turns(dataset: Dataset, name: str) -> bool:
    return name in dataset.column_names and may_hold_lists(dataset.data.column(name).type)


def _problems(cfg: Any, error: Exception) -> Iterator[str]:
    # Arrow loads a JSON file whose text is not UTF-8, and fails only when a row is read.
    unreadable = isinstance(error, UnicodeDecodeError)
    for where in ("datasets", "test_datasets"):
        for index, entry in enumerate(cfg.get(where) or []):
            try:
                dataset = load_dataset_with_config(entry, cfg.hf_use_auth_token)
            except Exception as failure:
                yield f"`{where}[{index}]`: {entry['path']} can't be read: {_root(failure)}"
                continue
            kind = entry["type"]
            ours = isinstance(kind, str) and kind.startswith("aot_plugin.")
            if ours and not unreadable:
                continue  # errors of our own types already name the row
            strategy = _strategy(cfg, kind, index) if kind and not ours else _as_it_is
            if strategy is None:
                continue  # the host reports why
            rows = dataset["train"] if isinstance(dataset, DatasetDict) else dataset
            texts = () if ours else TEXTS[cfg["aot_mode"]]
            if (problem := _bad_row(rows, strategy, texts, cfg)) is not None:
                number, what = problem
                columns = ", ".join(rows.column_names)
                yield (
                    f"{entry['path']}, row {number}: {what} (type {_type_name(kind)}; the row "
                    f"has {columns})"
                )


def _type_name(kind: Any) -> str:
    """The user's ``type`` as messages show it."""
    if not isinstance(kind, str):
        return "user-defined" if kind else "none"
    return kind


def _strategy(cfg: Any, kind: Any, index: int) -> Callable[..., Any] | None:
    return _loaded(cfg, kind, index)[0]


def _loaded(cfg: Any, kind: Any, index: int) -> tuple[Callable[..., Any] | None, Mapping[str, Any]]:
    """A type's function (None if it can't be loaded), and how the host maps rows with it."""
    load = load_kto if cfg["aot_mode"] == "unpaired" else load_dpo
    name = "user_defined.default" if isinstance(kind, DictDefault) else kind
    strategy = load(name, cfg, dataset_idx=index)
    return strategy if isinstance(strategy, tuple) else (strategy, {})


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
    if isinstance(error, StopIteration):  # of `datasets`, without a word
        return "no rows are in it (a path with brackets is taken for a pattern)"
    return f"{type(error).__name__}: {error}"
