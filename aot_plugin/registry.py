"""The one ``pluggy.PluginManager`` of the project, and lookup by name in what is registered."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from . import hookspecs

BUILTIN = "aot_plugin.builtin"
"""Our own penalties, losses and prompt strategies: what our own entry point names."""


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The manager with every installed package of the entry-point group, this one among them.

    Raises:
        RuntimeError: if this project's own entry point is missing.
        pluggy.PluginValidationError: if a package implements a hook that does not exist.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    entries = entry_points(group=hookspecs.PROJECT_NAME)
    if not any(entry.value == BUILTIN for entry in entries):
        raise RuntimeError(
            "the installed aot-plugin is older than its source: install it again "
            "(in a clone: pip install --no-deps -e .)"
        )
    # Not load_setuptools_entrypoints: of two packages that chose the same entry-point name, it
    # loads one and skips the other in silence.
    for entry in entries:
        manager.register(entry.load(), name=_owner(entry))
    manager.check_pending()
    return manager


def _owner(entry: EntryPoint) -> str:
    """How messages name a package: what one would uninstall, and its entry point."""
    return f"{entry.dist.name if entry.dist else entry.value} ({entry.name})"


def registered(hook: str) -> dict[str, Any]:
    """All that is registered under a hook ("aot_penalties", ...), by name.

    Raises:
        ValueError: if two packages register one name, or one returns no mapping from names.
    """
    manager = plugin_manager()
    found: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for impl in getattr(manager.hook, hook).get_hookimpls():
        returned = impl.function()
        # The usual slip is a forgotten `return`.
        if not isinstance(returned, Mapping) or not all(isinstance(n, str) for n in returned):
            raise ValueError(
                f"{hook} of {impl.plugin_name!r} returned {returned!r}; it must return a mapping "
                "from names to what they stand for"
            )
        for name, value in returned.items():
            if name in found:
                raise ValueError(
                    f"{hook}: {name!r} is registered by {owner[name]!r} and by "
                    f"{impl.plugin_name!r}; uninstall one of them or rename it there"
                )
            found[name], owner[name] = value, impl.plugin_name
    return found


def lookup(hook: str, key: str, name: str) -> Any:
    """What is registered as ``name``; ``key`` is the YAML key that names it.

    Raises:
        ValueError: if nothing is, with the names that are.
    """
    found = registered(hook)
    if name not in found:
        raise ValueError(f"`{key}: {name}` is not known; write one of {', '.join(sorted(found))}")
    return found[name]
