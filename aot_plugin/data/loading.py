"""Loading the datasets of a run: the host's own, with checks and a table around it."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from axolotl.cli.args import PreprocessCliArgs, TrainerCliArgs
from axolotl.common import datasets as common
from axolotl.common.datasets import load_preference_datasets
from axolotl.loaders import load_tokenizer
from axolotl.utils.data import rl
from axolotl.utils.data.shared import (
    generate_dataset_hash_from_config,
    get_prepared_dataset_path,
    load_dataset_with_config,
)
from axolotl.utils.distributed import is_main_process
from axolotl.utils.logging import get_logger
from axolotl.utils.tokenization import check_example_labels
from datasets import Dataset, DatasetDict
from transformers import HfArgumentParser

from .accounting import RowCounts, check_labels, count_rows, table
from .blame import BadRow, check_host_type, check_text, naming_the_row
from .mixing import is_mixed, rows_taken
from .rendering import save_rendering
from .strategy import arranged
from .tokens import COMPLETIONS, ids_columns, is_text

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta

LOG = get_logger("axolotl.aot_plugin.data")  # the host shows INFO of loggers below its own name
COUNTS_FILE = "aot_row_counts.json"
DEFAULT_SEED = 42
"""The host's own, where it has one."""
LABELS = {True: "positive", False: "negative"}
SPLITS = {"train": "datasets", "test": "test_datasets"}


def load_datasets(cfg: Any, preprocess: bool = False) -> "TrainDatasetMeta":
    """What the plugin's ``load_datasets`` hook returns for a run of ours.

    The datasets come from the host's own ``load_preference_datasets``. The main process logs, once,
    what became of the rows of every entry; the counts are kept next to the prepared dataset.

    Args:
        preprocess: the command is ``axolotl preprocess``, whose flags (``--debug``) count.

    Raises:
        ValueError: for a row that can't be read, if no rows are left or, in an unpaired run, if
            they have one label only.
    """
    unpaired = cfg["aot_mode"] == "unpaired"
    with (
        naming_the_row(cfg),
        _replaced(rl, "load_dataset_with_config", partial(_load_taken, cfg)),
        _replaced(rl, "create_train_validation_split", _hold_out),
        _replaced(rl, "save_preprocessed_dataset", _save_rows),
        _replaced(common, "check_dataset_labels", _show_labels),
    ):
        tokenizer = load_tokenizer(cfg) if is_main_process() else None
        counts = row_counts(cfg, tokenizer) if tokenizer is not None else {}
        # Before anything fails that sends the reader to them.
        _log_counts(list(chain(*counts.values())), cfg["aot_mode"])
        meta = load_preference_datasets(cfg=cfg, cli_args=_flags(preprocess))
    for path, stored in counts.items():
        _store(path, stored)
    if tokenizer is not None and not preprocess:
        save_rendering(cfg, tokenizer)
    if not unpaired:
        meta.train_dataset = _without_identical(meta.train_dataset, "train")
        if meta.eval_dataset is not None:
            meta.eval_dataset = _without_identical(meta.eval_dataset, "test")
    _refuse_empty(meta.train_dataset, cfg, "train")
    if unpaired:
        positive, negative = check_labels(meta.train_dataset)
        LOG.info("training on %d positive and %d negative rows", positive, negative)
    return meta


def _log_counts(counts: list[RowCounts], mode: str) -> None:
    # Of pairs of Axolotl's types the host itself says what it drops.
    if any(entry.counted or entry.taken is not None for entry in counts) or mode == "unpaired":
        LOG.info("rows of the %s datasets:\n%s", mode, table(counts))
    for entry in counts:
        for warning in entry.warnings():
            LOG.warning("%s", warning)


def _without_identical(dataset: Dataset, split: str) -> Dataset:
    """Pairs of Axolotl's types that have one text twice; those of ours are gone by now."""
    if not is_text(dataset, "paired"):
        return dataset
    chosen, rejected = (dataset.with_format("arrow")[name] for name in COMPLETIONS["paired"])
    same = pc.equal(chosen, rejected).to_numpy(zero_copy_only=False)
    if not same.any():
        return dataset
    examples = [dataset[int(n)]["prompt"][-80:] for n in same.nonzero()[0][:3]]
    LOG.warning(
        "%d pairs of the %s datasets have the same text chosen and rejected, and are dropped; the "
        "prompts of the first end in %s",
        same.sum(),
        split,
        ", ".join(map(repr, examples)),
    )
    return dataset.select((~same).nonzero()[0])


def row_counts(cfg: Any, tokenizer: Any) -> dict[Path, list[RowCounts]]:
    """The counts of every split's entries by the file that keeps them, stored or made anew.

    A split that was prepared without counts (by another process, or before they existed) is left
    out.
    """
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
        dataset = _all_rows(load_dataset_with_config(entry, cfg.hf_use_auth_token))
        counts = RowCounts(entry["path"], split, rows=len(dataset))
        dataset, numbers = _taken(dataset, entry, cfg)
        if numbers is not None:
            counts.taken = len(dataset)
        resolved = _resolved(entry, cfg)
        if resolved is None:
            counts.counted = False
        else:
            count_rows(dataset, resolved, counts, cfg, tokenizer, seen, numbers)
        yield counts


def _resolved(entry: Any, cfg: Any) -> dict[str, Any] | None:
    """What ``aot_datasets`` has of an entry; None for the host's own types."""
    package, _, name = str(entry["type"]).partition(".")
    if package != "aot_plugin":
        return None
    return (cfg["aot_datasets"] or {}).get(name.partition("_")[2])


def _taken(dataset: Dataset, entry: Any, cfg: Any) -> tuple[Dataset, np.ndarray | None]:
    """The rows that an entry's type is to read, and their numbers if not all are taken once."""
    resolved = _resolved(entry, cfg)
    if resolved is not None:
        dataset = arranged(dataset, resolved)
    if not is_mixed(entry):
        return dataset, None
    numbers = rows_taken(len(dataset), entry, _seed(cfg))
    return dataset.select(numbers), numbers


@contextlib.contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The host has no hook for what happens between reading and preparing the rows."""
    original = getattr(module, name)
    setattr(module, name, partial(function, original))
    try:
        yield
    finally:
        setattr(module, name, original)


def _load_taken(cfg: Any, load: Callable[..., Any], entry: Any, *args: Any, **kwargs: Any) -> Any:
    """The rows of an entry as its type is to read them, where the host's RL loader reads all of
    them once, as they are."""
    dataset = _all_rows(load(entry, *args, **kwargs))
    if _resolved(entry, cfg) is None:
        check_host_type(dataset, entry, cfg)
    check_text(dataset, entry)
    return _taken(dataset, entry, cfg)[0]


def _hold_out(
    split: Callable[..., Any], dataset: Dataset, cfg: Any, size: float
) -> tuple[Dataset, Dataset]:
    """The host's split. Its schema makes a number of rows a float, of which `datasets` takes only
    those below 1, for a share."""
    number = math.ceil(size * len(dataset)) if size < 1 else int(size)
    if number >= len(dataset):
        raise BadRow(
            f"`val_set_size: {size:g}` leaves none of {len(dataset)} rows to train on; write fewer"
        )
    return split(dataset, cfg, size if size < 1 else number)


def _refuse_empty(dataset: Dataset, cfg: Any, split: str) -> None:
    """Raises BadRow if a split has no rows."""
    if not len(dataset):
        purpose = "train on" if split == "train" else "evaluate on"
        raise BadRow(
            f"`{SPLITS[split]}`: no rows are left to {purpose}; they are empty, or every row was "
            "dropped: the table above says why (`too long`: longer than `sequence_len: "
            f"{cfg['sequence_len']}`)"
        )


def _save_rows(
    save: Callable[..., Any], cfg: Any, dataset: Dataset, digest: str, split: str
) -> None:
    """Not if there are none: the host could not read them again, and would not say why."""
    _refuse_empty(dataset, cfg, split)
    save(cfg, dataset, digest, split)


def _show_labels(
    show: Callable[..., Any], dataset: Dataset, tokenizer: Any, num_examples: int, **kwargs: Any
) -> None:
    """What ``--debug`` shows: rows with ids of ours as the host shows those of SFT, with the very
    ids that are trained. (For preference rows it tokenizes prompt and completion apart.)"""
    for row in dataset.select(range(num_examples)):
        mode = "paired" if "chosen" in row else "unpaired"
        prompt, *completions = (row.get(name) for name in ids_columns(mode).values())
        if prompt is None:
            show(Dataset.from_list([row]), tokenizer=tokenizer, num_examples=1, **kwargs)
            continue
        names = COMPLETIONS[mode] if mode == "paired" else [LABELS[row["label"]]]
        for name, completion in zip(names, completions, strict=True):
            LOG.info("%s row:", name)
            ids = {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
            check_example_labels(ids, tokenizer, text_only=kwargs["text_only"])


def _seed(cfg: Any) -> int:
    # The host leaves an absent seed out of the config. Ranks, and a resumed run, must take the
    # same rows.
    return DEFAULT_SEED if cfg.seed is None else cfg.seed


def _all_rows(dataset: Dataset | DatasetDict) -> Dataset:
    # Of several splits the host's map takes this one.
    return dataset["train"] if isinstance(dataset, DatasetDict) else dataset


def _flags(preprocess: bool) -> PreprocessCliArgs | TrainerCliArgs:
    # The hook is not given them; this is how the host's command itself reads them.
    parser = HfArgumentParser(PreprocessCliArgs if preprocess else TrainerCliArgs)
    return parser.parse_args_into_dataclasses(return_remaining_strings=True)[0]


def _store(path: Path, counts: list[RowCounts]) -> None:
    if path.parent.is_dir():  # absent with `skip_prepare_dataset`
        # A killed run must not leave half of it: the next one would read it.
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps([vars(entry) for entry in counts], indent=1))
        os.replace(temporary, path)
