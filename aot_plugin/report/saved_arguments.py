"""Reads a run's saved training arguments without executing their pickle."""

from __future__ import annotations

import pickletools  # nosec B403
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..digests import file_digest

ARGUMENTS = "training_args.bin"


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint folders in the order of their steps."""
    found = [p for p in run.glob("checkpoint-*") if p.name.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def find_arguments(run: Path) -> tuple[Path | None, list[Path]]:
    """Finds the training arguments of a saved model, or else of its latest checkpoint with some.

    Returns:
        Their path (None if there are none), and the paths that were considered.
    """
    places = [place / ARGUMENTS for place in [run, *reversed(checkpoints(run))]]
    return next((place for place in places if place.is_file()), None), places


def start_adapter(run: Path) -> str | None:
    """The adapter from which the training of ``run`` started (``lora_model_dir``).

    A frozen copy of it was the reference.

    Returns:
        Its path or name; None if the reference was the base model, or if it is not known.
    """
    return _saved(run, "aot_start_adapter")


def start_digest(run: Path) -> str | None:
    """``weights_digest`` of that adapter at the start of training; None if it is not known."""
    return _saved(run, "aot_start_digest")


def check_start(run: Path, adapter: str) -> None:
    """Checks that an adapter has the weights with which the training of ``run`` started.

    Raises:
        ValueError: if the weights are known to differ. Paths do not matter.
    """
    before, now = start_digest(run), weights_digest(Path(adapter))
    if before and now and before != now:
        raise ValueError(
            f"the training of {run} began with the adapter {start_adapter(run)}, which is its "
            f"reference, and the weights in {adapter} are others than it had; a copy of it as it "
            "was is needed"
        )


def weights_digest(adapter: Path) -> str:
    """SHA-256 of an adapter's weights; "" if they are not in a local folder (but on the hub)."""
    paths = [adapter / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    path = next((path for path in paths if path.is_file()), None)
    return "" if path is None else file_digest(path)


def _saved(run: Path, wanted: str) -> str | None:
    found, _ = find_arguments(run)
    if found is None:
        return None
    return next((str(v) for name, v in saved_items(found) if name == wanted), None) or None


def saved_items(path: Path) -> Iterator[tuple[str, float | str]]:
    """Yields names and values from the pickle in a file written by ``torch.save``.

    The opcodes are read; nothing is executed.

    Yields:
        Every string that is followed by a number or a string, and that number or string.
    """
    with zipfile.ZipFile(path) as archive:
        [member] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        pickled = archive.read(member)
    memo: dict[int, Any] = {}
    name: str | None = None
    last: Any = None
    value: Any
    for opcode, value, _ in pickletools.genops(pickled):
        # Between a key and its value there may be opcodes for the memo, which hold no value; either
        # may also be a reference to an earlier string.
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = last
            continue
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = last
            continue
        if "BINGET" in opcode.name:
            value = memo.get(value)
        elif "UNICODE" not in opcode.name and opcode.name not in (
            "BINFLOAT",
            "BININT",
            "BININT1",
            "BININT2",
        ):
            value = None
        if name is not None and value is not None:
            yield name, value
        last = value
        name = value if isinstance(value, str) else None
