"""Counts of kept and dropped rows, and the check that both labels are left.

The host's map may run in several processes, or not at all if a cache holds its result. So rows are
counted in a separate pass, in one process, over the raw rows of an entry; it reads and renders them
as the strategy does. The pass runs before the host's own loading, so that users see its error
messages, which contain the row's number.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from .images import read
from .json_columns import mixed_columns
from .labels import Drop
from .levels import LEVEL, levels
from .options import columns_named, plain, thresholds
from .render import Renderer
from .strategy import Rendered, mode_of, parsed_options, rendered, rows_of, template_config
from .tokens import same_ids

BATCH = 1000
SENTENCEPIECE_PREFIX = 1
"""A SentencePiece tokenizer may produce one token more than the text has bytes."""


FAULTS = {
    Drop.EMPTY: "there is no prompt, or no response",
    Drop.UNASKED: "an answer follows another one",
    Drop.IDENTICAL: "chosen and rejected are the same",
    Drop.OTHER_PROMPT: "chosen and rejected answer different prompts; `aot_mode: unpaired` with "
    "`type: chat_template.paired` takes them as two rows",
}
"""Reasons that point to a fault in the row, with their explanation in the log."""

NAMED = 5
"""Number of rows that the log names for each kind of fault."""


@dataclass
class RowCounts:
    """Counts of one ``datasets:`` entry. Every response (paired: every row) is kept or dropped.

    Attributes:
        source: the entry's path.
        split: "train" or "test".
        rows: number of rows in the dataset.
        taken: number of rows after ``weight`` and ``shards``; None if neither applies.
        counted: False for entries with one of the host's own types, of whose rows only those of
            weight 0 are counted.
        pairs: kept pairs; None in an unpaired run.
        positive, negative: kept responses by label; 0 in a paired run.
        middle: kept responses of levels between the lowest and the highest.
        dropped: number of dropped responses (paired: rows) by reason.
        named: numbers of the first rows with each fault.
        unrendered: as of the ``Renderer``.
        mixed: columns whose values are of several types.
        thresholds: those that turn ratings into labels or levels; empty where labels are given.
    """

    source: str
    split: str
    rows: int = 0
    taken: int | None = None
    counted: bool = True
    pairs: int | None = None
    positive: int = 0
    negative: int = 0
    middle: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[int]] = field(default_factory=dict)
    unrendered: dict[str, int] = field(default_factory=dict)
    mixed: list[str] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)

    @property
    def responses(self) -> int:
        return self.positive + self.negative + self.middle + sum(self.dropped.values())

    def warnings(self) -> Iterator[str]:
        """Log messages on faulty rows and on content that is not rendered."""
        for fault, why in FAULTS.items():
            if count := self.dropped.get(fault.value, 0):
                numbers = ", ".join(map(str, self.named.get(fault.value, [])))
                more = "" if count <= NAMED else ", ..."
                which = f"{fault.value} (row {numbers}{more})"
                yield f"{self.source}: {count} dropped as {which}: {why}"
        for what, count in self.unrendered.items():
            yield f"{self.source}: {what} in {count} answers"
        for name in self.mixed:
            yield (
                f"{self.source}: `{name}` holds values of several types, where `datasets` reads "
                "text that is JSON by itself (`12`, `null`, a text in quotes) as what it "
                "describes; write all of its values in one form"
            )
        kept = self.positive + self.negative + self.middle
        if self.thresholds and kept in (self.positive, self.negative) and kept:
            level = "highest" if self.positive else "lowest"
            yield (
                f"{self.source}: all {kept} responses are of the {level} level by the thresholds "
                f"{', '.join(f'{at:g}' for at in self.thresholds)}; are its ratings on another "
                "scale? An entry may have thresholds of its own (`grades`, or `positive_min` and "
                "`negative_max`)"
            )


def count_rows(
    dataset: Dataset,
    resolved: Mapping[str, Any],
    counts: RowCounts,
    cfg: Mapping[str, Any],
    tokenizer: Any,
    seen: set[int] | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
    images: Sequence[int] | None = None,
) -> RowCounts:
    """Counts the kept and dropped rows of an entry.

    Args:
        dataset: the entry's rows.
        resolved: the entry's value in ``aot_datasets``.
        counts: updated in place.
        cfg: the run's config.
        tokenizer: the run's tokenizer.
        seen: hashes of the examples counted so far, updated; None if duplicates are kept.
        numbers: the rows' numbers in their file, for messages; default 0, 1, 2, ...
        images: the rows' numbers of images; None for text. Rows with images are not judged by their
            length, and duplicates are kept.

    Returns:
        ``counts``.

    Raises:
        ValueError: if a row can't be read; contains its number.
    """
    resolved = plain(resolved)
    paired = mode_of(resolved) == "paired"
    options = parsed_options(resolved)
    render = Renderer(template_config(cfg), options, tokenizer)
    counts.thresholds = thresholds(options)
    content = options.message_property_mappings["content"]
    columns = columns_named(options, dataset.column_names)
    counts.mixed = [name for name in mixed_columns(dataset, content) if name in columns]
    dropped: Counter[str] = Counter()
    numbers = range(len(dataset)) if numbers is None else numbers
    counts.pairs = 0 if paired else None
    description = f"Checking {counts.source}"
    # Closed also by an error, whose message would follow the bar on its line.
    with tqdm(total=len(dataset), desc=description, unit=" rows", leave=False) as bar:
        for start in range(0, len(dataset), BATCH):
            window = slice(start, start + BATCH)
            if images is not None:
                part = dataset.select(range(*window.indices(len(dataset))))
                found = list(read(part, resolved, numbers[window], images[window]))
            else:
                found = list(rendered(rows_of(dataset[window]), resolved, render, numbers[window]))
                if paired:
                    found = list(_without_identical(found, tokenizer))
            for number, row in found:
                outcome = row
                if images is None and not isinstance(row, Drop):
                    outcome = _judged(row, paired, cfg, tokenizer, seen)
                if isinstance(outcome, Drop):
                    dropped[outcome.value] += 1
                    named = counts.named.setdefault(outcome.value, []) if outcome in FAULTS else []
                    if number is not None and len(named) < NAMED:
                        named.append(int(number))
                elif paired:
                    counts.pairs = (counts.pairs or 0) + 1
                elif row[2] == 1:
                    counts.positive += 1
                elif row[2] == 0:
                    counts.negative += 1
                else:
                    counts.middle += 1
            bar.update(min(BATCH, len(dataset) - start))
    counts.dropped = {drop.value: dropped[drop.value] for drop in Drop if dropped[drop.value]}
    counts.unrendered = dict(render.unrendered)
    return counts


def _without_identical(
    found: Sequence[tuple[int | None, Rendered | Drop]], tokenizer: Any
) -> Iterator[tuple[int | None, Rendered | Drop]]:
    """Drops pairs whose responses have the same token ids: they express no preference."""
    same = iter(same_ids([row[1:3] for _, row in found if not isinstance(row, Drop)], tokenizer))
    for number, row in found:
        identical = not isinstance(row, Drop) and next(same)
        yield number, Drop.IDENTICAL if identical else row


def _judged(
    row: Rendered, paired: bool, cfg: Mapping[str, Any], tokenizer: Any, seen: set[int] | None
) -> Drop | None:
    prompt, *completions = row[:3] if paired else row[:2]
    if not cfg.get("skip_prepare_dataset") and any(
        _too_long((prompt, completion), cfg, tokenizer) for completion in completions
    ):
        return Drop.TOO_LONG
    if seen is not None:
        key = hash(row)
        if key in seen:
            return Drop.DUPLICATE
        seen.add(key)
    return None


def _too_long(texts: tuple[str, str], cfg: Mapping[str, Any], tokenizer: Any) -> bool:
    # The host's own rule: prompt and completion are tokenized separately, and with
    # `excess_length_strategy: truncate` a row is lost only if its prompt leaves no room.
    limit = cfg["sequence_len"]
    # A token covers at least one byte, so most rows need no tokenizer.
    if sum(len(text.encode()) + SENTENCEPIECE_PREFIX for text in texts) <= limit:
        return False
    prompt, completion = (
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
    )
    if (cfg.get("excess_length_strategy") or "drop").lower() == "truncate":
        return prompt >= limit
    return prompt + completion > limit


def table(counts: Iterable[RowCounts]) -> str:
    """Formats the counts as aligned text, one line per entry."""
    counts = list(counts)
    reasons = [drop.value for drop in Drop if any(drop.value in c.dropped for c in counts)]
    mixed = any(c.taken is not None for c in counts)
    judged = any(c.counted for c in counts)
    paired = any(c.pairs is not None for c in counts)
    graded = any(c.middle for c in counts)
    kept = ["responses", "positive", *["middle"] * graded, "negative"]
    kept = (["pairs"] if paired else kept) * judged
    lines = [["dataset", "split", "rows", *["taken"] * mixed, *kept, *reasons]]
    for c in counts:
        taken = [str(c.rows if c.taken is None else c.taken)]
        labelled = [c.responses, c.positive, *[c.middle] * graded, c.negative]
        numbers = [c.pairs] if paired else labelled
        cells = [str(n) if c.counted else "-" for n in numbers] * judged
        cells += [str(c.dropped.get(r, 0)) if c.counted or r in c.dropped else "-" for r in reasons]
        lines.append([c.source, c.split, str(c.rows), *taken * mixed, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def check_labels(dataset: Dataset, name: str = "datasets") -> str:
    """Counts the rows of a prepared dataset by label or, if they are graded, by level.

    Args:
        dataset: the prepared rows.
        name: the config key of the dataset, for messages.

    Returns:
        The counts in words.

    Raises:
        ValueError: if all rows have one label, since there would be nothing to compare with; or if
            the label column is missing or holds anything but true/false (the host's own
            strategies copy it unchecked).
    """
    if "label" not in dataset.column_names:
        raise ValueError(
            f"`{name}`: `aot_mode: unpaired` needs a `label` column after preparation; there are "
            f"{', '.join(dataset.column_names)}"
        )
    found: Counter[Any] = Counter()
    for batch in dataset.select_columns("label").iter(BATCH):
        found.update(batch["label"])
    strange = next((label for label in found if label not in (0, 1)), None)
    if strange is not None or None in found:
        raise ValueError(
            f"`{name}`: {strange!r} in the column `label` is neither true nor false; "
            "`type: chat_template.default` reads other labels and ratings"
        )
    if LEVEL in dataset.column_names:
        present, counts = np.unique(levels(dataset), return_counts=True)
        if len(present) == 1:
            raise ValueError(
                f"`{name}`: all {len(dataset)} rows are of level {present[0]:.2g}; there is "
                "nothing to compare them with. Check the label field and `grades`"
            )
        by_level = zip(present, counts, strict=True)
        return "rows by level: " + ", ".join(f"{count} of {at:.2g}" for at, count in by_level)
    positive, negative = found[True], found[False]
    if not positive or not negative:
        only = "positive" if positive else "negative"
        raise ValueError(
            f"`{name}`: all {positive + negative} rows are {only}; `aot_mode: unpaired` compares "
            "positive rows with negative ones. Check the label field and the thresholds of the "
            "entries"
        )
    return f"{positive} positive and {negative} negative rows"
