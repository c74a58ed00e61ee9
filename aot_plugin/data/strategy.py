"""Our prompt strategies as the host calls them."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset, Features, Sequence, Value

from ..hookspecs import hookimpl
from ..registry import plugin_manager, registered
from .options import parsed_options, plain
from .render import Renderer
from .rows import BUILTIN, Example, Outcome, PromptStrategy, Row, RowError
from .tokens import IDS, template_ids

FEATURES = Features(
    {"prompt": Value("string"), "completion": Value("string"), "label": Value("bool")}
    | {name: Sequence(Value("int32")) for name in IDS.values()}
)
"""A prepared row: what the host's KTO path expects, and our token ids."""


class _Builtin:
    @hookimpl
    def aot_prompt_strategies(self) -> Mapping[str, PromptStrategy]:
        return BUILTIN


def strategies() -> dict[str, PromptStrategy]:
    """All strategies by the name that a ``type:`` takes, ours and those of other packages.

    Raises:
        ValueError: if two packages register one name.
    """
    manager = plugin_manager()
    if not manager.has_plugin("aot_plugin prompt strategies"):
        manager.register(_Builtin(), name="aot_plugin prompt strategies")
    return registered("aot_prompt_strategies")


def strategy_factory(name: str) -> Callable[..., Any]:
    """The host's idea of a strategy, for a type that ``resolve_unpaired_datasets`` wrote.

    Args:
        name: ``unpaired_<key>``.

    Returns:
        ``factory(cfg, **kwargs) -> (transform, map_kwargs)``; the transform is batched, since one
        row may hold several responses, or none that can be used.
    """
    key = name.removeprefix("unpaired_")

    def factory(cfg: Mapping[str, Any], **_: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        resolved = cfg["aot_datasets"][key]
        return transform_for(cfg, resolved), {
            "batched": True,
            "remove_columns": "__all__",
            "features": FEATURES,
        }

    return factory


def transform_for(cfg: Mapping[str, Any], resolved: Mapping[str, Any]) -> Callable[..., Any]:
    """The batched map of one entry: columns of rows in, columns of rendered examples out."""
    template, resolved = template_config(cfg), plain(resolved)

    # The closure holds plain data only, so that `datasets` finds a cached map by its hash.
    def transform(batch: Mapping[str, list[Any]], tokenizer: Any) -> dict[str, list[Any]]:
        render = Renderer(template, parsed_options(resolved), tokenizer)
        examples = [o for o in outcomes(rows_of(batch), resolved) if isinstance(o, Example)]
        prompts, completions = zip(*map(render, examples), strict=True) if examples else ((), ())
        return {
            "prompt": list(prompts),
            "completion": list(completions),
            "label": [example.label for example in examples],
            **template_ids(prompts, completions, tokenizer),
        }

    return transform


def template_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the config that rendering depends on."""
    keys = ("chat_template", "chat_template_jinja", "chat_template_kwargs")
    return {key: plain(cfg.get(key)) for key in keys}


def arranged(dataset: Dataset, resolved: Mapping[str, Any]) -> Dataset:
    """The rows that an entry's strategy reads, of those that were loaded.

    Raises:
        ValueError: naming the dataset, if it can't be arranged.
    """
    arrange = strategies()[resolved["strategy"]].arrange
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
) -> Iterator[Outcome]:
    """What an entry's strategy makes of rows, in order.

    Args:
        numbers: the rows' numbers in their dataset, for messages.

    Raises:
        ValueError: naming dataset, row number if known, field, value and what is accepted.
    """
    strategy, options = strategies()[resolved["strategy"]], parsed_options(resolved)
    known = itertools.repeat(None) if numbers is None else numbers
    for number, row in zip(known, rows, strict=False):
        try:
            yield from strategy.examples(row, options)
        except RowError as error:
            at = "" if number is None else f", row {number}"
            raise ValueError(f"{resolved['source']['path']}{at}: {error}") from None
