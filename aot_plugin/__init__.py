"""AOT (Alignment via Optimal Transport, arXiv 2406.05882) for Axolotl: ``rl: aot`` in the YAML.

This module is imported in every run of everyone who has the package installed, so it stays light;
all else is imported when it is used.
"""

from typing import Any

from . import entry_type

__all__ = ["AOTPlugin"]


def __getattr__(name: str) -> Any:
    if name == "AOTPlugin":
        from .plugin import AOTPlugin

        return AOTPlugin
    if entry := entry_type.decode(name):
        from .data import strategy_factory

        return strategy_factory(*entry)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
