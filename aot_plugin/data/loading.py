"""The host's loading of a run's datasets, with checks and a log table around it."""

import contextlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
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

from ..files import write_atomically
from .accounting import RowCounts, check_labels, count_rows, table
from .blame import BadRow, check_host_type, columns_of_host_type, naming_the_row
from .freshness import local_files
from .images import check_images, has_images, with_turns
from .json_columns import encoded_texts, mixed_columns, with_text
from .labels import Drop
from .levels import LEVEL, label_in_words, levels
from .mixing import is_mixed, rows_taken
from .options import columns_named, plain
from .rendering import save_rendering
from .sampler import rows_per_epoch
from .strategy import arranged, parsed_options, transform_for
from .tokens import COMPLETIONS, ids_columns, is_text
from .weights import WEIGHT, weighed

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta

LOG = get_logger("axolotl.aot_plugin.data")  # the host shows INFO of loggers below its own name
COUNTS_FILE = "aot_row_counts.json"
DEFAULT_SEED = 42
"""The host's own default seed, in places where it has one."""
SPLITS = {"train": "datasets", "test": "test_datasets"}


def load_datasets(cfg: Any, preprocess: bool = False) -> "TrainDatasetMeta":
    """Loads the datasets of an ``rl: aot`` run, for the plugin's ``load_datasets`` hook.

    The datasets come from the host's own ``load_preference_datasets``. The main process logs once
    how many rows of every entry were kept and dropped, and stores the counts next to the prepared
    dataset.

    Args:
        cfg: the run's config.
        preprocess: True for the command ``axolotl preprocess``, whose flags (``--debug``) then
            apply.

    Returns:
        The training set, the evaluation set if there is one, and the number of steps.

    Raises:
        ValueError: if a row can't be read, if no rows are left or, in an unpaired run, if all rows
            have the same label.
    """
    unpaired = cfg["aot_mode"] == "unpaired"
    restore_types(cfg)
    with naming_the_row(cfg), our_rows(cfg):
        tokenizer = load_tokenizer(cfg) if is_main_process() else None
        counts = row_counts(cfg, tokenizer) if tokenizer is not None else {}
        # Logged first, since later errors refer to this table.
        _log_counts(list(chain(*counts.values())), cfg["aot_mode"])
        meta = load_preference_datasets(cfg=cfg, cli_args=_flags(preprocess))
    for path, stored in counts.items():
        _store(path, stored)
    images = has_images(meta.train_dataset)
    if images:
        _refuse_keys_of_text(cfg)
    _refuse_other_images(images, meta.eval_dataset)
    if tokenizer is not None and not preprocess and not images:
        save_rendering(cfg, tokenizer)
    if not unpaired:
        meta.train_dataset = without_identical(meta.train_dataset, "train")
        if meta.eval_dataset is not None:
            meta.eval_dataset = without_identical(meta.eval_dataset, "test")
    _refuse_empty(meta.train_dataset, cfg, "train")
    for split, dataset in (("train", meta.train_dataset), ("test", meta.eval_dataset)):
        _refuse_lost_weights(dataset, cfg, split)
    rows = len(meta.train_dataset)
    if unpaired:
        LOG.info("training on %s", check_labels(meta.train_dataset))
        _warn_of_one_label(meta.eval_dataset)
        rows = rows_per_epoch(levels(meta.train_dataset), cfg["aot_draw"] == "balanced")
    meta.total_num_steps = _steps(rows, cfg)
    if tokenizer is not None and meta.eval_dataset is not None:
        _warn_of_trained_prompts(meta.train_dataset, meta.eval_dataset, cfg["aot_mode"])
    return meta


def _warn_of_one_label(held_out: Dataset | None) -> None:
    if held_out is None:
        return
    names = [name for name in ("label", LEVEL) if name in held_out.column_names]
    if any(len(held_out.unique(name)) > 1 for name in names):
        return
    LOG.warning(
        "all %d rows of the evaluation set have the same label, so evaluations compare nothing; "
        "hold out more rows",
        len(held_out),
    )


@contextlib.contextmanager
def our_rows(cfg: Any) -> Iterator[None]:
    """Has the host load the rows that we choose and prepare."""
    with (
        replaced(rl, "load_dataset_with_config", partial(_load_taken, cfg)),
        replaced(rl, "_map_dataset", _map_rows),
        replaced(rl, "create_train_validation_split", _hold_out),
        replaced(rl, "save_preprocessed_dataset", _save_rows),
        replaced(common, "check_dataset_labels", _show_labels),
    ):
        yield


def restore_types(cfg: Any) -> None:
    """Gives the entries of ``test_datasets`` their user-defined types back.

    The host's validation takes such a mapping for one of supervised fine-tuning and drops the keys
    that it does not know there; an empty one stands for rows that are used as they are. Both lists
    have the same types (``entries``), so those of ``datasets`` serve.
    """
    for entry, trained in zip(cfg.test_datasets or (), cfg.datasets or (), strict=False):
        if isinstance(entry["type"], Mapping) and isinstance(trained["type"], Mapping):
            entry["type"] = trained["type"]


def _log_counts(counts: list[RowCounts], mode: str) -> None:
    # For pairs with one of Axolotl's types, the host itself reports what it drops.
    said = any(entry.counted or entry.taken is not None or entry.dropped for entry in counts)
    if said or mode == "unpaired":
        LOG.info("rows of the %s datasets:\n%s", mode, table(counts))
    for entry in counts:
        for warning in entry.warnings():
            LOG.warning("%s", warning)


def _refuse_keys_of_text(cfg: Any) -> None:
    """Raises BadRow for keys that can't act on rows with images, which are rendered and tokenized
    when they are collated."""
    refused = {}
    if cfg.chat_template_kwargs:
        refused["chat_template_kwargs"] = "TRL's collator passes none to the template"
    if cfg.precompute_ref_log_probs:
        refused["precompute_ref_log_probs: true"] = "the reference is scored in each step"
    if cfg["aot_samples"]:
        refused["aot_samples"] = "only prompts of text are answered"
    if (cfg.excess_length_strategy or "").lower() == "raise":
        refused["excess_length_strategy: raise"] = (
            "a row longer than `sequence_len` is cut, with a warning"
        )
    if refused:
        keys = "; ".join(f"`{key}`: {instead}" for key, instead in refused.items())
        raise BadRow(f"rows with images are rendered and tokenized in each step; remove {keys}")


def _refuse_other_images(images: bool, held_out: Dataset | None) -> None:
    """Raises BadRow if only the training rows, or only the held-out ones, have images: the host has
    one collator for both."""
    if held_out is not None and images != has_images(held_out):
        with_, without = ("datasets", "test_datasets")[:: 1 if images else -1]
        raise BadRow(
            f"the rows of `{with_}` have images and those of `{without}` have none; give both some"
        )


def without_identical(dataset: Dataset, split: str) -> Dataset:
    """Drops pairs of Axolotl's types whose chosen and rejected responses are equal.

    Those of our types have been dropped before.
    """
    if is_text(dataset, "paired"):
        chosen, rejected = (dataset.with_format("arrow")[name] for name in COMPLETIONS["paired"])
        same = pc.equal(chosen, rejected).to_numpy(zero_copy_only=False)
    elif has_images(dataset):
        pairs = zip(*(dataset[name] for name in COMPLETIONS["paired"]), strict=True)
        same = np.array([chosen == rejected for chosen, rejected in pairs])
    else:
        return dataset
    if not same.any():
        return dataset
    examples = [str(dataset[int(n)]["prompt"])[-80:] for n in same.nonzero()[0][:3]]
    LOG.warning(
        "%d pairs of the %s datasets have the same text chosen and rejected, and are dropped; the "
        "prompts of the first end in %s",
        same.sum(),
        split,
        ", ".join(map(repr, examples)),
    )
    return dataset.select((~same).nonzero()[0])


def row_counts(cfg: Any, tokenizer: Any) -> dict[Path, list[RowCounts]]:
    """Counts the rows of every split, or reads the counts stored with prepared rows.

    Returns:
        The counts of a split's entries by the file that stores them. A split that was prepared
        without counts (by another process, or before counts existed) is omitted.
    """
    # Shared by both splits: as in the host, an evaluation row that is also a training row is a
    # duplicate.
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
        loaded = load_dataset_with_config(entry, cfg.hf_use_auth_token)
        check_split(loaded, entry, split)
        dataset = all_rows(loaded)
        yield count_entry(cfg, entry, split, dataset, tokenizer, seen)


def _refuse_encoded_texts(dataset: Dataset, entry: Any, columns: Collection[str]) -> None:
    """Raises BadRow for a column that ``encoded_texts`` finds."""
    if found := encoded_texts(dataset, columns, list(local_files(entry))):
        name, first = found
        raise BadRow(
            f"{entry['path']}, row {first}: from there on `datasets` has replaced the text in "
            f"`{name}` by its JSON, in quotes and with escapes: a value there, or in a row nearby, "
            "is no text, and all rows of the first 10 MiB of the first file hold text; write all "
            "values of the column in one form"
        )


def count_entry(
    cfg: Any, entry: Any, split: str, dataset: Dataset, tokenizer: Any, seen: set[int] | None
) -> RowCounts:
    """Counts the rows of an entry.

    Args:
        cfg: the run's config.
        entry: the entry, of ``datasets`` (``split`` "train") or ``test_datasets`` ("test").
        dataset: the entry's rows, as they were loaded.
        tokenizer, seen: as for ``count_rows``.

    Raises:
        ValueError: if a row can't be read; names it.
    """
    counts = RowCounts(entry["path"], split, rows=len(dataset))
    resolved = resolved_entry(entry, cfg)
    if resolved is None:
        read: Collection[str] = columns_of_host_type(dataset, entry, cfg)
    else:
        read = columns_named(parsed_options(plain(resolved)), dataset.column_names)
    _refuse_encoded_texts(dataset, entry, read)
    dataset, numbers = _taken(dataset, entry, cfg)
    if numbers is not None:
        counts.taken = len(dataset)
    images = check_images(dataset, entry["path"], numbers) if has_images(dataset) else None
    if resolved is None:
        counts.counted = False
        counts.mixed = [name for name in mixed_columns(dataset) if name in read]
        if weightless := _weighed(dataset, entry, numbers)[1]:
            counts.dropped = {Drop.WEIGHTLESS.value: weightless}
        return counts
    return count_rows(dataset, resolved, counts, cfg, tokenizer, seen, numbers, images)


def resolved_entry(entry: Any, cfg: Any) -> dict[str, Any] | None:
    """The value in ``aot_datasets`` for an entry; None for the host's own types."""
    package, _, name = str(entry["type"]).partition(".")
    if package != "aot_plugin":
        return None
    return (cfg["aot_datasets"] or {}).get(name.partition("_")[2])


def _taken(dataset: Dataset, entry: Any, cfg: Any) -> tuple[Dataset, np.ndarray | None]:
    """The rows that an entry's type reads, and their numbers; None if every row is taken once."""
    resolved = resolved_entry(entry, cfg)
    if resolved is not None:
        images, dataset = has_images(dataset), arranged(dataset, resolved)
        if images and not has_images(dataset):
            raise BadRow(
                f"{entry['path']}: there is a column of images, which `type: "
                f"{resolved['strategy']}` does not read; remove the column, or choose another type"
            )
    if not is_mixed(entry):
        return dataset, None
    numbers = rows_taken(len(dataset), entry, _seed(cfg))
    return dataset.select(numbers), numbers


@contextlib.contextmanager
def replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replaces a function of the host by one that gets the original as its first argument.

    The host has no hook between reading and preparing the rows.
    """
    original = getattr(module, name)
    setattr(module, name, partial(function, original))
    try:
        yield
    finally:
        setattr(module, name, original)


def _load_taken(cfg: Any, load: Callable[..., Any], entry: Any, *args: Any, **kwargs: Any) -> Any:
    """Loads the rows that an entry's type reads.

    The host's RL loader would read every row once, unchanged.
    """
    dataset, resolved = all_rows(load(entry, *args, **kwargs)), resolved_entry(entry, cfg)
    if resolved is None:
        dataset = with_text(dataset)
    # Rows of turns with images need no type: TRL's collator reads them as they are.
    if resolved is None and (entry.get("type") or not has_images(dataset)):
        check_host_type(dataset, entry, cfg)
    dataset, numbers = _taken(dataset, entry, cfg)
    if resolved is None:
        return _weighed(dataset, entry, numbers)[0]
    return with_turns(dataset, resolved) if has_images(dataset) else dataset


def _weighed(dataset: Dataset, entry: Any, numbers: np.ndarray | None) -> tuple[Dataset, int]:
    try:
        return weighed(dataset, entry, numbers)
    except ValueError as error:
        raise BadRow(str(error)) from None


def _refuse_lost_weights(dataset: Dataset | None, cfg: Any, split: str) -> None:
    """Raises BadRow if entries have ``field_weight`` and the prepared rows have no weights."""
    if dataset is None or WEIGHT in dataset.column_names:
        return
    for entry in cfg.get(SPLITS[split]) or []:
        resolved = resolved_entry(entry, cfg)
        if (entry if resolved is None else resolved["options"]).get("field_weight"):
            raise BadRow(
                f"{entry['path']}: the weights (`field_weight`) are not in the prepared rows; its "
                f"type {entry['type']} loses the column `{WEIGHT}`"
            )


def _map_rows(prepare: Callable[..., Any], cfg: Any, dataset: Any, *args: Any, **keys: Any) -> Any:
    """The host's application of a type to loaded rows.

    Those with images, of a type of ours, are prepared already.
    """
    transform = args[0]
    if transform.__module__ == transform_for.__module__ and has_images(dataset):
        return dataset
    return prepare(cfg, dataset, *args, **keys)


def _hold_out(
    split: Callable[..., Any], dataset: Dataset, cfg: Any, size: float
) -> tuple[Dataset, Dataset]:
    """The host's split into training and held-out rows.

    The host's schema converts a number of rows to float. `datasets` accepts a float only below 1,
    as a share of the rows.
    """
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


def _warn_of_trained_prompts(trained: Dataset, held_out: Dataset, mode: str) -> None:
    """Says how many held-out rows have the prompt of a training row.

    The host holds rows out one by one, and a prompt with several responses makes several rows.
    """
    if not (is_text(trained, mode) and is_text(held_out, mode)):
        return
    held = held_out.select_columns("prompt").with_format("arrow")[:]["prompt"].to_pylist()
    asked, seen = pa.array(set(held), pa.string()), set()
    for batch in trained.select_columns("prompt").with_format("arrow").iter(batch_size=10_000):
        prompts = batch["prompt"].cast(pa.string())
        seen.update(prompts.filter(pc.is_in(prompts, value_set=asked)).to_pylist())
    count = sum(prompt in seen for prompt in held)
    if count:
        LOG.warning(
            "%d of %d held-out rows have a prompt that is trained on, too, so evaluations look "
            "better than on new prompts; `test_datasets` with prompts of its own does not",
            *(count, len(held_out)),
        )


def _save_rows(
    save: Callable[..., Any], cfg: Any, dataset: Dataset, digest: str, split: str
) -> None:
    """Saves prepared rows.

    An empty dataset is refused: the host could not read it back, and would not say why.
    """
    _refuse_empty(dataset, cfg, split)
    save(cfg, dataset, digest, split)


def _show_labels(
    show: Callable[..., Any], dataset: Dataset, tokenizer: Any, num_examples: int, **kwargs: Any
) -> None:
    """Shows example rows for ``--debug``.

    Rows with our token ids are shown as the host shows SFT rows, with exactly the ids that are
    trained on. (For preference rows the host tokenizes prompt and completion separately.)
    """
    for row in dataset.select(range(num_examples)):
        mode = "paired" if "chosen" in row else "unpaired"
        prompt, *completions = (row.get(name) for name in ids_columns(mode).values())
        if prompt is None:
            show(Dataset.from_list([row]), tokenizer=tokenizer, num_examples=1, **kwargs)
            continue
        names = COMPLETIONS[mode] if mode == "paired" else [label_in_words(row)]
        for name, completion in zip(names, completions, strict=True):
            LOG.info("%s row:", name)
            ids = {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
            check_example_labels(ids, tokenizer, text_only=kwargs["text_only"])


def _seed(cfg: Any) -> int:
    # Without `seed` the host's config has none. All ranks, and a resumed run, must take the same
    # rows.
    return DEFAULT_SEED if cfg.seed is None else cfg.seed


def check_split(dataset: Any, entry: Any, split: str) -> None:
    """Raises BadRow if an entry of ``test_datasets`` names none of several splits: the rows would
    be those of ``train``."""
    if split == "test" and isinstance(dataset, Mapping) and len(dataset) > 1:
        raise BadRow(
            f"{entry['path']}: its entry in `test_datasets` does not say which split, and Axolotl "
            f"would read `train`; write `split` with one of {', '.join(map(str, dataset))}"
        )


def all_rows(dataset: Dataset | DatasetDict) -> Dataset:
    # If there are several splits, the host's map uses this one.
    return dataset["train"] if isinstance(dataset, DatasetDict) else dataset


def _flags(preprocess: bool) -> PreprocessCliArgs | TrainerCliArgs:
    # The hook does not receive the flags; the host's command parses them in the same way.
    parser = HfArgumentParser(PreprocessCliArgs if preprocess else TrainerCliArgs)
    return parser.parse_args_into_dataclasses(return_remaining_strings=True)[0]


def _steps(rows: int, cfg: Any) -> int:
    """Number of optimizer steps of a run without ``max_steps``.

    The host counts rows that have been dropped since, and not that the last step of each epoch may
    be a shorter one. The trainer would take its number for ``max_steps`` and train for more or
    fewer epochs than ``num_epochs``.
    """
    return math.ceil(cfg.num_epochs * math.ceil(rows / cfg.batch_size))


def _store(path: Path, counts: list[RowCounts]) -> None:
    if path.parent.is_dir():  # absent with `skip_prepare_dataset`
        text = json.dumps([vars(entry) for entry in counts], indent=1)
        write_atomically(path, lambda file: file.write_text(text))
