"""AOT (Alignment via Optimal Transport, arXiv 2406.05882) for Axolotl: ``rl: aot`` in the YAML.

This module is imported in every run of everyone who has the package installed, so it stays light;
all else is imported when it is used.
"""

from typing import Any

__all__ = ["AOTPlugin"]


def __getattr__(name: str) -> Any:
    if name == "AOTPlugin":
        from .plugin import AOTPlugin

        return AOTPlugin
    if name.startswith(("paired_", "unpaired_")):
        # The host resolves a data set's `type:` only as "<module>.<function>" with one dot, so
        # the strategies of `aot_plugin.data` answer as attributes of the package itself.
        from .data import strategy_factory

        return strategy_factory(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
