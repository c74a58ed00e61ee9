"""What became of every row, and the check that both labels are left.

The host's map may run in several processes, or not at all when a cache has its result, so rows are
counted by a pass of their own, on one process, over the raw rows of an entry: it reads and renders
them as the strategy does. It comes before the host's own loading, and so its messages, which know
the row's number, are the ones that a user sees.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from .labels import Drop
from .options import parsed_options, plain
from .render import Renderer
from .rows import Example
from .strategy import outcomes, rows_of, template_config

BATCH = 1000
SENTENCEPIECE_PREFIX = 1
"""A SentencePiece tokenizer may put one token more than it reads bytes."""


@dataclass
class RowCounts:
    """Counts of one ``datasets:`` entry. Every response is positive, negative or dropped.

    ``taken`` is the number of rows that ``weight`` and ``shards`` leave of ``rows``, or make of
    them; None without the two.
    """

    source: str
    split: str
    rows: int = 0
    taken: int | None = None
    counted: bool = True
    positive: int = 0
    negative: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def responses(self) -> int:
        return self.positive + self.negative + sum(self.dropped.values())


def count_rows(
    dataset: Dataset,
    resolved: Mapping[str, Any],
    counts: RowCounts,
    cfg: Mapping[str, Any],
    tokenizer: Any,
    seen: set[int] | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
) -> RowCounts:
    """Add to ``counts`` what an entry's rows come to.

    Args:
        resolved: the entry's value of ``aot_datasets``.
        seen: hashes of the examples that were counted before, if the run removes duplicates.
        numbers: the rows' numbers in their file, for messages; default 0, 1, 2, ...

    Raises:
        ValueError: for a row that can't be read, with its number.
    """
    resolved = plain(resolved)
    render = Renderer(template_config(cfg), parsed_options(resolved), tokenizer)
    dropped: Counter[str] = Counter()
    numbers = range(len(dataset)) if numbers is None else numbers
    for start in range(0, len(dataset), BATCH):
        batch = rows_of(dataset[start : start + BATCH])
        for outcome in outcomes(batch, resolved, numbers[start : start + BATCH]):
            fate = (
                _after_rendering(render(outcome), outcome.label, cfg, tokenizer, seen)
                if isinstance(outcome, Example)
                else outcome
            )
            if isinstance(fate, Drop):
                dropped[fate.value] += 1
            elif fate:
                counts.positive += 1
            else:
                counts.negative += 1
    counts.dropped = {drop.value: dropped[drop.value] for drop in Drop if dropped[drop.value]}
    return counts


def _after_rendering(
    texts: tuple[str, str],
    label: bool,
    cfg: Mapping[str, Any],
    tokenizer: Any,
    seen: set[int] | None,
) -> bool | Drop:
    if not cfg.get("skip_prepare_dataset") and _too_long(texts, cfg, tokenizer):
        return Drop.TOO_LONG
    if seen is not None:
        key = hash((*texts, label))
        if key in seen:
            return Drop.DUPLICATE
        seen.add(key)
    return label


def _too_long(texts: tuple[str, str], cfg: Mapping[str, Any], tokenizer: Any) -> bool:
    # The host's own rule: prompt and completion tokenized apart, and with
    # `excess_length_strategy: truncate` a row is lost only if its prompt leaves no room.
    limit = cfg["sequence_len"]
    # No token covers less than a byte, so most rows need no tokenizer.
    if sum(len(text.encode()) + SENTENCEPIECE_PREFIX for text in texts) <= limit:
        return False
    prompt, completion = (
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
    )
    if (cfg.get("excess_length_strategy") or "drop").lower() == "truncate":
        return prompt >= limit
    return prompt + completion > limit


def table(counts: Iterable[RowCounts]) -> str:
    """The counts as aligned text, one line per entry."""
    counts = list(counts)
    reasons = [drop.value for drop in Drop if any(drop.value in c.dropped for c in counts)]
    mixed = any(c.taken is not None for c in counts)
    judged = any(c.counted for c in counts)
    lines = [["dataset", "split", "rows"]]
    lines[0] += ["taken"] * mixed + ["responses", "positive", "negative", *reasons] * judged
    for c in counts:
        taken = [str(c.rows if c.taken is None else c.taken)]
        numbers = [c.responses, c.positive, c.negative, *(c.dropped.get(r, 0) for r in reasons)]
        cells = [str(n) if c.counted else "-" for n in numbers]
        lines.append([c.source, c.split, str(c.rows), *taken * mixed, *cells * judged])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def check_labels(dataset: Dataset, name: str = "datasets") -> tuple[int, int]:
    """The numbers of positive and negative rows of a prepared dataset.

    Raises:
        ValueError: if one of the labels is absent: there would be nothing to compare with; or if
            the label column is missing or holds something else than true/false (the host's own
            strategies take it over as it is).
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
    positive, negative = found[True], found[False]
    if not positive or not negative:
        only = "positive" if positive else "negative"
        raise ValueError(
            f"`{name}`: all {positive + negative} rows are {only}; `aot_mode: unpaired` compares "
            "positive rows with negative ones. Check the label field and the thresholds of the "
            "entries"
        )
    return positive, negative
