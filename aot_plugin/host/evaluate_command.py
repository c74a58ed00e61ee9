"""The rows of `axolotl evaluate`, which asks no plugin for them."""

import sys
from collections.abc import Callable
from typing import Any

COMMAND = ("axolotl.cli.evaluate", "__main__")
"""Where the command may be: imported by `axolotl`, or run by itself."""


def load_rows_by(load: Callable[[Any], Any]) -> None:
    """Has the command load its rows by ``load``, if it is the one that runs.

    The host's own loading would take prepared rows whose files have changed for current ones, and
    ignore what it doesn't read under RL (``weight``, ``shards``, ``field_weight``, a number of
    rows in ``val_set_size``).

    Args:
        load: takes a validated config; returns what the host's ``load_preference_datasets`` does,
            or None to leave it to that.
    """
    for name in COMMAND:
        module: Any = sys.modules.get(name)
        if hasattr(module, "do_evaluate"):
            original = module.load_preference_datasets
            original = getattr(original, "replaces", original)
            module.load_preference_datasets = _first_by(load, original)


def _first_by(load: Callable[[Any], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def load_preference_datasets(*, cfg: Any, cli_args: Any = None) -> Any:
        return load(cfg) or original(cfg=cfg, cli_args=cli_args)

    load_preference_datasets.replaces = original  # type: ignore[attr-defined]
    return load_preference_datasets
