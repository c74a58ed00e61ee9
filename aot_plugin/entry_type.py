"""The ``type`` of a ``datasets:`` entry as the host sees it: mode and options in one name.

The host resolves a type only as "<module>.<function>" with one dot, so it names an attribute of
this package, which is made when it is asked for (``aot_plugin.__getattr__``). The name ends in a
digest of all that the entry says, since the host's cache of prepared datasets hashes the type. This
module stands outside ``data``, whose import is heavy: the host imports the package in every run.
"""

from collections.abc import Mapping
from typing import Any

from .digests import digest

MODES = ("paired", "unpaired")

RENDERING = 3
"""Raised with every change of the tokens that a row becomes: older prepared data is not reused."""


def encode(mode: str, resolved: Mapping[str, Any]) -> tuple[str, str]:
    """(type, key of the options in ``aot_datasets``) of an entry with these options."""
    key = digest([RENDERING, resolved])[:12]
    return f"{__package__}.{mode}_{key}", key


def decode(attribute: str) -> tuple[str, str] | None:
    """(mode, key) of an attribute's name; None if no type of ours is called so."""
    mode, _, key = attribute.partition("_")
    return (mode, key) if mode in MODES and key else None
