"""Callbacks of the trainer: a short console line per log, a warning, and two of the host."""

import time
from collections.abc import Mapping
from typing import Any

from axolotl.utils.callbacks import LossWatchDogCallback
from axolotl.utils.logging import get_logger
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..report.scores import UNITS
from .sampling import steps_per_epoch

LOG = get_logger("axolotl.aot_plugin.host.callbacks")


def callbacks(cfg: Any, trainer: Any) -> list[TrainerCallback]:
    """The callbacks of a run; the host adds its two only in supervised fine-tuning."""
    rows = "pairs" if cfg["aot_mode"] == "paired" else "rows"
    found: list[TrainerCallback] = [
        StepLine(rows, trainer.accelerator.num_processes, UNITS[cfg["aot_score"]]),
        OtherEpochs(),
    ]
    if trainer.eval_dataset is not None:
        found.append(UnusedEvaluationRows())
    if cfg.early_stopping_patience:
        found.append(EarlyStoppingCallback(cfg.early_stopping_patience))
    if cfg.loss_watchdog_threshold is not None:
        found.append(LossWatchDogCallback(cfg))
    return found


class UnusedEvaluationRows(TrainerCallback):
    """Warns of rows to evaluate in a run without evaluations: the host wants to be told when."""

    def on_train_begin(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        if args.eval_strategy == "no":
            LOG.warning(
                "the rows of `val_set_size` or `test_datasets` are not evaluated in this run; set "
                "`evals_per_epoch`, `eval_steps` or `eval_strategy: epoch`"
            )


class OtherEpochs(TrainerCallback):
    """Warns if epochs have another number of steps than those of the checkpoint that is resumed.

    The host counts steps into epochs anew, so that some rows would be read again or left out.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not (state.global_step and state.epoch and train_dataloader is not None):
            return
        steps = steps_per_epoch(args, train_dataloader)
        epoch = state.global_step / steps
        # The last step of an epoch may have fewer micro-batches than the others.
        if abs(epoch - state.epoch) > 1.01 / steps:
            LOG.warning(
                "the checkpoint was saved at step %d as epoch %.2f, and is epoch %.2f of this run, "
                "so rows are read again or left out: the number of rows, the effective batch or "
                "`aot_draw` is another one than before",
                *(state.global_step, state.epoch, epoch),
            )


class StepClock(TrainerCallback):
    """Measures the time of optimizer steps; that of evaluations and checkpoints is left out."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._seconds = 0.0
        self._steps = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._since
        self._steps += 1
        self._since = time.perf_counter()

    on_evaluate = on_save = on_train_begin

    def take(self) -> tuple[int, float]:
        """The steps since the last call, and the seconds that they took."""
        taken = self._steps, self._seconds
        self._steps, self._seconds = 0, 0.0
        return taken


class StepLine(StepClock):
    """Prints the main metrics of each log on one line, below the host's dictionary of all metrics.

    Args:
        rows: what the rows of a step are called, "pairs" or "rows".
        ranks: number of ranks.
        unit: of what is compared.
    """

    def __init__(self, rows: str, ranks: int, unit: str = "nats") -> None:
        super().__init__()
        self.rows, self.ranks, self.unit = rows, ranks, unit

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        speed = None
        if self._steps and "loss" in (logs or {}):
            rows = args.train_batch_size * args.gradient_accumulation_steps * self.ranks
            steps, seconds = self.take()
            speed = steps * rows / seconds
        if state.is_world_process_zero and logs:
            at = f"step {state.global_step}/{state.max_steps}"
            line = summary(logs, at, speed, self.rows, self.unit)
            if line:
                tqdm.write(line)


def summary(
    logs: Mapping[str, Any],
    step: str,
    speed: float | None = None,
    rows: str = "rows",
    unit: str = "nats",
) -> str | None:
    """Formats loss, violation, dominance, re-coupled rows and speed of one log.

    Args:
        logs: the logged metrics.
        step: the step as it is printed.
        speed: rows per second, if known.
        rows: what the rows are called.
        unit: of violation and dominance.

    Returns:
        The line; None for a log without these metrics (the end of training, or steps with only one
        label).
    """
    found = (p for p in ("", "eval_") if {f"{p}loss", f"{p}aot/violation_fraction"} <= logs.keys())
    prefix = next(found, None)
    if prefix is None:
        return None
    value = {key.removeprefix(prefix): number for key, number in logs.items()}
    parts = [
        f"{prefix}loss {value['loss']:.4g}",
        f"violation {value['aot/violation_fraction']:.0%} of levels, "
        f"{value['aot/violation_amount']:.3g} {unit}",
        f"dominance {value['aot/dominance_amount']:.3g} {unit}",
    ]
    if "aot/recoupled_fraction" in value:
        parts.append(f"recoupled {value['aot/recoupled_fraction']:.0%}")
    if speed is not None:
        parts.append(f"{speed:.3g} {rows}/s")
    return f"{step}  {' | '.join(parts)}"
