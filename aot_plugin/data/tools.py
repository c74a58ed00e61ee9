"""Tools in pairs: the host's own paired types, with each row's tools given to the template."""

from collections.abc import Callable, Mapping
from typing import Any

from .options import plain
from .rows import Row, as_tools, without_nulls

TOOL_TYPES = ("chat_template.default", "chat_template.argilla_chat")
"""The host's paired types that render by a chat template, which may know tools."""


class _WithTools:
    """A tokenizer whose chat template is given one row's tools."""

    def __init__(self, tokenizer: Any, tools: list[dict[str, Any]]) -> None:
        self._tokenizer, self._tools = tokenizer, tools

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, turns: list[dict[str, Any]], **kwargs: Any) -> Any:
        turns = [{**without_nulls(turn), "content": turn["content"]} for turn in turns]
        return self._tokenizer.apply_chat_template(turns, tools=self._tools, **kwargs)


def paired_factory(name: str) -> Callable[..., Any]:
    """The host's idea of a strategy, for a paired entry with ``field_tools``.

    Args:
        name: ``paired_<key>``, as ``resolve_datasets`` wrote it.

    Returns:
        ``factory(cfg, dataset_idx, ...) -> (transform, map_kwargs)`` of the host's type.
    """
    key = name.removeprefix("paired_")

    def factory(cfg: Any, **kwargs: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        from axolotl.prompt_strategies.dpo import load

        resolved = plain(cfg["aot_datasets"][key])
        render, map_kwargs = load(resolved["strategy"], cfg, **kwargs)
        column = resolved["options"]["field_tools"]

        def transform(row: Row, tokenizer: Any) -> Mapping[str, Any]:
            tools = as_tools(row[column], column)
            return render(row, tokenizer=_WithTools(tokenizer, tools) if tools else tokenizer)

        return transform, map_kwargs

    return factory
