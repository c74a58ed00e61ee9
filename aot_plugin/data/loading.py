"""Loading the datasets of an unpaired run: the host's own, with checks and a table around it."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.common.datasets import load_preference_datasets
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.shared import (
    generate_dataset_hash_from_config,
    get_prepared_dataset_path,
    load_dataset_with_config,
)
from axolotl.utils.distributed import is_main_process
from axolotl.utils.logging import get_logger
from datasets import Dataset, DatasetDict

from .accounting import RowCounts, check_labels, count_rows, table

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta

LOG = get_logger("axolotl.aot_plugin.data")  # the host shows INFO of loggers below its own name
COUNTS_FILE = "aot_row_counts.json"
SPLITS = {"train": "datasets", "test": "test_datasets"}


def load_unpaired_datasets(cfg: Any) -> "TrainDatasetMeta":
    """What the plugin's ``load_datasets`` hook returns for an unpaired run.

    The datasets come from the host's own ``load_preference_datasets``. The main process logs, once,
    what became of the rows of every entry; the counts are kept next to the prepared dataset.

    Raises:
        ValueError: for a row that can't be read, or if the training rows have one label only.
    """
    counts: dict[Path, list[RowCounts]] = {}
    if is_main_process():
        counts = row_counts(cfg)
    meta = load_preference_datasets(cfg=cfg)
    positive, negative = check_labels(meta.train_dataset)
    if counts:
        for path, entries in counts.items():
            _store(path, entries)
        LOG.info("rows of the unpaired datasets:\n%s", table(chain(*counts.values())))
    LOG.info("training on %d positive and %d negative rows", positive, negative)
    return meta


def row_counts(cfg: Any) -> dict[Path, list[RowCounts]]:
    """The counts of every split's entries by the file that keeps them, stored or made anew.

    A split that was prepared without counts (by another process, or before they existed) is left
    out.
    """
    tokenizer = load_tokenizer(cfg)
    # As the host does, rows of the training set are looked for in the evaluation set too.
    seen: set[int] | None = set() if cfg.dataset_exact_deduplication else None
    counts = {}
    for split, where in SPLITS.items():
        if not cfg.get(where):
            continue
        digest = generate_dataset_hash_from_config(cfg, cfg[where], tokenizer.name_or_path)
        folder = get_prepared_dataset_path(cfg, digest)
        path = folder / COUNTS_FILE
        reused = any(folder.glob("*")) and not cfg.skip_prepare_dataset and not cfg.is_preprocess
        if not reused:
            counts[path] = list(_count_split(cfg, split, tokenizer, seen))
        elif path.exists():
            counts[path] = [RowCounts(**entry) for entry in json.loads(path.read_text())]
    return counts


def _count_split(
    cfg: Any, split: str, tokenizer: Any, seen: set[int] | None
) -> Iterator[RowCounts]:
    for entry in cfg[SPLITS[split]]:
        dataset = load_dataset_with_config(entry, cfg.hf_use_auth_token)
        if isinstance(dataset, DatasetDict):
            dataset = dataset["train"]  # the split that the host's map takes
        assert isinstance(dataset, Dataset)
        key = str(entry["type"]).removeprefix("aot_plugin.unpaired_")
        resolved = (cfg["aot_datasets"] or {}).get(key)
        if resolved is None:
            yield RowCounts(entry["path"], split, rows=len(dataset), counted=False)
        else:
            yield count_rows(dataset, resolved, split, cfg, tokenizer, seen)


def _store(path: Path, counts: list[RowCounts]) -> None:
    if path.parent.is_dir():  # absent with `skip_prepare_dataset`
        path.write_text(json.dumps([vars(entry) for entry in counts], indent=1))
