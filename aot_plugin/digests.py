"""SHA-256 of files and of descriptions, by which what was made of them is found again."""

import hashlib
import json
from pathlib import Path
from typing import Any


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(description: Any) -> str:
    """SHA-256 of what JSON can hold, 64 hexadecimal digits; anything else counts as its text."""
    text = json.dumps(_plain(description), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """In an order that every process agrees on: that of a set differs from run to run, and keys of
    several types have none."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
