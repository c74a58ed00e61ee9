"""The project's ``pluggy.PluginManager``, and lookup of registered objects by name."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from . import hookspecs

BUILTIN = "aot_plugin.builtin"
"""The module that our own entry point names."""


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The manager with every installed package of the entry-point group, including this one.

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
    # Not load_setuptools_entrypoints: if two packages have the same entry-point name, it loads one
    # and silently skips the other.
    for entry in entries:
        manager.register(entry.load(), name=_owner(entry))
    manager.check_pending()
    return manager


def _owner(entry: EntryPoint) -> str:
    """The name of a package in messages: that of its distribution, and its entry point."""
    return f"{entry.dist.name if entry.dist else entry.value} ({entry.name})"


def registered(hook: str) -> dict[str, Any]:
    """Everything that is registered under a hook ("aot_penalties", ...), by name.

    Raises:
        ValueError: if two packages register the same name, or a package does not return a mapping
            from names.
    """
    manager = plugin_manager()
    found: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for impl in getattr(manager.hook, hook).get_hookimpls():
        returned = impl.function()
        # A common mistake is a missing `return`.
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
    """The object that is registered under a name.

    Args:
        hook: "aot_penalties", "aot_losses" or "aot_prompt_strategies".
        key: the YAML key that holds the name, for messages.
        name: the name.

    Raises:
        ValueError: if the name is not registered; lists those that are.
    """
    found = registered(hook)
    if name not in found:
        raise ValueError(f"`{key}: {name}` is not known; write one of {', '.join(sorted(found))}")
    return found[name]
