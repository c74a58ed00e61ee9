"""The trainers that the host calls: AOT on top of its DPO and KTO trainers.

Data, adapters, reference model, logging and checkpoints are the host's. ``host.steps`` runs the
optimizer steps.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from axolotl.core.trainers import AxolotlDPOTrainer, AxolotlKTOTrainer
from axolotl.utils.collators.dpo import AxolotlDPODataCollatorWithPadding
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from .data import LEVEL, WEIGHT, is_text, prepare_tokens, rows_cut
from .host.adapters import policy_to_start_from, refuse_another_start, save_adapter_only
from .host.checks import refuse_inexact, save_reference, warn_of_unread_options
from .host.images import ImageCollator
from .host.loaded_models import loaded_after
from .host.model_card import PAPER, ModelCardMixin
from .host.nodes import let_each_node_save
from .host.precompute import PrecomputeMixin
from .host.reference_cache import refuse_unlike_rows
from .host.repeated_rows import refuse_uneven_ranks
from .host.row_columns import RowColumnsMixin
from .host.sampling import StratifiedSamplingMixin
from .host.steps import StepsMixin
from .ot.losses import LossOptions, PairedLogps, UnpairedLogps, of_means, over_levels, with_sft
from .registry import lookup
from .scoring.excess import mark_excess
from .scoring.model_input import Batch
from .step.engine import Objective

LOG = get_logger("axolotl.aot_plugin.trainer")


class AOTTrainerMixin(StepsMixin, PrecomputeMixin, RowColumnsMixin, ModelCardMixin):
    """AOT for any host trainer with TRL's batches (``input_ids``, ``attention_mask``,
    ``completion_mask``). A subclass says how a batch's sequences are labelled."""

    _tag_names = ("trl", "aot")
    _name = "AOT"
    _paper = PAPER

    _mode: ClassVar[str]

    # Set by TRL's trainers in their constructors.
    aux_loss_enabled: bool
    router_aux_loss_coef: float

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        new_adapter = kwargs.get("peft_config")
        self._only_evaluates = new_adapter is None
        model, kwargs["peft_config"] = policy_to_start_from(model, new_adapter)
        super().__init__(model, *args, **kwargs)
        self._settle_reference()
        save_adapter_only(self.model, self.args)
        if self._is_vision_dataset:
            self.data_collator = ImageCollator(self.data_collator, self.args.max_length)
        self._read_columns()
        warn_of_unread_options(self.args, self._is_weighted)
        refuse_inexact(self)
        refuse_uneven_ranks(self.accelerator)
        refuse_unlike_rows(self.train_dataset, self.eval_dataset)
        if self.args.save_on_each_node:
            let_each_node_save(self.model)
        self._is_constructed = True

    @cached_property
    def _objective(self) -> Objective:
        options = LossOptions(
            penalty=lookup("aot_penalties", "aot_penalty", self.args.aot_penalty),
            beta=self.beta,
            label_smoothing=self.args.aot_label_smoothing,
            sort=self.args.aot_sort,
            epsilon=self.args.aot_sort_epsilon,
            sft_weight=self.args.aot_sft_weight,
            order=self.args.aot_order,
        )
        loss = lookup("aot_losses", "aot_loss", self.args.aot_loss)
        if self.args.aot_score == "mean":
            loss = of_means(loss)
        loss = over_levels(loss)
        if options.sft_weight:
            loss = with_sft(loss)
        return Objective(loss, options, self._step_class, self.args.aot_batch == "step")

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The host's training, after a check that a resumed run keeps its reference."""
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(self.args.output_dir)
        if found:
            self._resumed_from = Path(found)
            refuse_another_start(self._resumed_from, self.args)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The host's saving. A checkpoint also gets what a resumed run is compared with, before the
        host uploads it (``hub_strategy: checkpoint``)."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir and self.args.should_save:
            save_reference(Path(output_dir), self._said_of_random_rows)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """Our tokens in place of TRL's (``data.tokens`` says why)."""
        # TRL looks at any one column to tell chat rows from text, so a leftover `messages` column
        # of the raw rows would make it guess.
        if "messages" in dataset.column_names:
            dataset = dataset.remove_columns("messages")
        if not is_text(dataset, self._mode):
            prepared = super()._prepare_dataset(  # type: ignore[misc]  # TRL has it, not Trainer
                dataset, processing_class, args, dataset_name
            )
            if WEIGHT in dataset.column_names and WEIGHT not in prepared.column_names:
                raise ValueError(
                    "TRL prepares these rows, and loses their weights (`field_weight`); write "
                    "`type: chat_template.default` in their entry"
                )
            return prepared
        # What TRL does with `keep_end`, which only its DPO trainer knows: no prompt is too long.
        keeps_end = getattr(args, "truncation_mode", None) == "keep_end"
        max_length = None if keeps_end else args.max_length
        with PartialState().local_main_process_first():  # the accelerator may not be there yet
            prepared = prepare_tokens(
                dataset, self._tokenizer, self._mode, max_length, args.dataset_num_proc
            )
        if args.max_length and (cut := rows_cut(prepared, self._mode, args.max_length)):
            LOG.warning(
                "%d of %d rows of the %s dataset are longer than `sequence_len: %d` and are cut",
                *(cut, len(prepared), dataset_name, args.max_length),
            )
        return prepared


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

    def _sequences(self, batch: Batch) -> Batch:
        found = super()._sequences(batch)
        if self._excess_weight != 1:
            found["completion_mask"] = mark_excess(found["completion_mask"])
        return found

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
        labels = batch[LEVEL] if LEVEL in batch else batch["label"]
        return torch.as_tensor(labels, device=batch["input_ids"].device)

    def _cached_ref_logps(self, batch: Batch) -> Tensor | None:
        return batch.get("ref_logps")

    def _reference_columns(self, logps: Tensor) -> tuple[Tensor | None, ...]:
        return logps, None
