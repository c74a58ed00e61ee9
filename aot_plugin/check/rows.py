"""Facts of the first rows of an entry, and the rows that are shown."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..data import LEVEL, WEIGHT, check_labels, levels
from ..data.first_rows import first_rows, mixing
from ..data.images import has_images
from ..data.levels import label_in_words
from ..data.loading import SPLITS, resolved_entry
from ..data.tokens import COMPLETIONS, ids_columns
from .facts import Entry, Lengths, Part, Shown

SHOWN = 3
"""Rows that are shown."""


def entry_facts(
    cfg: Any, split: str, index: int, limit: int, tokenizer: Any, folder: str
) -> tuple[Entry, Dataset]:
    """Facts of an entry (arguments as of ``first_rows``), and its kept rows."""
    found = first_rows(cfg, split, index, limit, tokenizer, folder)
    entry, kept, mode = cfg[SPLITS[split]][index], found.kept, cfg["aot_mode"]
    resolved = resolved_entry(entry, cfg)
    kind = entry["type"] if resolved is None else resolved["strategy"]
    tokenized = not len(found.whole) or "prompt_ids" in found.whole.column_names
    prompts, shared_tokens, all_tokens = (
        _prompts(kept, mode) if tokenized else (Counter[int](), 0, 0)
    )
    facts = Entry(
        where=f"{SPLITS[split]}[{index}]",
        kind=kind if isinstance(kind, str) else "user-defined" if kind else "none",
        counts=found.counts,
        more=found.more,
        mixing=mixing(entry),
        levels=_levels(kept),
        weights=_weights(kept),
        lengths=_lengths(found.whole, cfg) if tokenized and len(found.whole) else None,
        prompts=prompts,
        shared_tokens=shared_tokens,
        all_tokens=all_tokens,
        images=has_images(kept),
        tokenized=tokenized,
    )
    return facts, kept


def _lengths(whole: Dataset, cfg: Any) -> Lengths:
    sequences = [_sequence_lengths(row, cfg["aot_mode"]) for row in whole]
    limit = int(cfg.sequence_len)
    return Lengths(
        tokens=[tokens for row in sequences for tokens in row],
        limit=limit,
        longer=sum(max(row) > limit for row in sequences),
        strategy=(cfg.excess_length_strategy or "drop").lower(),
    )


def _sequence_lengths(row: dict[str, Any], mode: str) -> list[int]:
    prompt, *completions = (len(row[name]) for name in ids_columns(mode))
    return [prompt + completion for completion in completions]


def _prompts(kept: Dataset, mode: str) -> tuple[Counter[int], int, int]:
    """Rows by prompt; tokens of prompts that a row has a second time; tokens in all."""
    rows, shared, whole = Counter[int](), 0, 0
    for row in kept:
        lengths = _sequence_lengths(row, mode)
        rows[hash(tuple(row["prompt_ids"]))] += 1
        shared += len(row["prompt_ids"]) * (len(lengths) - 1)
        whole += sum(lengths)
    return rows, shared, whole


def _levels(kept: Dataset) -> dict[float, int]:
    if LEVEL not in kept.column_names:
        return {}
    return {
        float(level): int(n)
        for level, n in zip(*np.unique(levels(kept), return_counts=True), strict=True)
    }


def _weights(kept: Dataset) -> tuple[float, float, float] | None:
    if WEIGHT not in kept.column_names or not len(kept):
        return None
    weights = np.array(kept[WEIGHT], dtype=np.float64)
    return float(weights.min()), float(weights.mean()), float(weights.max())


def failure_of(found: Sequence[tuple[Entry, Dataset]], cfg: Any) -> str | None:
    """Why a training would fail for its rows, if no others can change that."""
    for split, where in SPLITS.items():
        mine = [(entry, kept) for entry, kept in found if entry.counts.split == split]
        if not mine or any(entry.more for entry, _ in mine):
            continue
        if not any(len(kept) for _, kept in mine):
            return f"`{where}`: no rows are left; the table says why"
        if cfg["aot_mode"] == "unpaired" and split == "train":
            names = ("label", LEVEL)
            labelled = [
                kept.select_columns([n for n in names if n in kept.column_names] or ["prompt"])
                for _, kept in mine
                if len(kept)
            ]
            try:
                check_labels(concatenate_datasets(labelled), where)
            except ValueError as error:
                return str(error)
    return None


def shown(found: Sequence[tuple[Entry, Dataset]], cfg: Any, tokenizer: Any) -> list[Shown]:
    """Kept rows of all entries in turn, of each entry the first of every label before others."""
    queues = [(entry.where, _labels_first(kept)) for entry, kept in found]
    rows: list[Shown] = []
    while queues and len(rows) < SHOWN:
        where, queue = queues.pop(0)
        if (row := next(queue, None)) is not None:
            rows.append(Shown(where, _parts(row, cfg, tokenizer)))
            queues.append((where, queue))
    return rows


def _labels_first(kept: Dataset) -> Iterator[dict[str, Any]]:
    if "label" not in kept.column_names:
        yield from kept
        return
    labels = levels(kept)
    first = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)[::-1]]
    for number in (*first, *(n for n in range(len(kept)) if n not in first)):
        yield kept[number]


def _parts(row: dict[str, Any], cfg: Any, tokenizer: Any) -> list[Part]:
    mode = cfg["aot_mode"]
    names = COMPLETIONS[mode] if mode == "paired" else (label_in_words(row),)
    texts = [row["prompt"], *(row[name] for name in COMPLETIONS[mode])]
    if "prompt_ids" not in row:
        turns = zip(("prompt", *names), map(_turns, texts), strict=True)
        return [Part(name, text, None, trained=name != "prompt") for name, text in turns]
    prompt, *completions = (row[name] for name in ids_columns(mode))
    # What TRL's collators keep of a sequence.
    completions = [ids[: cfg.sequence_len - len(prompt)] for ids in completions]
    before = _decoded(prompt, tokenizer)
    parts = [Part("prompt", before, prompt, False)]
    for name, ids in zip(names, completions, strict=True):
        # Decoded after its prompt: some tokenizers take a blank from the beginning of a text.
        both = _decoded([*prompt, *ids], tokenizer)
        follows = both.startswith(before)
        text = both[len(before) :] if follows else _decoded(ids, tokenizer)
        parts.append(Part(name, text, ids, True))
    return parts


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _turns(turns: Sequence[dict[str, Any]]) -> str:
    """Turns of a row that is rendered later, as text."""
    return "\n".join(f"{turn['role']}: {_content(turn['content'])}" for turn in turns)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)
