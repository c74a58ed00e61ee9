"""Files that are whole or not there."""

import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary file of the same folder, then renames it to ``path``.

    The folder is created if needed. A reader, and the next run after one that was killed, see the
    old content or the new one. If ``write`` raises an error, ``path`` is unchanged and no file is
    left over. A symbolic link stays one.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's number: containers that share a folder have the same ones.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
