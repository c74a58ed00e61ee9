"""Our prompt strategies in the form in which the host calls them."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from ..registry import registered
from .labels import Drop
from .levels import LEVEL
from .options import ConversationOptions, plain
from .render import Renderer
from .rows import PAIRED, Example, Outcome, PromptStrategy, Row, RowError
from .tokens import COMPLETIONS, features, ids_columns, token_ids
from .weights import WEIGHT, parse_weight

Rendered = tuple[Any, ...]
"""A prepared row without its token ids: prompt, completions, if unpaired the label and, if the
entry has ``field_weight``, the weight."""


def strategies(mode: str = "unpaired") -> Mapping[str, PromptStrategy]:
    """All strategies of a mode, by the name in ``type:``.

    For unpaired rows these are ours and those of other packages; for pairs they stand in for the
    host's types that render with a chat template.

    Raises:
        ValueError: if two packages register one name.
    """
    if mode == "paired":
        return PAIRED
    return registered("aot_prompt_strategies")


def strategy_factory(mode: str, key: str) -> Callable[..., Any]:
    """A strategy as the host expects it, for a type that ``resolve_datasets`` wrote.

    Args:
        mode, key: decoded from the type (``entry_type``).

    Returns:
        ``factory(cfg, **kwargs) -> (transform, map_kwargs)``. The transform is batched, since a row
        may hold several usable responses, or none.
    """

    def factory(cfg: Mapping[str, Any], **_: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        resolved = cfg["aot_datasets"][key]
        options = parsed_options(resolved)
        return transform_for(cfg, resolved), {
            "batched": True,
            "remove_columns": "__all__",
            "features": features(mode, options.field_weight is not None, is_graded(options)),
        }

    return factory


def transform_for(cfg: Mapping[str, Any], resolved: Mapping[str, Any]) -> Callable[..., Any]:
    """The batched map of one entry: columns of rows in, columns of rendered examples out."""
    template, resolved = template_config(cfg), plain(resolved)
    mode = mode_of(resolved)

    # The closure holds plain data only, so that `datasets` finds a cached map by its hash.
    def transform(batch: Mapping[str, list[Any]], tokenizer: Any) -> dict[str, list[Any]]:
        options = parsed_options(resolved)
        render = Renderer(template, options, tokenizer)
        made = rendered(rows_of(batch), resolved, render)
        kept = [found for _, found in made if not isinstance(found, Drop)]
        ids = ids_of(kept, mode, tokenizer)
        if mode == "paired":
            different = [chosen != rejected for _, chosen, rejected in ids]
            kept = list(itertools.compress(kept, different))
            ids = list(itertools.compress(ids, different))
        return columns_of(kept, mode, options) | {
            name: [row[i] for row in ids] for i, name in enumerate(ids_columns(mode).values())
        }

    return transform


def columns_of(
    kept: Sequence[Rendered], mode: str, options: ConversationOptions
) -> dict[str, list[Any]]:
    """Prepared rows as columns: prompt, completions, if unpaired the label, and if the entry has
    them weight and level."""
    names = ["prompt", *COMPLETIONS[mode], *(["label"] if mode == "unpaired" else [])]
    names += [WEIGHT] if options.field_weight else []
    columns = {name: [row[i] for row in kept] for i, name in enumerate(names)}
    if is_graded(options):
        columns[LEVEL] = [float(label) for label in columns["label"]]
        columns["label"] = [level == 1 for level in columns[LEVEL]]
    return columns


def is_graded(options: ConversationOptions) -> bool:
    """Whether an entry divides its ratings into levels."""
    return getattr(options, "grades", None) is not None


def mode_of(resolved: Mapping[str, Any]) -> str:
    """The mode of a value of ``aot_datasets``: ``paired`` or ``unpaired``."""
    return resolved.get("mode") or "unpaired"


def parsed_options(resolved: Mapping[str, Any]) -> ConversationOptions:
    """The options object of a value of ``aot_datasets``."""
    strategy = strategies(mode_of(resolved))[resolved["strategy"]]
    return strategy.options(**plain(resolved["options"]))


def template_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the config that rendering depends on."""
    keys = ("chat_template", "chat_template_jinja", "chat_template_kwargs")
    return {key: plain(cfg.get(key)) for key in keys}


def arranged(dataset: Dataset, resolved: Mapping[str, Any]) -> Dataset:
    """The rows that an entry's strategy reads, made from those that were loaded.

    Raises:
        ValueError: if the strategy can't arrange them; names the dataset.
    """
    arrange = strategies(mode_of(resolved))[resolved["strategy"]].arrange
    if arrange is None:
        return dataset
    try:
        return arrange(dataset, parsed_options(resolved))
    except ValueError as error:
        raise ValueError(f"{resolved['source']['path']}: {error}") from None


def rows_of(batch: Mapping[str, list[Any]]) -> Iterator[Row]:
    """The rows of a batch of columns."""
    names = list(batch)
    for values in zip(*(batch[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def outcomes(
    rows: Iterable[Row], resolved: Mapping[str, Any], numbers: Iterable[int] | None = None
) -> Iterator[tuple[int | None, list[Outcome]]]:
    """Applies an entry's strategy to rows. All responses of a row have the row's weight.

    Args:
        rows: rows of the dataset.
        resolved: the entry's value in ``aot_datasets``.
        numbers: the rows' numbers in their dataset, for messages.

    Yields:
        The number (None if not known) and the outcomes of each row, in order.

    Raises:
        ValueError: if a row can't be read; names dataset, row number if known, field, value and
            what is accepted.
    """
    strategy = strategies(mode_of(resolved))[resolved["strategy"]]
    options = parsed_options(resolved)
    known = itertools.repeat(None) if numbers is None else numbers
    for number, row in zip(known, rows, strict=False):
        with _naming(resolved, number):
            found = list(strategy.examples(row, options))
            if not is_graded(options):
                _refuse_levels(found)
            if not options.field_weight:
                _refuse_weights(found)
            else:
                weight = parse_weight(row, options.field_weight)
                found = [_with_weight(outcome, weight) for outcome in found]
        yield number, found


def _refuse_weights(found: list[Outcome]) -> None:
    if any(isinstance(outcome, Example) and outcome.weight != 1 for outcome in found):
        raise RowError(
            "its strategy gives an example a weight of its own; weights come from a column of the "
            "rows, which `field_weight` names"
        )


def _refuse_levels(found: list[Outcome]) -> None:
    # As a label, a level would become true.
    levels = [o.label for o in found if isinstance(o, Example) and o.label not in (False, True)]
    if levels:
        raise RowError(f"its strategy gives the level {levels[0]:g}, and its entry has no `grades`")


def _with_weight(outcome: Outcome, weight: float) -> Outcome:
    if isinstance(outcome, Drop):
        return outcome
    return replace(outcome, weight=weight) if weight else Drop.WEIGHTLESS


def rendered(
    rows: Iterable[Row],
    resolved: Mapping[str, Any],
    render: Callable[[Example], tuple[Any, Any]],
    numbers: Iterable[int] | None = None,
) -> Iterator[tuple[int | None, Rendered | Drop]]:
    """Applies an entry's strategy and its chat template to rows.

    Args:
        rows, resolved, numbers: as in ``outcomes``.
        render: renders the examples.

    Yields:
        The row's number, and the prepared row or the reason for dropping it: one for each response
        (unpaired) or each row (paired), in order.

    Raises:
        ValueError: as ``outcomes``; also if a row can't be rendered.
    """
    paired = mode_of(resolved) == "paired"
    weighted = parsed_options(resolved).field_weight is not None
    for number, found in outcomes(rows, resolved, numbers):
        with _naming(resolved, number):
            for outcome in [_pair(found)] if paired else found:
                if isinstance(outcome, Drop):
                    yield number, outcome
                elif isinstance(outcome, Example):
                    row: Rendered = (*render(outcome), outcome.label)
                    yield number, (*row, outcome.weight) if weighted else row
                else:
                    (prompt, chosen), (_, rejected) = map(render, outcome)
                    row = (prompt, chosen, rejected)
                    yield number, (*row, outcome[0].weight) if weighted else row


@contextlib.contextmanager
def _naming(resolved: Mapping[str, Any], number: int | None) -> Iterator[None]:
    try:
        yield
    except RowError as error:
        at = "" if number is None else f", row {number}"
        raise ValueError(f"{resolved['source']['path']}{at}: {error}") from None


def ids_of(kept: Sequence[Rendered], mode: str, tokenizer: Any) -> list[list[list[int]]]:
    """``token_ids`` for rendered rows."""
    count = len(COMPLETIONS[mode])
    return token_ids([row[0] for row in kept], [row[1 : 1 + count] for row in kept], tokenizer)


def _pair(outcomes: list[Outcome]) -> tuple[Example, Example] | Drop:
    """The chosen and the rejected example of a row, which need the same prompt."""
    chosen, rejected = outcomes
    if isinstance(chosen, Drop) or isinstance(rejected, Drop):
        return chosen if isinstance(chosen, Drop) else rejected  # type: ignore[return-value]
    if replace(rejected, completion=chosen.completion, label=chosen.label) != chosen:
        return Drop.OTHER_PROMPT
    return chosen, rejected
