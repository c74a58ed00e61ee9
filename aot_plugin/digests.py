"""SHA-256 of files and of descriptions, which identify what was computed from them."""

import hashlib
import json
from pathlib import Path
from typing import Any


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(description: Any) -> str:
    """SHA-256 of a JSON value, 64 hexadecimal digits; other objects are converted to text."""
    text = json.dumps(_plain(description), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Converts a value to one whose JSON is the same in every process.

    The order of a set differs from run to run, and keys of different types can't be sorted.
    """
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
