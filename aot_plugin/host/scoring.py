"""How a run scores: its models as the host loaded and wrapped them, its precision, its batches."""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..scoring.model_input import FIELDS, MORE, Batch
from ..scoring.scorer import Scorer
from ..scoring.settle import settle_layout
from ..step.engine import MicroBatch
from .row_columns import masses
from .speed import in_ddp, may_retry


class ScoringMixin(Trainer):
    """Gives a trainer its ``Scorer``, and reads the batches that TRL's collators make."""

    args: Any
    model: Any
    ref_model: nn.Module | None
    # Set by TRL's trainers in their constructors.
    _is_vision_dataset: bool
    _tokenizer: PreTrainedTokenizerBase

    _is_constructed = False
    _is_random = False

    def _labels(self, batch: Batch) -> Tensor:
        """[sequences]: 1 for chosen or positive, 0 for rejected or negative; between, levels."""
        raise NotImplementedError

    def _cached_ref_logps(self, batch: Batch) -> Tensor | None:
        """[sequences]: the precomputed reference log-probabilities of a batch, if it has any."""
        raise NotImplementedError

    def _sequences(self, batch: Batch) -> Batch:
        """Token ids and masks of a collated batch, and what belongs to images."""
        return {name: batch[name] for name in (*FIELDS, MORE) if name in batch}

    def _micro_batch(self, batch: Batch) -> MicroBatch:
        inputs, labels = self._sequences(batch), self._labels(batch)
        tokens = batch["completion_mask"][:, 1:].sum(dim=1)
        return MicroBatch(inputs, labels, tokens, masses(batch), self._cached_ref_logps(batch))

    @cached_property
    def _scorer(self) -> Scorer:
        # Made when it is first asked for: TRL precomputes reference log-probabilities, in its
        # construction.
        return Scorer(
            policy=lambda: self.model if in_ddp(self) else self.model_wrapped,
            wrapped=lambda: self.model_wrapped,
            head=lambda: self.model.get_output_embeddings(),
            reference=self._as_reference,
            settle=lambda model: settle_layout(
                model,
                self.accelerator.unwrap_model(model),
                self._widest_row(),
                self.args.device,
                checkpointing=self.args.gradient_checkpointing,
                regrouped=self.args.aot_batch == "step",
                multiple=self._pad_to_multiple_of,
                images=self._is_vision_dataset,
            ),
            with_gradient=self.compute_loss_context_manager,
            without_gradient=self._without_gradient,
            may_retry=lambda: may_retry(self),
            excess_weight=self._excess_weight,
        )

    @property
    def _excess_weight(self) -> float:
        """Factor of tokens beyond the length of the shorter response of a pair."""
        alpha = getattr(self.args, "ld_alpha", None)  # TRL's, of its DPO trainer
        return 1.0 if alpha is None else alpha

    def _widest_row(self) -> int | None:
        longest = self.args.max_length
        return longest and longest + -longest % self._pad_to_multiple_of

    @property
    def _pad_to_multiple_of(self) -> int:
        return getattr(self.data_collator, "pad_to_multiple_of", None) or 1

    @contextlib.contextmanager
    def _without_gradient(self) -> Iterator[None]:
        with (
            torch.no_grad(),
            self.compute_loss_context_manager(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            yield

    @property
    def _has_reference(self) -> bool:
        """Whether there is a model to ask. Full fine-tuning of labelled rows with cached
        log-probabilities has none."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        return self.ref_model is not None or getattr(unwrapped, "peft_config", None) is not None

    @contextlib.contextmanager
    def _as_reference(self, policy: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        """The frozen reference and its LM head: the loaded reference model, or the policy with its
        adapter disabled (or exchanged for TRL's frozen copy "ref")."""
        if self.ref_model is not None:
            unwrapped: Any = self.accelerator.unwrap_model(self.ref_model)
            yield self.ref_model, unwrapped.get_output_embeddings()
            return
        head = self.model.get_output_embeddings()
        unwrapped = self.accelerator.unwrap_model(self.model)
        adapters = getattr(unwrapped, "peft_config", None)
        if adapters is None:
            # The precomputing pass of full fine-tuning: before step 1 they are the same.
            if self._is_constructed:
                raise RuntimeError("there is no reference: its log-probabilities are not cached")
            yield policy, head
            return
        with use_adapter(unwrapped, adapter_name="ref" if "ref" in adapters else None):
            yield policy, head
