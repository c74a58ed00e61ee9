"""What a run's saved training arguments say, without executing the pickle that they are."""

from __future__ import annotations

import pickletools  # nosec B403
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ARGUMENTS = "training_args.bin"


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint folders, by step, the last one last."""
    found = [p for p in run.glob("checkpoint-*") if p.name.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def find_arguments(run: Path) -> tuple[Path | None, list[Path]]:
    """The training arguments of a saved model or of its latest checkpoint, and where they were
    looked for."""
    places = [place / ARGUMENTS for place in [run, *reversed(checkpoints(run))]]
    return next((place for place in places if place.is_file()), None), places


def start_adapter(run: Path) -> str | None:
    """The adapter that the training of ``run`` began with (`lora_model_dir`), the frozen copy of
    which was its reference; None if it was the base model, or if nothing says it."""
    found, _ = find_arguments(run)
    if found is None:
        return None
    items = saved_items(found)
    return next((str(value) for name, value in items if name == "aot_start_adapter"), None) or None


def saved_items(path: Path) -> Iterator[tuple[str, float | str]]:
    """Every string that a number or a string follows in the pickle of a file by torch.save.

    Its opcodes are read; nothing in it is executed.
    """
    with zipfile.ZipFile(path) as archive:
        [member] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        pickled = archive.read(member)
    memo: dict[int, Any] = {}
    name: str | None = None
    last: Any = None
    value: Any
    for opcode, value, _ in pickletools.genops(pickled):
        # Bookkeeping between a key and its value, or a string that stood there before.
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
