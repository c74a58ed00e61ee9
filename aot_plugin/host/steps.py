"""Optimizer steps: the host's training loop around the ``StepEngine``."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from ..ot.losses import PairedLogps, StepLogps, UnpairedLogps
from ..scoring.batching import Sequences
from ..scoring.model_input import Batch
from ..step.budget import Budget
from ..step.engine import MicroBatch, StepEngine
from ..step.ranks import gather_rows
from .checks import (
    check_gradient,
    check_start,
    reference_of_random_rows,
    refuse_updates_within_a_step,
    some_weights,
)
from .evaluation import EvaluationMixin
from .reference_cache import bits_of_reference
from .repeated_rows import without_repeated_rows
from .speed import permits, speed_features, why_no_gradient_aside

LOG = get_logger("axolotl.aot_plugin.steps")

GIB = 2**30


class NumberedBatch(dict[str, Any]):
    """A collated batch as the host passes it on, and its number in the step, from 0."""

    def __init__(self, batch: Batch, number: int) -> None:
        super().__init__(batch)
        self.number = number


class StepsMixin(EvaluationMixin):
    """Runs each optimizer step of the host's loop through the ``StepEngine``."""

    _step_class: ClassVar[type[PairedLogps] | type[UnpairedLogps]]

    _step: list[Batch]
    _checked = False
    _scored_with: list[Tensor] | None = None
    _updates_checked = False
    _one_sided_steps = 0
    _resumed_from: Path | None = None
    _said_of_random_rows: dict[str, Any] | None = None
    _is_graded = False  # set by RowColumnsMixin
    _epoch_rows: int | None = None  # set by StratifiedSamplingMixin

    @cached_property
    def _engine(self) -> StepEngine:
        ranks, kept = self.accelerator.num_processes, self.args.aot_kept_memory
        return StepEngine(
            self._scorer,
            self._objective,
            self.model,
            Budget(self.args.device, ranks, None if kept is None else kept * GIB),
            gather=lambda rows: gather_rows(self.accelerator, rows),
            ranks=ranks,
            permits=lambda: permits(self),
            collate=self._collate,
            report=self._report,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step as the host collated them, numbered.

        Nothing is scored yet. Before its first forward pass the host calls callbacks that may
        change the network (quantization-aware training), and switches model and optimizer to train
        mode, which for schedule-free optimizers means other weights than in an evaluation.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step = batches
        return [NumberedBatch(batch, number) for number, batch in enumerate(batches)], items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Called last by the host's training step before its forward pass: with the first
        micro-batch the whole step is scored."""
        host = super()._prepare_inputs

        def prepare(batch: Batch) -> Batch:
            # Under DeepSpeed the host rounds floats to the dtype of the network.
            exact = {
                name: value.to(self.args.device)
                for name, value in batch.items()
                if isinstance(value, Tensor) and value.is_floating_point()
            }
            return {**host(batch), **exact}

        if not isinstance(inputs, NumberedBatch):  # an evaluation's
            return prepare(inputs)
        if inputs.number == 0 and self._step:
            batches = [self._micro_batch(prepare(batch)) for batch in self._step]
            self._step = []
            self._begin(batches)
        elif inputs.number > 0 and self._scored_with is not None:
            refuse_updates_within_a_step(self._scored_with, self.model)
            self._scored_with, self._updates_checked = None, True
        return inputs

    def _begin(self, batches: list[MicroBatch]) -> None:
        empty = without_repeated_rows(self, batches[-1])
        self._count_tokens(batches)
        several = self._objective.whole_step and len(batches) > 1
        if not self._checked:
            self._checked = True
            self._check(batches[0], several)
            # Only now is it known what wraps the model, and what the model does to its logits.
            LOG.info("speed: %s", speed_features(self, self._scorer.settled()))
        if several and not self._updates_checked:
            self._scored_with = some_weights(self.model)
        self._engine.begin(batches, empty, self.state.global_step + 1)

    def _check(self, batch: MicroBatch, several: bool) -> None:
        """What must hold before the first step."""
        scorer, model, args, gather = self._scorer, self.model, self.args, self.accelerator.gather
        self._is_random = check_start(
            scorer,
            batch,
            model,
            args,
            several=several,
            resumed=self.state.global_step > 0,
            widest=self._widest_row(),
            gather=gather,
        )
        if self._is_random:
            return
        if why_no_gradient_aside(self) is None:
            check_gradient(scorer, batch, model, args, gather)
        if self._has_reference and not self._is_vision_dataset:  # a random token may mean an image
            is_whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
            bits = bits_of_reference(model, self.ref_model) if is_whole else None
            self._said_of_random_rows = reference_of_random_rows(
                scorer, model, len(self._tokenizer), args, self._resumed_from, gather, bits
            )

    def _collate(self, sequences: Sequences, rows: Any) -> Batch:
        pad_token = self._tokenizer.pad_token_id
        batch = sequences.collate(rows, pad_token, self._pad_to_multiple_of)
        return {name: values.to(self.args.device) for name, values in batch.items()}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The surrogate whose gradient is the step's: sum of weight x logp(theta)."""
        assert isinstance(inputs, NumberedBatch)
        return self._engine.surrogate(inputs.number)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The host's step on the surrogate, with the true loss as its value: the host logs the
        sum over micro-batches, averaged over ranks.

        A micro-batch that does not fit into memory is cut, and all of the step up to it is done
        again, since the failed backward pass may have added to the gradients.
        """
        given = (*args, *kwargs.values())
        number = next(batch.number for batch in given if isinstance(batch, NumberedBatch))
        engine = self._engine
        while True:
            try:
                surrogate = super().training_step(*args, **kwargs)
                if engine.is_due(number):
                    continue
                engine.finish(number)
                return torch.full_like(surrogate, engine.mean_loss)
            except torch.OutOfMemoryError as error:
                if not engine.can_retry:
                    self._abandon_step()
                    error.add_note(self._on_memory())
                    raise
            except BaseException:
                # Whoever catches it gets the step's memory back.
                self._abandon_step()
                raise
            # Only now, since the exception held the tensors of the failed pass.
            self.model.zero_grad()
            engine.retry(number)

    def _abandon_step(self) -> None:
        self._step = []
        self._engine.abandon()

    def _on_memory(self) -> str:
        keys = ["`micro_batch_size`", "`sequence_len`"]
        if self.args.aot_kept_memory != 0:
            keys.append("`aot_kept_memory`")
        return f"aot-plugin: the micro-batch can't be cut further here; lower {' or '.join(keys)}"

    def _report(self, step: StepLogps, predictions: dict[str, float]) -> None:
        metrics = self._metrics["train"]
        for name, value in predictions.items():
            metrics[name].append(value)
        if not step.comparisons:
            self._one_sided_steps += 1
            if self._one_sided_steps == 1:
                lacks = "positive" if len(step.u) == 0 else "negative"
                whole = self.args.aot_batch == "step"
                LOG.warning(
                    "%s %d holds no %s rows, so there is nothing to compare; "
                    "`aot/one_sided_steps` counts such %s. A larger %s makes them rare",
                    "step" if whole else "a micro-batch of step",
                    self.state.global_step + 1,
                    "other level's" if self._is_graded else lacks,
                    "steps" if whole else "micro-batches",
                    "effective batch" if whole else "`micro_batch_size`",
                )
        else:
            for name, value in self._step_metrics(step).items():
                metrics[name].append(value)
        if self._is_graded:
            metrics["aot/levels"].append(float(len(step.comparisons) + 1))
        metrics["aot/one_sided_steps"] = [float(self._one_sided_steps)]
        metrics["aot/sorted_u"].append(float(len(step.u)))
        metrics["aot/sorted_v"].append(float(len(step.v)))
