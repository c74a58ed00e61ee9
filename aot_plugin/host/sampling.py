"""The order of labelled rows: all labels in whatever is sorted together."""

from typing import Any

import numpy as np
from axolotl.utils.logging import get_logger
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data.levels import level_in_words, levels
from ..data.sampler import NOTABLE, StratifiedSampler, variance_ratio

LOG = get_logger("axolotl.aot_plugin.sampling")


class StratifiedSamplingMixin(Trainer):
    """Orders labelled rows so that every step has all labels (``StratifiedSampler``), and with
    ``aot_batch: micro_batch`` every micro-batch."""

    args: Any
    _epoch_rows: int | None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """A sampler of batches with all labels, unless the YAML asks for another order."""
        self._refuse_single_rows()
        balanced = self.args.aot_draw == "balanced"
        if self.args.train_sampling_strategy != "random":
            if balanced:
                raise ValueError(
                    "`aot_draw: balanced` draws rows in an order of its own, and `"
                    f"train_sampling_strategy: {self.args.train_sampling_strategy}` in another: "
                    "keep one of them (`curriculum_sampling: true` is Axolotl's name of the latter)"
                )
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        found = levels(dataset)
        sampler = StratifiedSampler(found, self._sorted_rows(), seed, balanced)
        self._epoch_rows = len(sampler)
        self.add_callback(SamplerEpoch(sampler))
        present, counts = np.unique(found, return_counts=True)
        if balanced:
            _log_repetitions(present, counts)
        else:
            _log_unevenness(counts)
        self._warn_of_rare_levels(present, counts, balanced)
        return sampler

    def _warn_of_rare_levels(self, present: np.ndarray, counts: np.ndarray, balanced: bool) -> None:
        """Says which levels of graded rows some steps will not have."""
        total, rows = int(counts.sum()), self._sorted_rows()
        drawn = np.full(len(counts), total / len(counts)) if balanced else counts
        rare = [
            f"level {level:.2g} ({count} of {total} rows)"
            for level, count, each in zip(present, counts, drawn, strict=True)
            if each * rows < total
        ]
        if rare and len(present) > 2:
            even = (
                "write `aot_draw: balanced`, or " if not balanced and rows >= len(present) else ""
            )
            LOG.warning(
                "with %d rows sorted together, some of these batches have no rows of %s: there its "
                "neighbours are compared with each other (`aot/levels` counts the levels of a "
                "batch); %suse a larger %s, or fewer thresholds",
                rows,
                ", ".join(rare),
                even,
                "effective batch" if self.args.aot_batch == "step" else "`micro_batch_size`",
            )

    def _sorted_rows(self) -> int:
        """Number of rows that are sorted together: those of an optimizer step over all ranks, or of
        a micro-batch of one rank."""
        ranks = self.accelerator.num_processes
        rows = self.args.train_batch_size // (ranks if self.accelerator.split_batches else 1)
        if self.args.aot_batch != "step":
            return rows
        return rows * ranks * self.args.gradient_accumulation_steps

    def _refuse_single_rows(self) -> None:
        if self._sorted_rows() > 1:
            return
        per_step = self.args.aot_batch == "step"
        batch = "a step" if per_step else "a micro-batch (`aot_batch: micro_batch`)"
        keys = "`micro_batch_size`" + (" or `gradient_accumulation_steps`" if per_step else "")
        raise ValueError(
            f"{batch} of one row has no other label to compare with, so nothing would be trained: "
            f"raise {keys} (the more rows are sorted together, the better)"
        )


class SamplerEpoch(TrainerCallback):
    """Tells a sampler which epoch begins.

    After a resume in the middle of an epoch the host's own message does not reach it on several
    ranks: accelerate has wrapped the batches once more, to skip those that were trained, and the
    rest of the epoch would be that of epoch 0's order.
    """

    def __init__(self, sampler: StratifiedSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._sampler.set_epoch(state.global_step // steps_per_epoch(args, train_dataloader))


def steps_per_epoch(args: TrainingArguments, train_dataloader: Any) -> int:
    """Number of optimizer steps of an epoch; the last one may have fewer micro-batches."""
    return -(-len(train_dataloader) // args.gradient_accumulation_steps)


def _log_repetitions(present: np.ndarray, counts: np.ndarray) -> None:
    """Says how often an epoch with balanced labels reads the rows of each label."""
    each = counts.max()
    times = ", ".join(
        f"those of the {count:,} {level_in_words(level)} rows {each / count:.3g} times"
        for level, count in zip(present[::-1], counts[::-1], strict=True)
        if count < each
    )
    if times:
        rows = len(counts) * each
        LOG.info("`aot_draw: balanced`: an epoch has %d rows, and reads %s", rows, times)


def _log_unevenness(counts: np.ndarray) -> None:
    """Says by how much equal numbers of the labels would lower the variance of a step, if much."""
    ratio = variance_ratio(counts / counts.sum())
    if ratio > NOTABLE:
        LOG.info(
            "the labels are uneven: with `aot_draw: balanced`, which draws them in equal numbers, "
            "the gradient of a step would have about 1/%.2g of the variance; an epoch would read "
            "the rows of the rarest one %.0f times (docs/choosing.md)",
            ratio,
            counts.max() / counts.min(),
        )
