"""The first rows of an entry, loaded and prepared as a training does, without anything being saved.

For the command ``check``, before a training: a bounded number of rows takes as long with a million
rows as with a thousand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from axolotl.common import datasets as common
from axolotl.utils.data import rl
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.dict import DictDefault
from datasets import Dataset, IterableDataset, IterableDatasetDict

from .accounting import RowCounts
from .blame import BadRow, naming_the_row
from .freshness import without_cache
from .labels import Drop
from .levels import levels
from .loading import (
    SPLITS,
    all_rows,
    check_split,
    count_entry,
    our_rows,
    replaced,
    without_identical,
)
from .tokens import is_text, prepare_tokens

MIXING = ("weight", "shards", "shards_idx")
"""Keys of an entry that choose among all of its rows, the first of which are looked at."""


@dataclass(frozen=True)
class FirstRows:
    """The first rows of an entry.

    Attributes:
        counts: kept and dropped rows, with types of the host, too.
        more: whether the entry has more rows than these.
        whole: the prepared rows before any is dropped or cut for its length.
        kept: the rows that are trained. Rows of text have TRL's columns of token ids.
    """

    counts: RowCounts
    more: bool
    whole: Dataset
    kept: Dataset


def first_rows(
    cfg: Any, split: str, index: int, limit: int, tokenizer: Any, folder: str
) -> FirstRows:
    """Reads and prepares the first rows of an entry.

    Args:
        cfg: the run's config.
        split: "train" for an entry of ``datasets``, "test" for one of ``test_datasets``.
        index: the entry's place in its list.
        limit: rows that are read.
        tokenizer: the run's tokenizer.
        folder: an empty temporary folder, for the host's files.

    Raises:
        ValueError: if the entry or a row can't be read; names it.
    """
    entry = cfg[SPLITS[split]][index]
    entry = DictDefault({key: value for key, value in entry.items() if key not in MIXING})
    with naming_the_row(cfg):
        dataset, more = _read(entry, split, limit, cfg.hf_use_auth_token)
    seen: set[int] | None = set() if cfg.dataset_exact_deduplication else None
    counts = count_entry(cfg, entry, split, dataset, tokenizer, seen)
    if more:
        counts.thresholds = []  # the first rows may be of one level, and the others not
    alone = {
        "datasets": [entry],
        "test_datasets": None,
        "val_set_size": 0,
        "dataset_prepared_path": folder,
        "output_dir": folder,
        "dataset_num_proc": 0,
        "push_dataset_to_hub": None,
        "shuffle_merged_datasets": False,
        "debug": False,
    }
    cfg = DictDefault({**cfg, **alone})
    # Prepared rows that are neither measured nor saved.
    whole = _prepared(DictDefault({**cfg, "skip_prepare_dataset": True}), dataset, tokenizer)
    kept = _prepared(cfg, dataset, tokenizer, max_length=cfg.sequence_len)
    return FirstRows(_complete(counts, len(whole), kept, cfg["aot_mode"]), more, whole, kept)


def _read(entry: Any, split: str, limit: int, token: Any) -> tuple[Dataset, bool]:
    """The first rows of an entry, and whether there are more."""
    rows = _streamed(entry, split, limit + 1, token)
    if rows is None:
        loaded = load_dataset_with_config(entry, token)
        check_split(loaded, entry, split)
        rows = all_rows(loaded)
    return rows.select(range(min(limit, len(rows)))), len(rows) > limit


def _streamed(entry: Any, split: str, count: int, token: Any) -> Dataset | None:
    """The first rows, of which no more are read; None if they can't be had in this way."""
    try:
        found = load_dataset_with_config(entry, token, streaming=True)
        check_split(found, entry, split)
        stream = found["train"] if isinstance(found, IterableDatasetDict) else found
        if not isinstance(stream, IterableDataset):
            return None  # saved by `save_to_disk`, and mapped into memory
        # Arrow's rows are those that a training gets. By way of Python, columns of several types
        # came out as the text of their JSON.
        tables = stream.with_format("arrow").iter(batch_size=count)
        table = next(tables, None)
        if table is None:
            return None
        rows = Dataset(table)
        rows.info.builder_name = stream.info.builder_name
        return rows
    except BadRow:
        raise
    except Exception:
        # A slice of a split can't be streamed, nor can some formats. Whatever is wrong with the
        # rows themselves, the whole loading says so.
        return None


def _prepared(cfg: Any, dataset: Dataset, tokenizer: Any, max_length: int | None = None) -> Dataset:
    """Prepares loaded rows by the host's loading, and tokenizes them as the trainer does."""
    with (
        naming_the_row(cfg),
        without_cache(True),
        replaced(common, "load_tokenizer", lambda load, cfg: tokenizer),
        replaced(rl, "load_tokenizer", lambda load, cfg: tokenizer),
        replaced(rl, "load_dataset_with_config", lambda load, *args, **kwargs: dataset),
        our_rows(cfg),
        replaced(rl, "save_preprocessed_dataset", lambda save, *args: None),
    ):
        prepared = common.load_preference_datasets(cfg=cfg).train_dataset
    mode = cfg["aot_mode"]
    if mode == "paired":
        prepared = without_identical(prepared, "train")
    if not is_text(prepared, mode):
        return prepared
    return prepare_tokens(prepared, tokenizer, mode, max_length)


def _complete(counts: RowCounts, whole: int, kept: Dataset, mode: str) -> RowCounts:
    """Fills in what the host alone knows of rows with its own types, and what TRL drops."""
    if counts.counted:
        before = counts.responses if counts.pairs is None else counts.pairs + _dropped(counts)
    elif mode == "paired":
        before = counts.rows
        _drop(counts, Drop.IDENTICAL, before - _dropped(counts) - whole)
    else:
        before = whole + _dropped(counts)
    counts.counted = True
    _drop(counts, Drop.TOO_LONG, before - _dropped(counts) - len(kept))
    if mode == "paired":
        counts.pairs = len(kept)
    elif "label" in kept.column_names:
        found = levels(kept)
        counts.positive = int((found == 1).sum())
        counts.negative = int((found == 0).sum())
        counts.middle = len(found) - counts.positive - counts.negative
    return counts


def _dropped(counts: RowCounts) -> int:
    return sum(counts.dropped.values())


def _drop(counts: RowCounts, why: Drop, more: int) -> None:
    if more > 0:
        counts.dropped[why.value] = counts.dropped.get(why.value, 0) + more


def mixing(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an entry by which it chooses among its rows."""
    return {key: entry[key] for key in MIXING if entry.get(key) is not None}
