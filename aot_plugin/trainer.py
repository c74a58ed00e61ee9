"""The trainers that the host calls: AOT on top of its DPO and KTO trainers.

Data, adapters, reference model, logging and checkpoints are the host's. An optimizer step (score,
transport, backward, report) is run by ``step.engine``.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from axolotl.core.trainers import AxolotlDPOTrainer, AxolotlKTOTrainer
from axolotl.utils.collators.dpo import AxolotlDPODataCollatorWithPadding
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .data import is_text, prepare_tokens
from .host.adapters import policy_to_start_from, refuse_another_start, save_adapter_only
from .host.checks import (
    check_start,
    refuse_inexact,
    refuse_updates_within_a_step,
    some_weights,
)
from .host.evaluation import EvaluationMixin
from .host.loaded_models import loaded_after
from .host.model_card import PAPER
from .host.nodes import let_each_node_save
from .host.precompute import PrecomputeMixin
from .host.reference_cache import refuse_unlike_rows
from .host.repeated_rows import refuse_uneven_ranks, without_repeated_rows
from .host.sampling import StratifiedSamplingMixin
from .host.speed import permits, speed_features
from .ot.losses import LossOptions, PairedLogps, StepLogps, UnpairedLogps
from .registry import lookup
from .scoring.batching import Sequences
from .scoring.model_input import Batch
from .step.engine import MicroBatch, Objective, StepEngine
from .step.metrics import step_metrics
from .step.ranks import gather_rows

LOG = get_logger("axolotl.aot_plugin.trainer")


class NumberedBatch(dict[str, Any]):
    """A collated batch as the host passes it on, and its number in the step, from 0."""

    def __init__(self, batch: Batch, number: int) -> None:
        super().__init__(batch)
        self.number = number


class AOTTrainerMixin(EvaluationMixin, PrecomputeMixin):
    """AOT for any host trainer with TRL's batches (``input_ids``, ``attention_mask``,
    ``completion_mask``). A subclass says how a batch's sequences are labelled."""

    tag_names = ("axolotl", "aot")
    _tag_names = ("trl", "aot")
    _name = "AOT"
    _paper = PAPER

    _mode: ClassVar[str]
    _step_class: ClassVar[type[PairedLogps] | type[UnpairedLogps]]

    # What TRL's trainers set in their construction.
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _is_vision_dataset: bool
    _metrics: dict[str, dict[str, list[float]]]
    _tokenizer: PreTrainedTokenizerBase

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        new_adapter = kwargs.get("peft_config")
        self._only_evaluates = new_adapter is None
        model, kwargs["peft_config"] = policy_to_start_from(model, new_adapter)
        super().__init__(model, *args, **kwargs)
        self._settle_reference()
        save_adapter_only(self.model, self.args)
        refuse_inexact(self)
        refuse_uneven_ranks(self.accelerator)
        refuse_unlike_rows(self.train_dataset, self.eval_dataset)
        if self.args.save_on_each_node:
            let_each_node_save(self.model)
        self._engine = StepEngine(
            self._scorer,
            self._objective,
            self.model,
            gather=lambda rows: gather_rows(self.accelerator, rows),
            ranks=self.accelerator.num_processes,
            permits=lambda: permits(self),
            collate=self._collate,
            report=self._report,
        )
        self._step: list[Batch] = []
        self._checked = False
        self._scored_with: list[Tensor] | None = None
        self._updates_checked = False
        self._one_sided_steps = 0
        self._is_constructed = True

    @cached_property
    def _objective(self) -> Objective:
        options = LossOptions(
            penalty=lookup("aot_penalties", "aot_penalty", self.args.aot_penalty),
            beta=self.beta,
            label_smoothing=self.args.aot_label_smoothing,
            sort=self.args.aot_sort,
            epsilon=self.args.aot_sort_epsilon,
        )
        loss = lookup("aot_losses", "aot_loss", self.args.aot_loss)
        return Objective(loss, options, self._step_class, self.args.aot_batch == "step")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        refuse_another_start(Path(resume_from_checkpoint), self.args)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """Our tokens in place of TRL's (``data.tokens`` says why)."""
        # TRL looks at any one column to tell chat rows from text, so a leftover `messages` column
        # of the raw rows would make it guess.
        if "messages" in dataset.column_names:
            dataset = dataset.remove_columns("messages")
        if not is_text(dataset, self._mode):
            return super()._prepare_dataset(  # type: ignore[misc]  # TRL has it, not Trainer
                dataset, processing_class, args, dataset_name
            )
        # What TRL does with `keep_end`, which only its DPO trainer knows: no prompt is too long.
        keeps_end = getattr(args, "truncation_mode", None) == "keep_end"
        max_length = None if keeps_end else args.max_length
        with PartialState().local_main_process_first():  # the accelerator may not be there yet
            return prepare_tokens(
                dataset, self._tokenizer, self._mode, max_length, args.dataset_num_proc
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step as the host collated them, numbered. Nothing is scored yet:
        before its first forward pass the host still calls callbacks that may change the network
        (quantization-aware training), and brings model and optimizer into train mode, which for
        schedule-free optimizers means other weights than those of an evaluation before."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step = batches
        return [NumberedBatch(batch, number) for number, batch in enumerate(batches)], items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the host's training step calls last before its forward pass: with the first
        micro-batch the whole step is scored."""
        prepare = super()._prepare_inputs
        if not isinstance(inputs, NumberedBatch):  # an evaluation's
            return prepare(inputs)
        if inputs.number == 0:
            batches = [self._micro_batch(prepare(batch)) for batch in self._step]
            self._step = []
            empty = without_repeated_rows(self, batches[-1])
            if not self._checked:
                self._checked = True
                self._check_start(batches)
            several = self._objective.whole_step and len(batches) > 1
            if several and not self._updates_checked:
                self._scored_with = some_weights(self.model)
            self._engine.begin(batches, empty, self.state.global_step + 1)
        elif self._scored_with is not None:
            refuse_updates_within_a_step(self._scored_with, self.model)
            self._scored_with, self._updates_checked = None, True
        return inputs

    def _check_start(self, batches: list[MicroBatch]) -> None:
        check_start(
            self._scorer,
            batches[0],
            self.model,
            self.args,
            several=self._objective.whole_step and len(batches) > 1,
            resumed=self.state.global_step > 0,
            widest=self._widest_row(),
            gather=self.accelerator.gather,
        )
        # Not before: what wraps the model is known now, and what it does to its logits.
        LOG.info("speed: %s", speed_features(self, self._scorer.layouts().why_not_shared))

    def _collate(self, sequences: Sequences, rows: Any) -> Batch:
        pad_token = self._tokenizer.pad_token_id
        batch = sequences.collate(rows, pad_token, self._pad_to_multiple_of)
        return {name: values.to(self.args.device) for name, values in batch.items()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The surrogate whose gradient is the step's: sum of weight x logp(theta)."""
        assert isinstance(inputs, NumberedBatch)
        return self._engine.surrogate(inputs.number)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The host's step on the surrogate, with the true loss as its value: the host logs the
        sum over micro-batches, averaged over ranks."""
        try:
            surrogate = super().training_step(*args, **kwargs)
        except BaseException:
            # Whoever catches it (out of memory: train on with less) gets the step's memory back.
            self._step = []
            self._engine.abandon()
            raise
        return torch.full_like(surrogate, self._engine.mean_loss)

    def _report(self, step: StepLogps) -> None:
        metrics = self._metrics["train"]
        if len(step.u) == 0 or len(step.v) == 0:
            self._one_sided_steps += 1
            if self._one_sided_steps == 1:
                LOG.warning(
                    "step %d holds no %s rows and contributes nothing; `aot/one_sided_steps` "
                    "counts such steps. A larger effective batch makes them rare",
                    self.state.global_step + 1,
                    "positive" if len(step.u) == 0 else "negative",
                )
        else:
            for name, value in step_metrics(step, self.beta).items():
                metrics[name].append(value)
        metrics["aot/one_sided_steps"] = [float(self._one_sided_steps)]
        metrics["aot/sorted_u"].append(float(len(step.u)))
        metrics["aot/sorted_v"].append(float(len(step.v)))


class AOTPairedTrainer(AOTTrainerMixin, AxolotlDPOTrainer):
    """AOT on preference pairs, over the host's DPO trainer (data, adapters, reference)."""

    _mode = "paired"
    _step_class = PairedLogps

    def __init__(self, *args: Any, data_collator: Any = None, **kwargs: Any) -> None:
        # The host's own, which `pad_to_multiple_of` brings, asks for columns that TRL no longer
        # writes. TRL's does the same with those that it does.
        if isinstance(data_collator, AxolotlDPODataCollatorWithPadding):
            data_collator = None
        super().__init__(*args, data_collator=data_collator, **kwargs)

    def _labels(self, batch: Batch) -> Tensor:
        # TRL's collator puts the chosen responses of a batch before the rejected ones.
        n = len(batch["input_ids"])
        return torch.arange(n, device=batch["input_ids"].device) < n // 2

    def _cached_ref_logps(self, batch: Batch) -> Tensor | None:
        if "ref_chosen_logps" not in batch:
            return None
        return torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])

    def _reference_columns(self, logps: Tensor) -> tuple[Tensor | None, ...]:
        return logps.chunk(2)


class AOTUnpairedTrainer(AOTTrainerMixin, StratifiedSamplingMixin, AxolotlKTOTrainer):
    """AOT on labelled rows, over the host's KTO trainer (data, adapters, reference)."""

    _mode = "unpaired"
    _step_class = UnpairedLogps

    def __init__(self, model: Any, ref_model: Any = None, **kwargs: Any) -> None:
        if ref_model is None and not kwargs["args"].precompute_ref_log_probs:
            ref_model = loaded_after(model)
        super().__init__(model, ref_model, **kwargs)

    def _labels(self, batch: Batch) -> Tensor:
        return torch.as_tensor(batch["label"], device=batch["input_ids"].device).bool()

    def _cached_ref_logps(self, batch: Batch) -> Tensor | None:
        return batch.get("ref_logps")

    def _reference_columns(self, logps: Tensor) -> tuple[Tensor | None, ...]:
        return logps, None
