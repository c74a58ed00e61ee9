"""The four moves of a step (score, transport, backward, report) on top of the host's trainers.

The loss of a step is a function of one vector, the log-probabilities of all its sequences. So:

1. *score* every sequence of the step without gradient, under policy and reference;
2. *transport*: gather the log-probabilities of all ranks, and take the loss and its gradient
   dL/dlogp with respect to these few numbers;
3. *backward*: per micro-batch, back-propagate the sum of (dL/dlogp, a constant) x logp(theta):
   by the chain rule the accumulated gradient is that of the whole batch (GradCache, arXiv
   2101.06983, does this for contrastive learning);
4. *report* the true loss and the dominance statistics.

A step of one micro-batch has its scores in hand while it is in the forward pass, so moves 1 and 3
are one pass there. So are they for micro-batches of one row (see ``held``).
"""

import contextlib
import json
import textwrap
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from axolotl.core.trainers import AxolotlDPOTrainer, AxolotlKTOTrainer
from axolotl.utils.collators.dpo import AxolotlDPODataCollatorWithPadding
from axolotl.utils.logging import get_logger
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalPrediction
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import global_then_local_main_first, use_adapter

from .data import is_text, prepare_tokens
from .data.sampler import StratifiedSampler
from .digests import digest
from .host.adapters import (
    policy_to_start_from,
    refuse_another_start,
    save_adapter_only,
    settle_reference,
)
from .host.checks import (
    Difference,
    first_scores,
    random_network,
    randomness,
    reference_error,
    wrong_reference,
)
from .host.loaded_models import begin_as_policy, loaded_after
from .host.nodes import EachNodeWrites, let_each_node_save
from .host.reference_cache import (
    Identity,
    identify,
    reference_file,
    refuse_unlike_rows,
    rows_digest,
)
from .host.repeated_rows import DISTINCT_KEY, distinct_rows, refuse_uneven_ranks
from .host.speed import (
    gradients_that_fit,
    speed_features,
    trainable,
    why_gradients_are_not_held,
    why_graph_is_not_kept,
)
from .ot.dominance import dominance_statistics
from .ot.losses import LossOptions, PairedLogps, StepLogps, UnpairedLogps
from .ot.transport import recoupled_fraction
from .registry import lookup
from .report import Scores, log_figure_to_loggers, record_evaluation
from .scoring.batching import LOGPS_KEY, NUMBER_KEY, WEIGHT_KEY, Sequences
from .scoring.cost import Cost
from .scoring.layout import Layouts, settle_layouts
from .scoring.logps import sequence_logps, weighted_logps_sum
from .step.held import HELD_KEY, Gradient, held_surrogate

LOG = get_logger("axolotl.aot_plugin.trainer")

CACHED_FOR = (
    *("max_length", "truncation_mode", "bf16", "fp16", "tf32", "disable_dropout"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
)
"""Training arguments that reference log-probabilities depend on."""

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


class AOTTrainerMixin(Trainer):
    """The four moves, for any host trainer with TRL's batches (``input_ids``, ``attention_mask``,
    ``completion_mask``). A subclass says how a batch's sequences are labelled."""

    tag_names = ("axolotl", "aot")
    _tag_names = ("trl", "aot")
    _name = "AOT"
    _paper = PAPER

    # Known before construction ends: TRL precomputes reference log-probabilities there.
    _layouts: Layouts | None = None
    _told_speed = False
    _reference_is_settled = False
    _mode: str
    _reference: Identity | None = None
    _step_class: type[PairedLogps] | type[UnpairedLogps]
    _sequences_per_row: int

    # What TRL's trainers set in their construction.
    args: Any
    model: Any
    beta: float
    ref_model: nn.Module | None
    precompute_ref_logps: bool
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _is_vision_dataset: bool
    _metrics: dict[str, dict[str, list[float]]]
    _tokenizer: PreTrainedTokenizerBase

    def _labels(self, batch: dict[str, Any]) -> Tensor:
        """[sequences] bool: chosen or positive."""
        raise NotImplementedError

    def _cached_ref_logps(self, batch: dict[str, Any]) -> Tensor:
        """[sequences]: the precomputed reference log-probabilities of a batch."""
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
        self._loss = lookup("aot_losses", "aot_loss", self.args.aot_loss)
        self._loss_options = LossOptions(
            penalty=lookup("aot_penalties", "aot_penalty", self.args.aot_penalty),
            beta=self.beta,
            label_smoothing=self.args.aot_label_smoothing,
            sort=self.args.aot_sort,
            epsilon=self.args.aot_sort_epsilon,
        )
        self._micro_batches = 1
        self._step: dict[int, dict[str, Any]] = {}
        self._checked = False
        self._empty_micro_batches = 0
        self._step_loss = 0.0
        self._one_sided_steps = 0
        self._eval_name = "eval"
        # The host's evaluation loop gathers our columns over batches and ranks (and drops the
        # rows that it repeated to fill the last batch); one transport problem is solved on all.
        self.compute_metrics = self._evaluate_columns

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
        if self.aux_loss_enabled:
            raise ValueError(
                f"the mixture-of-experts auxiliary loss (coefficient {self.router_aux_loss_coef}) "
                "is a mean over micro-batches and can't be exact over a step; write "
                "`overrides_of_model_config: {router_aux_loss_coef: 0.0}`"
            )

    def _settle_reference(self) -> None:
        # Once, since the policy is trained afterwards; and before TRL precomputes in __init__.
        if not self._reference_is_settled:
            settle_reference(self.model, self._only_evaluates)
            if self.ref_model is not None and not isinstance(self.model, PeftModel):
                changed = begin_as_policy(self.ref_model, self.model)
                if changed:
                    LOG.info("the reference begins with the policy's %s", ", ".join(changed))
            self._reference_is_settled = True

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
        with global_then_local_main_first():
            return prepare_tokens(
                dataset, self._tokenizer, self._mode, max_length, args.dataset_num_proc
            )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's, in a file that later runs with the same reference and tokens find again: beside
        the prepared rows, named by all that they depend on."""
        self._settle_reference()

        def identity() -> Identity:
            if self._reference is not None:  # of other rows: a pass may change a model's buffers
                return self._reference._replace(rows=rows_digest(dataset))
            settings = {name: getattr(self.args, name, None) for name in CACHED_FOR}
            settings["autocast"] = self.accelerator.mixed_precision
            self._reference = identify(dataset, self.model, self.ref_model, settings)
            return self._reference

        file, is_there = reference_file(Path(self.args.aot_reference_folder), identity)
        if is_there:
            LOG.info("the %s dataset's reference log-probabilities are read: %s", name, file)

        # `datasets` finds what it has made of a dataset by its fingerprint, and TRL's for the new
        # columns knows rows and weights only: it may name what belongs to another reference.
        if dataset._indices is not None:
            dataset = dataset.flatten_indices()
        dataset._fingerprint = digest([dataset._fingerprint, file.name])[:16]

        def path(fingerprint: str) -> str:
            del dataset._get_cache_file_path  # whatever else is cached has a file of its own
            return str(file)

        dataset._get_cache_file_path = path
        accelerator: Any = self.accelerator
        self.accelerator = EachNodeWrites(accelerator)
        try:
            return super()._precompute_ref_logps(  # type: ignore[misc]  # TRL has it, not Trainer
                dataset, name, batch_size
            )
        finally:
            self.accelerator = accelerator

    # Move 1: score.

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """The micro-batches of a step as the host collated them, numbered. Nothing is scored yet:
        before its first forward pass the host still calls callbacks that may change the network
        (quantization-aware training), and brings model and optimizer into train mode, which for
        schedule-free optimizers means other weights than those of an evaluation before."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches = len(batches)
        self._mark_repeated_rows(batches)
        self._step = dict(enumerate(batches))
        return [{**batch, NUMBER_KEY: number} for number, batch in self._step.items()], items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the host's training step calls last before its forward pass: with the first
        micro-batch the whole step is scored, and several micro-batches are exchanged for others,
        regrouped by length and with the weight dL/dlogp of each sequence."""
        prepare = super()._prepare_inputs
        if NUMBER_KEY not in inputs:  # an evaluation's
            return prepare(inputs)
        number = inputs[NUMBER_KEY]
        if number == 0:
            batches = [prepare(batch) for batch in self._step.values()]
            if not self._checked:
                self._checked = True
                self._check_start(batches[0], several=len(batches) > 1)
            if self.args.aot_batch == "step" and len(batches) > 1:
                batches = self._weigh(batches)
            self._step = dict(enumerate(batches))
        return self._step.pop(number)

    def _check_start(self, batch: dict[str, Any], several: bool) -> None:
        """Refuses a random network (of a step of several micro-batches; one is scored and
        differentiated in one pass) and a wrong reference (see ``checks``), on every rank at once.
        A resumed policy has left its reference already."""
        model = self.model_wrapped

        def policy(batch: dict[str, Any]) -> Tensor:
            with self._no_grad():
                return self._policy_logps(model, batch)

        def policy_elsewhere(batch: dict[str, Any]) -> Tensor:
            with self._no_grad():
                return sequence_logps(model, self.model.get_output_embeddings(), batch)

        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        first = first_scores(policy, policy_elsewhere, batch, self.model, half)
        found = self._worst_of_ranks(randomness(first))
        if found and several and self.args.aot_batch == "step":
            raise ValueError(random_network(found, self.model, self.args))
        if self.state.global_step > 0:
            return
        if self.precompute_ref_logps:
            reference = self._cached_ref_logps(batch)
        else:
            reference = self._reference_logps(model, batch)
        found = self._worst_of_ranks(reference_error(first, reference))
        if found:
            raise ValueError(wrong_reference(found, self.model, self.args))

    def _worst_of_ranks(self, found: Difference) -> Difference:
        numbers = torch.tensor([[*astuple(found)]], device=self.args.device)
        ranks = self.accelerator.gather(numbers).tolist()
        return max((Difference(*rank) for rank in ranks), key=lambda found: found.excess)

    def _mark_repeated_rows(self, batches: list[dict[str, Any]]) -> None:
        ranks = self.accelerator.num_processes
        self._empty_micro_batches = 0
        ends = self.accelerator.gradient_state.end_of_dataloader
        dataset: Any = self.train_dataset
        if ranks > 1 and ends and not self.args.dataloader_drop_last:
            size = len(batches[-1]["input_ids"]) // self._sequences_per_row
            distinct = distinct_rows(len(dataset), size, ranks)
            batches[-1][DISTINCT_KEY] = distinct[self.accelerator.process_index]
            self._empty_micro_batches = distinct.count(0)

    def _distinct(self, batch: dict[str, Any]) -> Tensor:
        """[sequences] bool: not of a row that is repeated to fill the batch."""
        rows = len(batch["input_ids"]) // self._sequences_per_row
        places = torch.arange(rows, device=batch["input_ids"].device)
        return (places < batch.get(DISTINCT_KEY, rows)).repeat(self._sequences_per_row)

    def _weigh(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Moves 1 and 2 for a step of several micro-batches."""
        sequences = Sequences.from_batches(batches)
        labels = torch.cat([self._labels(batch) for batch in batches])
        distinct = torch.cat([self._distinct(batch) for batch in batches])
        held = self._gradients_to_hold(batches)
        if held:
            # Each row stays by itself, the longest first: memory peaks while none is held yet.
            size, lengths = self._sequences_per_row, sequences.lengths()
            groups = [list(range(i, i + size)) for i in range(0, len(sequences), size)]
            groups.sort(key=lambda rows: -sum(lengths[row] for row in rows))
        else:
            groups = sequences.groups(len(batches), self._shares_prompts(self.model_wrapped))
        micro_batches = [self._collate(sequences, rows) for rows in groups]
        logps = torch.empty(len(sequences), device=self.args.device)
        ref_logps = torch.empty_like(logps)
        for number in (*range(held), *reversed(range(held, len(groups)))):
            rows, batch = groups[number], micro_batches[number]
            if not self.precompute_ref_logps:
                ref_logps[rows] = self._reference_logps(self.model_wrapped, batch)
            if number < held:
                logps[rows], batch[HELD_KEY] = self._logps_and_gradient(batch, labels[rows])
            elif number == 0 and self._keeps_graph():
                with self.compute_loss_context_manager():
                    batch[LOGPS_KEY] = self._policy_logps(self.model_wrapped, batch)
                logps[rows] = batch[LOGPS_KEY].detach()
            else:
                with self._no_grad():
                    logps[rows] = self._policy_logps(self.model_wrapped, batch)
        if self.precompute_ref_logps:
            ref_logps = torch.cat([self._cached_ref_logps(batch) for batch in batches])
        weights = self._transport(logps, ref_logps, labels, distinct)
        if held:
            factors = torch.where(labels, weights, -weights)[torch.tensor(groups[:held])]
            if (factors != factors[:, :1]).any():
                # A loss of another package that looks at more of a pair than its margin.
                for batch in micro_batches[:held]:
                    del batch[HELD_KEY]
        for rows, batch in zip(groups, micro_batches, strict=True):
            batch[WEIGHT_KEY] = weights[rows]
        return micro_batches

    def _collate(self, sequences: Sequences, rows: Any) -> dict[str, Any]:
        multiple = getattr(self.data_collator, "pad_to_multiple_of", None) or 1
        batch = sequences.collate(rows, self._tokenizer.pad_token_id, multiple)
        return {name: values.to(self.args.device) for name, values in batch.items()}

    def _keeps_graph(self) -> bool:
        """Whether the micro-batch that is scored last is scored with gradient, and so needs no
        second forward pass. Its backward pass comes next, so no two graphs are held at once."""
        return why_graph_is_not_kept(self) is None

    def _gradients_to_hold(self, batches: list[dict[str, Any]]) -> int:
        """How many micro-batches are scored along with their gradient, which is held until the
        transport move says by what it is multiplied: those of one row, where the gradients fit."""
        # Settled (and told) here, while no reference has switched the adapter off.
        self._shares_prompts(self.model_wrapped)
        one_row = all(len(batch["input_ids"]) == self._sequences_per_row for batch in batches)
        if not one_row or why_gradients_are_not_held(self) is not None:
            return 0
        return min(len(batches), gradients_that_fit(self.model))

    def _trainable(self) -> list[nn.Parameter]:
        return trainable(self.model)

    def _logps_and_gradient(self, batch: dict[str, Any], labels: Tensor) -> tuple[Tensor, Gradient]:
        """Log-probabilities of one row's sequences, and the gradient of the first one's less the
        other one's (paired), whose factor is the first one's weight."""
        with self.compute_loss_context_manager():
            logps = self._policy_logps(self.model_wrapped, batch)
        score = torch.where(labels == labels[0], logps, -logps).sum()
        gradient = torch.autograd.grad(score, self._trainable(), allow_unused=True)
        return logps.detach(), gradient

    def _shares_prompts(self, model: nn.Module) -> Cost | None:
        """What decides where sequences with one prompt encode it once, None if nowhere; settled by
        the first ``model``, the policy or the reference, that is about to score any."""
        if self._layouts is None:
            with self._no_grad():
                self._layouts = settle_layouts(
                    model,
                    self.accelerator.unwrap_model(model),
                    self.args.max_length,
                    self.args.device,
                    checkpointing=self.args.gradient_checkpointing,
                    regrouped=self.args.aot_batch == "step",
                )
        if self.is_in_train and not self._told_speed:
            # Not before: what wraps the model is known now.
            self._told_speed = True
            LOG.info("speed: %s", speed_features(self, self._layouts.why_not_shared))
        return self._layouts.cost

    @contextlib.contextmanager
    def _no_grad(self) -> Iterator[None]:
        with (
            torch.no_grad(),
            self.compute_loss_context_manager(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            yield

    def _policy_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        head = self.model.get_output_embeddings()
        return sequence_logps(model, head, batch, self._shares_prompts(model))

    def _reference_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities under the frozen reference: the loaded reference model, or the policy
        ``model`` with its adapter disabled (or exchanged for TRL's frozen copy "ref")."""
        with self._no_grad():
            if self.ref_model is not None:
                unwrapped = self.accelerator.unwrap_model(self.ref_model)
                head = unwrapped.get_output_embeddings()
                return sequence_logps(self.ref_model, head, batch, self._shares_prompts(model))
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapters = getattr(unwrapped, "peft_config", None)
            if adapters is None:  # the precomputing pass of full fine-tuning: before step 1
                return self._policy_logps(model, batch)
            with use_adapter(unwrapped, adapter_name="ref" if "ref" in adapters else None):
                return self._policy_logps(model, batch)

    # Move 2: transport.

    def _transport(
        self, logps: Tensor, ref_logps: Tensor, labels: Tensor, distinct: Tensor
    ) -> Tensor:
        """dL/dlogp of this rank's sequences (float32), scaled against the host's averaging over
        micro-batches and ranks; keeps the loss and reports the step. A repeated row has mass 0."""
        rows = torch.stack([logps.detach(), ref_logps, labels, distinct], dim=1).double()
        mine = slice(0, len(rows))
        per_step = self.args.aot_batch == "step"
        averaged = self._micro_batches * self.accelerator.num_processes
        if per_step:
            problems = 1
            rows, mine = self._gather(rows)
        else:
            problems = averaged - self._empty_micro_batches
        self._check_finite(rows)
        counts = rows[:, 3].bool()
        gradient = torch.zeros_like(rows[:, 0])
        self._step_loss = 0.0
        if counts.any():
            leaf = rows[counts, 0].requires_grad_()
            step = self._step_class.from_sequences(leaf, rows[counts, 1], rows[counts, 2].bool())
            with torch.enable_grad():
                loss = self._loss(step, self._loss_options)
                (gradient[counts],) = torch.autograd.grad(loss, leaf)
            # Every micro-batch brings the loss of the step, or its own to the mean over them.
            self._step_loss = loss.item() * (1 if per_step else averaged / problems)
            self._report(step)
        return (gradient[mine] * (averaged / problems)).to(logps.dtype)

    def _gather(self, rows: Tensor) -> tuple[Tensor, slice]:
        """The rows of all ranks (their numbers may differ), and where this rank's stand."""
        if self.accelerator.num_processes == 1:
            return rows, slice(0, len(rows))
        sizes = self.accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padded = self.accelerator.pad_across_processes(rows, dim=0)
        parts = self.accelerator.gather(padded).split(max(sizes))
        start = sum(sizes[: self.accelerator.process_index])
        everything = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return everything, slice(start, start + len(rows))

    def _check_finite(self, rows: Tensor) -> None:
        # Every rank sees the same gathered rows, so all of them raise and none is left waiting.
        bad = ~torch.isfinite(rows).all(dim=1)
        if bad.any():
            raise FloatingPointError(
                f"{int(bad.sum())} of {len(rows)} sequence log-probabilities are NaN or infinite "
                f"in step {self.state.global_step + 1}; lower the learning rate, or look at the "
                "precision (bf16 instead of fp16) and at the rows of this step"
            )

    # Move 3: backward.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The surrogate whose gradient is the step's: sum of weight x logp(theta)."""
        if HELD_KEY in inputs:
            return held_surrogate(inputs[WEIGHT_KEY][0], inputs[HELD_KEY], self._trainable())
        if LOGPS_KEY in inputs:
            return (inputs[WEIGHT_KEY] * inputs[LOGPS_KEY]).sum()
        if WEIGHT_KEY in inputs:
            head = self.model.get_output_embeddings()
            weights = inputs[WEIGHT_KEY]
            return weighted_logps_sum(model, head, inputs, weights, self._shares_prompts(model))
        logps = self._policy_logps(model, inputs)
        if self.precompute_ref_logps:
            ref_logps = self._cached_ref_logps(inputs)
        else:
            ref_logps = self._reference_logps(model, inputs)
        columns = ref_logps, self._labels(inputs), self._distinct(inputs)
        return (self._transport(logps, *columns) * logps).sum()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The host's step on the surrogate, with the true loss as its value: the host logs the
        sum over micro-batches, averaged over ranks."""
        try:
            surrogate = super().training_step(*args, **kwargs)
        except BaseException:
            # Whoever catches it (out of memory: train on with less) gets the step's memory back.
            self._step.clear()
            raise
        return torch.full_like(surrogate, self._step_loss / self._micro_batches)

    # Move 4: report.

    def _report(self, step: StepLogps) -> None:
        metrics = self._metrics["train"]
        u, v = step.u.detach(), step.v.detach()
        if len(u) == 0 or len(v) == 0:
            self._one_sided_steps += 1
            if self._one_sided_steps == 1:
                LOG.warning(
                    "step %d holds no %s rows and contributes nothing; `aot/one_sided_steps` "
                    "counts such steps. A larger effective batch makes them rare",
                    self.state.global_step + 1,
                    "positive" if len(u) == 0 else "negative",
                )
        else:
            for name, value in self._statistics(step).items():
                metrics[name].append(value)
        metrics["aot/one_sided_steps"] = [float(self._one_sided_steps)]
        metrics["aot/sorted_u"].append(float(len(u)))
        metrics["aot/sorted_v"].append(float(len(v)))

    def _statistics(self, step: StepLogps) -> dict[str, float]:
        """Dominance of U over V (in nats), and the reward metrics that TRL's trainers log."""
        u, v = step.u.detach(), step.v.detach()
        stats = dominance_statistics(u.cpu().numpy(), v.cpu().numpy())
        metrics = {f"aot/{name}": value for name, value in stats.items()}
        if isinstance(step, PairedLogps):
            metrics["aot/recoupled_fraction"] = recoupled_fraction(u, v)
            chosen = (step.chosen - step.ref_chosen).detach() * self.beta
            rejected = (step.rejected - step.ref_rejected).detach() * self.beta
            metrics["rewards/accuracies"] = (chosen > rejected).double().mean().item()
            metrics["logps/chosen"] = step.chosen.mean().item()
            metrics["logps/rejected"] = step.rejected.mean().item()
        else:
            chosen, rejected = u * self.beta, v * self.beta
            metrics["logps/chosen"] = step.logps[step.is_positive].mean().item()
            metrics["logps/rejected"] = step.logps[~step.is_positive].mean().item()
        metrics["rewards/chosen"] = chosen.mean().item()
        metrics["rewards/rejected"] = rejected.mean().item()
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics

    # Evaluation: one transport problem over the whole set.

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        # `axolotl evaluate` knows no step: it must not write over the evaluation before the first.
        self._eval_name = metric_key_prefix if self.is_in_train else "evaluate"
        return super().evaluation_loop(
            dataloader, description, False, ignore_keys, metric_key_prefix
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Per data row: (logp, reference logp, label, completion tokens) of each sequence."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logps = self._policy_logps(model, inputs)
        if self.precompute_ref_logps:
            ref_logps = self._cached_ref_logps(inputs)
        else:
            ref_logps = self._reference_logps(model, inputs)
        tokens = inputs["completion_mask"][:, 1:].sum(dim=1)
        columns = torch.stack([logps, ref_logps, self._labels(inputs), tokens], dim=1).double()
        per_row = columns.unflatten(0, (self._sequences_per_row, -1)).transpose(0, 1)
        return None, per_row.contiguous(), torch.ones(len(per_row), device=per_row.device)

    def _evaluate_columns(self, prediction: EvalPrediction) -> dict[str, float]:
        columns = np.asarray(prediction.predictions, dtype=np.float64)
        rows = torch.from_numpy(columns).flatten(0, 1)
        self._check_finite(rows)
        step = self._step_class.from_sequences(rows[:, 0], rows[:, 1], rows[:, 2].bool())
        metrics = {"loss": self._loss(step, self._loss_options).item()}
        if len(step.u) == 0 or len(step.v) == 0:
            LOG.warning("the evaluation set holds one label only: there is nothing to compare")
            return metrics
        metrics |= self._statistics(step)
        if self.args.aot_report and self.is_world_process_zero():
            metrics |= self._record(columns)
        return metrics

    def _scores(self, columns: np.ndarray, **common: Any) -> Scores:
        """``Scores`` of the rows of ``prediction_step``, [rows, sequences per row, 4]."""
        raise NotImplementedError

    def _record(self, columns: np.ndarray) -> dict[str, float]:
        """Write the evaluation and its quantile plot into the output directory, hand the plot to
        the loggers that take images; returns the bootstrap intervals for the log."""
        step = self.state.global_step
        scores = self._scores(columns, beta=self.beta, step=step, eval_set=self._eval_name)
        written = record_evaluation(scores, self.args.output_dir)
        if "plot" in written:
            log_figure_to_loggers(
                written["plot"], step, self.args.report_to, self.callback_handler.callbacks
            )
        if "summary" not in written:
            return {}
        intervals = json.loads(written["summary"].read_text())["margins"]["intervals"]
        return {
            f"aot/{name}_{end}": value
            for name in ("violation_fraction", "violation_amount")
            for end, value in zip(("low", "high"), intervals[name], strict=True)
        }


class AOTPairedTrainer(AOTTrainerMixin, AxolotlDPOTrainer):
    """AOT on preference pairs, over the host's DPO trainer (data, adapters, reference)."""

    _mode = "paired"
    _step_class = PairedLogps
    _sequences_per_row = 2

    def __init__(self, *args: Any, data_collator: Any = None, **kwargs: Any) -> None:
        # The host's own, which `pad_to_multiple_of` brings, asks for columns that TRL no longer
        # writes. TRL's does the same with those that it does.
        if isinstance(data_collator, AxolotlDPODataCollatorWithPadding):
            data_collator = None
        super().__init__(*args, data_collator=data_collator, **kwargs)

    def _labels(self, batch: dict[str, Any]) -> Tensor:
        # TRL's collator puts the chosen responses of a batch before the rejected ones.
        n = len(batch["input_ids"])
        return torch.arange(n, device=batch["input_ids"].device) < n // 2

    def _cached_ref_logps(self, batch: dict[str, Any]) -> Tensor:
        return torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])

    def _compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """What TRL calls to precompute (and cache on disk) the reference log-probabilities."""
        return self._reference_logps(model, inputs).chunk(2)

    def _scores(self, columns: np.ndarray, **common: Any) -> Scores:
        chosen, rejected = columns[:, 0], columns[:, 1]
        return Scores.paired(
            chosen_logps=chosen[:, 0],
            rejected_logps=rejected[:, 0],
            ref_chosen_logps=chosen[:, 1],
            ref_rejected_logps=rejected[:, 1],
            chosen_tokens=chosen[:, 3],
            rejected_tokens=rejected[:, 3],
            **common,
        )


class AOTUnpairedTrainer(AOTTrainerMixin, AxolotlKTOTrainer):
    """AOT on labelled rows, over the host's KTO trainer (data, adapters, reference)."""

    _mode = "unpaired"
    _step_class = UnpairedLogps
    _sequences_per_row = 1

    def __init__(self, model: Any, ref_model: Any = None, **kwargs: Any) -> None:
        if ref_model is None and not kwargs["args"].precompute_ref_log_probs:
            ref_model = loaded_after(model)
        super().__init__(model, ref_model, **kwargs)

    def _labels(self, batch: dict[str, Any]) -> Tensor:
        return torch.as_tensor(batch["label"], device=batch["input_ids"].device).bool()

    def _cached_ref_logps(self, batch: dict[str, Any]) -> Tensor:
        return batch["ref_logps"]

    def _compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """What TRL calls to precompute (and cache on disk) the reference log-probabilities."""
        return self._reference_logps(model, inputs), None

    def _scores(self, columns: np.ndarray, **common: Any) -> Scores:
        logps, ref_logps, label, tokens = columns[:, 0].T
        return Scores.unpaired(
            logps=logps, ref_logps=ref_logps, label=label.astype(bool), tokens=tokens, **common
        )

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
