"""The trainers that the host calls: AOT on top of its DPO and KTO trainers.

Data, adapters, reference model, logging and checkpoints are the host's; the four moves of a step
(score, transport, backward, report) are in ``step.engine``.
"""

import contextlib
import textwrap
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
from transformers import PreTrainedTokenizerBase, Trainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from .data import is_text, prepare_tokens
from .data.sampler import StratifiedSampler
from .host.adapters import policy_to_start_from, refuse_another_start, save_adapter_only
from .host.checks import check_start, refuse_updates_within_a_step, some_weights
from .host.evaluation import EvaluationMixin
from .host.loaded_models import loaded_after
from .host.nodes import let_each_node_save
from .host.precompute import PrecomputeMixin
from .host.reference_cache import refuse_unlike_rows
from .host.repeated_rows import distinct_rows, refuse_uneven_ranks
from .host.speed import permits, speed_features
from .ot.losses import LossOptions, PairedLogps, StepLogps, UnpairedLogps
from .registry import lookup
from .scoring.batching import Sequences
from .scoring.layout import settle_layouts
from .scoring.model_input import Batch
from .scoring.scorer import Scorer
from .step.engine import MicroBatch, Objective, StepEngine
from .step.metrics import step_metrics
from .step.ranks import gather_rows

LOG = get_logger("axolotl.aot_plugin.trainer")

PAPER = {
    "title": "Distributional Preference Alignment of LLMs via Optimal Transport",
    "id": "2406.05882",
    "citation": textwrap.dedent("""\
        @inproceedings{melnyk2024distributional,
            title        = {{Distributional Preference Alignment of LLMs via Optimal Transport}},
            author       = {Igor Melnyk and Youssef Mroueh and others},
            year         = 2024,
            booktitle    = {Advances in Neural Information Processing Systems 37 (NeurIPS 2024)},
            eprint       = {2406.05882},
            archivePrefix = {arXiv},
        }"""),
}


class NumberedBatch(dict[str, Any]):
    """A collated batch as the host passes it on, and its number in the step, from 0."""

    def __init__(self, batch: Batch, number: int) -> None:
        super().__init__(batch)
        self.number = number


class AOTTrainerMixin(EvaluationMixin, PrecomputeMixin, Trainer):
    """AOT for any host trainer with TRL's batches (``input_ids``, ``attention_mask``,
    ``completion_mask``). A subclass says how a batch's sequences are labelled."""

    tag_names = ("axolotl", "aot")
    _tag_names = ("trl", "aot")
    _name = "AOT"
    _paper = PAPER

    _is_constructed = False
    _mode: ClassVar[str]
    _step_class: ClassVar[type[PairedLogps] | type[UnpairedLogps]]

    # What TRL's trainers set in their construction.
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _is_vision_dataset: bool
    _metrics: dict[str, dict[str, list[float]]]
    _tokenizer: PreTrainedTokenizerBase

    def _labels(self, batch: Batch) -> Tensor:
        """[sequences] bool: chosen or positive."""
        raise NotImplementedError

    def _cached_ref_logps(self, batch: Batch) -> Tensor | None:
        """[sequences]: the precomputed reference log-probabilities of a batch, if it has any."""
        raise NotImplementedError

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        new_adapter = kwargs.get("peft_config")
        self._only_evaluates = new_adapter is None
        model, kwargs["peft_config"] = policy_to_start_from(model, new_adapter)
        super().__init__(model, *args, **kwargs)
        self._settle_reference()
        save_adapter_only(self.model, self.args)
        self._refuse_what_is_not_exact()
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
        self._empty_micro_batches = 0
        self._checked = False
        self._scored_with: list[Tensor] | None = None
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

    @cached_property
    def _scorer(self) -> Scorer:
        # Made when it is first asked for: TRL precomputes reference log-probabilities, in its
        # construction.
        return Scorer(
            policy=lambda: self.model_wrapped,
            head=lambda: self.model.get_output_embeddings(),
            reference=self._as_reference,
            settle=lambda model: settle_layouts(
                model,
                self.accelerator.unwrap_model(model),
                self._widest_row(),
                self.args.device,
                checkpointing=self.args.gradient_checkpointing,
                regrouped=self.args.aot_batch == "step",
            ),
            with_gradient=self.compute_loss_context_manager,
            without_gradient=self._without_gradient,
            multiple=self._pad_to_multiple_of,
        )

    def _widest_row(self) -> int | None:
        longest = self.args.max_length
        return longest and longest + -longest % self._pad_to_multiple_of

    @property
    def _pad_to_multiple_of(self) -> int:
        return getattr(self.data_collator, "pad_to_multiple_of", None) or 1

    def _refuse_what_is_not_exact(self) -> None:
        if self._is_vision_dataset:
            raise ValueError("`rl: aot` trains on text; the data set has an image column")
        # Of a fresh adapter, whose output is 0, no score would show it.
        dropout = (n for n, m in self.model.named_modules() if isinstance(m, nn.Dropout) and m.p)
        if self.args.aot_batch == "step" and (name := next(dropout, None)):
            raise ValueError(
                f"the network is random: the dropout {name!r} is on, and the scores of a step and "
                "its gradient would come from two different networks; set it to 0"
            )
        # One chance in twenty to leave out a layer is likely to pass the first micro-batch.
        layerdrop = getattr(self.model.config, "layerdrop", None)
        if self.args.aot_batch == "step" and layerdrop:
            raise ValueError(
                f"the network is random: `layerdrop: {layerdrop}` leaves out whole layers, and the "
                "scores of a step and its gradient would come from two different networks; write "
                "`overrides_of_model_config: {layerdrop: 0.0}`"
            )
        if self.aux_loss_enabled:
            raise ValueError(
                f"the mixture-of-experts auxiliary loss (coefficient {self.router_aux_loss_coef}) "
                "is a mean over micro-batches and can't be exact over a step; write "
                "`overrides_of_model_config: {router_aux_loss_coef: 0.0}`"
            )

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

    @contextlib.contextmanager
    def _without_gradient(self) -> Iterator[None]:
        with (
            torch.no_grad(),
            self.compute_loss_context_manager(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            yield

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

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
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
            empty = self._without_repeated_rows(batches)
            if not self._checked:
                self._checked = True
                self._check_start(batches)
                self._scored_with = some_weights(self.model)
            self._engine.begin(batches, empty, self.state.global_step + 1)
        elif self._scored_with is not None and self._objective.whole_step:
            refuse_updates_within_a_step(self._scored_with, self.model)
            self._scored_with = None
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

    def _micro_batch(self, batch: Batch) -> MicroBatch:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "completion_mask")}
        labels = self._labels(batch)
        return MicroBatch(inputs, labels, torch.ones_like(labels), self._cached_ref_logps(batch))

    def _without_repeated_rows(self, batches: list[MicroBatch]) -> int:
        """Gives mass 0 to the rows that accelerate repeats to fill an epoch's last micro-batches;
        returns how many micro-batches, of any rank, hold nothing else."""
        ranks = self.accelerator.num_processes
        ends = self.accelerator.gradient_state.end_of_dataloader
        if ranks == 1 or not ends or self.args.dataloader_drop_last:
            return 0
        dataset: Any = self.train_dataset
        per_row = self._step_class.sequences_per_row
        size = len(batches[-1]) // per_row
        distinct = distinct_rows(len(dataset), size, ranks)
        # Rows of several sequences stand in as many blocks, one sequence of each row in every one.
        places = torch.arange(size, device=self.args.device).repeat(per_row)
        batches[-1].counts.copy_(places < distinct[self.accelerator.process_index])
        return distinct.count(0)

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


class AOTUnpairedTrainer(AOTTrainerMixin, AxolotlKTOTrainer):
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

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Steps with both labels, unless the YAML asks for an order of its own."""
        self._refuse_single_rows()
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return StratifiedSampler(dataset["label"], self._step_rows(), seed)

    def _step_rows(self) -> int:
        """The rows of an optimizer step, over all ranks."""
        accumulation = self.args.gradient_accumulation_steps
        ranks = 1 if self.accelerator.split_batches else self.accelerator.num_processes
        return self.args.train_batch_size * accumulation * ranks

    def _refuse_single_rows(self) -> None:
        per_step = self.args.aot_batch == "step"
        if (self._step_rows() if per_step else self.args.train_batch_size) > 1:
            return
        batch = "a step" if per_step else "a micro-batch (`aot_batch: micro_batch`)"
        keys = "`micro_batch_size`" + (" or `gradient_accumulation_steps`" if per_step else "")
        raise ValueError(
            f"{batch} of one row has no other label to compare with, so nothing would be trained: "
            f"raise {keys} (the more rows are sorted together, the better)"
        )
