"""How many tokens a run has trained on, and how fast."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer

from ..step.engine import MicroBatch
from .callbacks import StepClock


class ThroughputMixin(Trainer):
    """Logs ``num_tokens`` as TRL's trainers do, and the tokens per second.

    Tokens are those of the attention masks over all ranks: prompts count, padding and repeated rows
    do not. Like TRL's, the count begins at 0 in a resumed run.
    """

    # Set by TRL's trainers in their constructors.
    _metrics: dict[str, dict[str, list[float]]]

    _tokens = 0
    _logged_tokens = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = StepClock()
        self.add_callback(self._clock)

    def _count_tokens(self, batches: Sequence[MicroBatch]) -> None:
        """Counts a step's micro-batches. To be called on all ranks."""
        found = [batch.inputs["attention_mask"][batch.mass > 0].sum() for batch in batches]
        self._tokens += int(self.accelerator.gather(torch.stack(found).sum()).sum())
        self._metrics["train"]["num_tokens"] = [float(self._tokens)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            steps, seconds = self._clock.take()
            if steps:
                speed = (self._tokens - self._logged_tokens) / seconds
                self._metrics["train"]["aot/tokens_per_second"] = [speed]
            self._logged_tokens = self._tokens
        elif "train_runtime" in logs:
            # As Transformers' other rates over the run: with evaluations and checkpoints.
            speed = self._tokens / logs["train_runtime"]
            logs["train_tokens_per_second"] = round(speed, 3)
        super().log(logs, start_time)
