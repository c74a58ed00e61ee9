"""AOT (Alignment via Optimal Transport, arXiv 2406.05882) for Axolotl: ``rl: aot`` in the YAML.

The host imports this module in every run, whatever its ``rl``, if the package is installed. So the
module is light; everything else is imported on use.
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
