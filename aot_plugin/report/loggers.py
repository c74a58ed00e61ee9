"""Sends plots to the experiment loggers of a run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
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
    key = f"aot/{path.stem.rsplit('-step', 1)[0]}"
    took = []
    for name in dict.fromkeys(report_to):
        send = _SENDERS.get(name)
        try:
            if send is not None and send(path, key, step, callbacks):
                took.append(name)
        except Exception as error:
            # Loggers fail in many ways (network, quota), which must not end a training.
            LOG.warning("%s didn't take %s: %r", name, path.name, error)
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


def _to_wandb(path: Path, key: str, step: int, callbacks: list[Any]) -> bool:
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return False
    # Transformers plots against this key. wandb's own step must increase and counts log calls.
    wandb.log({key: wandb.Image(str(path)), "train/global_step": step})
    return True


def _to_mlflow(path: Path, key: str, step: int, callbacks: list[Any]) -> bool:
    mlflow = sys.modules.get("mlflow")
    if mlflow is None or mlflow.active_run() is None:
        return False
    mlflow.log_artifact(str(path), artifact_path="aot")
    return True


def _to_trackio(path: Path, key: str, step: int, callbacks: list[Any]) -> bool:
    trackio = sys.modules.get("trackio")
    if trackio is None or trackio.context_vars.current_run.get() is None:
        return False
    trackio.log({key: trackio.Image(str(path)), "train/global_step": step})
    return True


_SENDERS: dict[str, Callable[[Path, str, int, list[Any]], bool]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
    "trackio": _to_trackio,
}
