"""The ``type`` of a ``datasets:`` entry as the host sees it: mode and options in one name.

The host resolves a type only as "<module>.<function>" with one dot. So the type names an attribute
of this package, which is created on access (``aot_plugin.__getattr__``). The name ends in a digest
of the whole entry, since the host's cache of prepared datasets hashes the type. This module is not
in ``data``, whose import is heavy: the host imports it in every run.
"""

from collections.abc import Mapping
from typing import Any

from .digests import digest

MODES = ("paired", "unpaired")

RENDERING = 3
"""Incremented when the tokens of a row change, so that older prepared data is not reused."""


def encode(mode: str, resolved: Mapping[str, Any]) -> tuple[str, str]:
    """The type of an entry, and the key of its options in ``aot_datasets``.

    Args:
        mode: one of ``MODES``.
        resolved: the entry's value in ``aot_datasets``.
    """
    key = digest([RENDERING, resolved])[:12]
    return f"{__package__}.{mode}_{key}", key


def decode(attribute: str) -> tuple[str, str] | None:
    """(mode, key) from the name of an attribute; None if it is not one of our types."""
    mode, _, key = attribute.partition("_")
    return (mode, key) if mode in MODES and key else None
