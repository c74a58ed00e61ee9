"""Sends plots and tables to the experiment loggers of a run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)


def log_figure_to_loggers(
    path: str | os.PathLike[str],
    step: int,
    report_to: Iterable[str],
    callbacks: Iterable[Any] = (),
) -> list[str]:
    """Sends a plot to those loggers that have an active run.

    No logger's library is imported here, and no run is started. The image appears as
    "aot/<file name without its step>". If a logger fails, a warning is logged; nothing is raised.

    Args:
        path: the PNG file.
        step: the optimizer step.
        report_to: names as in the training arguments. "tensorboard", "wandb", "mlflow" and
            "trackio" accept images; others are skipped.
        callbacks: the trainer's (``trainer.callback_handler.callbacks``). TensorBoard's writer is
            found there; the runs of the other loggers are found through their modules.

    Returns:
        The names of the loggers that accepted the image.
    """
    path, callbacks = Path(path), list(callbacks)
    key = _key(path)
    return _sent(path.name, report_to, _FIGURES, lambda send: send(path, key, step, callbacks))


def log_table_to_loggers(
    columns: Mapping[str, list[Any]],
    path: str | os.PathLike[str],
    step: int,
    report_to: Iterable[str],
) -> list[str]:
    """Sends a table to those loggers that have an active run, as ``log_figure_to_loggers`` does.

    Args:
        columns: the columns by name, equally long.
        path: the file that holds the table, after which it is named.
        step: the optimizer step.
        report_to: names as in the training arguments. "wandb", "mlflow" and "trackio" accept
            tables; others are skipped.

    Returns:
        The names of the loggers that accepted the table.
    """
    path = Path(path)
    return _sent(path.name, report_to, _TABLES, lambda send: send(columns, path, step))


def _key(path: Path) -> str:
    return f"aot/{path.stem.rsplit('-step', 1)[0]}"


def _sent[Sender](
    what: str,
    report_to: Iterable[str],
    senders: Mapping[str, Sender],
    call: Callable[[Sender], bool],
) -> list[str]:
    took = []
    for name in dict.fromkeys(report_to):
        try:
            if name in senders and call(senders[name]):
                took.append(name)
        except Exception as error:
            # Loggers fail in many ways (network, quota), which must not end a training.
            LOG.warning("%s didn't take %s: %r", name, what, error)
    return took


def _to_tensorboard(path: Path, key: str, step: int, callbacks: list[Any]) -> bool:
    writers = [callback.tb_writer for callback in callbacks if getattr(callback, "tb_writer", None)]
    if not writers:
        return False
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    for writer in writers:
        writer.add_image(key, pixels, step, dataformats="HWC")
    return True


def _wandb() -> Any:
    """The module, if it has an active run."""
    wandb: Any = sys.modules.get("wandb")
    return None if wandb is None or wandb.run is None else wandb


def _to_wandb(path: Path, key: str, step: int, callbacks: list[Any]) -> bool:
    if (wandb := _wandb()) is None:
        return False
    # Transformers plots against this key. wandb's own step must increase and counts log calls.
    wandb.log({key: wandb.Image(str(path)), "train/global_step": step})
    return True


def _table_to_wandb(columns: Mapping[str, list[Any]], path: Path, step: int) -> bool:
    if (wandb := _wandb()) is None:
        return False
    table = wandb.Table(columns=list(columns), data=_rows(columns))
    wandb.log({_key(path): table, "train/global_step": step})
    return True


def _mlflow() -> Any:
    """The module, if it has an active run."""
    mlflow: Any = sys.modules.get("mlflow")
    return None if mlflow is None or mlflow.active_run() is None else mlflow


def _to_mlflow(path: Path, key: str, step: int, callbacks: list[Any]) -> bool:
    if (mlflow := _mlflow()) is None:
        return False
    mlflow.log_artifact(str(path), artifact_path="aot")
    return True


def _table_to_mlflow(columns: Mapping[str, list[Any]], path: Path, step: int) -> bool:
    if (mlflow := _mlflow()) is None:
        return False
    # It appends to the table of the steps before.
    mlflow.log_table(dict(columns), artifact_file=f"{_key(path)}.json")
    return True


def _trackio() -> Any:
    """The module, if it has an active run."""
    trackio: Any = sys.modules.get("trackio")
    active = trackio is not None and trackio.context_vars.current_run.get() is not None
    return trackio if active else None


def _to_trackio(path: Path, key: str, step: int, callbacks: list[Any]) -> bool:
    if (trackio := _trackio()) is None:
        return False
    trackio.log({key: trackio.Image(str(path)), "train/global_step": step})
    return True


def _table_to_trackio(columns: Mapping[str, list[Any]], path: Path, step: int) -> bool:
    if (trackio := _trackio()) is None:
        return False
    table = trackio.Table(columns=list(columns), data=_rows(columns))
    trackio.log({_key(path): table, "train/global_step": step})
    return True


def _rows(columns: Mapping[str, list[Any]]) -> list[list[Any]]:
    return [list(row) for row in zip(*columns.values(), strict=True)]


_FIGURES: dict[str, Callable[[Path, str, int, list[Any]], bool]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
    "trackio": _to_trackio,
}

_TABLES: dict[str, Callable[[Mapping[str, list[Any]], Path, int], bool]] = {
    "wandb": _table_to_wandb,
    "mlflow": _table_to_mlflow,
    "trackio": _table_to_trackio,
}
