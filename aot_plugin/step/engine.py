"""One optimizer step: score, transport, backward.

The loss L of a step is a function of one vector, the log-probabilities of all its sequences:

1. *Score* every sequence of the step under policy and reference.
2. *Transport*: gather the scores of all ranks, compute L and dL/dlogp for every sequence.
3. *Backward*: for each micro-batch, back-propagate sum_i (dL/dlogp_i) logp_i(theta) with constant
   dL/dlogp_i. By the chain rule the accumulated gradient is dL/dtheta of the whole step.

This is GradCache (Gao et al. 2021, arXiv 2101.06983, sec. 3.2) applied to sequence scores. After
stage 2 each sequence has a fixed weight, so sequences can be regrouped into other micro-batches.

A step of a single micro-batch is scored in stage 3, in the host's own forward pass. So is every
micro-batch with ``aot_batch: micro_batch``, where each one is a transport problem of its own.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from ..ot.losses import LossOptions, PairedLogps, StepLogps, StepLoss, UnpairedLogps
from ..scoring.batching import Sequences
from ..scoring.model_input import MORE, Batch, is_divisible
from ..scoring.scorer import Scorer, free_memory, halved, padded_tokens
from .budget import (
    CARRIES,
    HOLD,
    KEEP,
    RESCORE,
    Budget,
    GraphSizes,
    Permits,
    allot,
    gradients_that_fit,
    graphs_come_first,
    measured,
    trainable,
)
from .carry import Carry, HoldGradient, KeepGraph, Rescore
from .metrics import prediction_metrics
from .record import Problem, StepRecord, emit, is_watched

LOG = logging.getLogger(f"axolotl.{__name__}")


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that the host collated into one batch.

    Attributes:
        inputs: token ids and masks, and what belongs to images.
        label: [sequences]; 1 for a chosen (paired) or positive (unpaired) sequence, 0 for a
            rejected or negative one, and between them the level of a graded one.
        tokens: [sequences] int64; completion tokens.
        mass: [sequences] float64; relative mass in the loss, the same for the sequences of a row,
            and 0 for a repeated row.
        ref_logps: [sequences] float32, in nats; None if the reference has not been scored yet.
    """

    inputs: Batch
    label: Tensor
    tokens: Tensor
    mass: Tensor
    ref_logps: Tensor | None

    def __len__(self) -> int:
        return len(self.label)

    def reference_logps(self, scorer: Scorer, policy: nn.Module | None = None) -> Tensor:
        """``ref_logps``, or those that the reference gives now (``policy`` as in ``Scorer``)."""
        if self.ref_logps is not None:
            return self.ref_logps
        return scorer.reference_logps(self.inputs, policy)

    def take(self, rows: Sequence[int], inputs: Batch) -> "MicroBatch":
        """The sequences ``rows`` of this batch, with ``inputs`` as their token ids and masks."""
        index = torch.as_tensor(rows, device=self.label.device)
        ref_logps = None if self.ref_logps is None else self.ref_logps[index]
        return MicroBatch(
            inputs, self.label[index], self.tokens[index], self.mass[index], ref_logps
        )


@dataclass(frozen=True)
class Objective:
    """The loss of a step as a function of its sequences' log-probabilities.

    Attributes:
        loss: the function, built in or of another package.
        options: penalty, beta, and what else the YAML says about the loss.
        step_class: builds u and v from sequences.
        whole_step: True if all sequences of a step, over micro-batches and ranks, form one
            transport problem; False if each micro-batch of each rank does.
    """

    loss: StepLoss
    options: LossOptions
    step_class: type[PairedLogps] | type[UnpairedLogps]
    whole_step: bool

    def __call__(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        label: Tensor,
        tokens: Tensor,
        mass: Tensor | None = None,
    ) -> tuple[StepLogps, Tensor]:
        """The sequences as pairs or labelled rows, and their loss, [] float64, for float64
        log-probabilities [sequences]."""
        step = self.step_class.from_sequences(logps, ref_logps, label, tokens, mass)
        return step, self.loss(step, self.options)


@dataclass
class _Work:
    """Sequences whose contribution to the gradient is still to be computed.

    Attributes:
        batch: the sequences.
        carry: what takes them from score to gradient.
        weights: dL/dlogp, [sequences] float32; None before the transport stage.
    """

    batch: MicroBatch
    carry: Carry
    weights: Tensor | None = None


@dataclass
class _Group:
    """Sequences of a step that are scored together.

    Attributes:
        rows: their indices in the step.
        batch: the sequences.
        shape: rows and width of the model's input; None if that is of no use.
        kind: of the carry.
    """

    rows: list[int]
    batch: MicroBatch
    shape: tuple[int, int] | None
    kind: str = RESCORE


class StepEngine:
    """Runs the optimizer steps of a training run.

    The gradient is a sum over sequences, so a micro-batch that does not fit into memory can be cut
    (``retry``).

    Args:
        scorer: scores batches under policy and reference.
        objective: the loss.
        model: the unwrapped policy; its trainable parameters are those that gradients refer to.
        budget: memory for kept graphs.
        gather: maps this rank's rows to (rows of all ranks, slice of this rank's).
        ranks: number of ranks.
        permits: returns which carries are allowed; called once per step.
        collate: builds a batch from ``Sequences`` and the indices of some of them.
        report: called with each transport problem after it is solved, and the
            ``prediction_metrics`` of its sequences.
    """

    def __init__(
        self,
        scorer: Scorer,
        objective: Objective,
        model: nn.Module,
        budget: Budget,
        *,
        gather: Callable[[Tensor], tuple[Tensor, slice]],
        ranks: int,
        permits: Callable[[], Permits],
        collate: Callable[[Sequences, Sequence[int]], Batch],
        report: Callable[[StepLogps, dict[str, float]], None],
    ) -> None:
        self._scorer, self._objective, self._model = scorer, objective, model
        self._budget, self._graphs = budget, GraphSizes()
        self._gather, self._ranks, self._permits = gather, ranks, permits
        self._collate, self._report = collate, report
        self._permitted = Permits(None, None)
        self._due: dict[int, list[_Work]] = {}
        self._done: list[_Work] = []
        self._fits: float = math.inf  # padded tokens that a backward pass has memory for
        self._can_retry = False
        self._record = StepRecord(0, 0)
        self._micro_batches, self._problems = 1, 1
        self._loss = 0.0

    @property
    def mean_loss(self) -> float:
        """The step's loss divided by its number of micro-batches, since the host sums what
        ``training_step`` returns over micro-batches and averages it over ranks."""
        return self._loss / self._micro_batches

    def begin(self, batches: Sequence[MicroBatch], empty: int, step: int) -> None:
        """Stages 1 and 2.

        Args:
            batches: this rank's micro-batches.
            empty: number of micro-batches, over all ranks, that contain repeated rows only.
            step: number of the step in the run, from 1.

        Raises:
            FloatingPointError: on all ranks, if a log-probability that it scores is not finite.
        """
        started = time.perf_counter()
        self._micro_batches = len(batches)
        averaged = len(batches) * self._ranks
        self._problems = 1 if self._objective.whole_step else averaged - empty
        self._permitted = self._permits()
        self._done, self._can_retry = [], False
        self._scorer.take_passes()
        self._record = StepRecord(step, len(batches))
        if is_watched():
            ids = Sequences.from_batches([batch.inputs for batch in batches]).input_ids
            self._record.sequences = [row.tolist() for row in ids]
        if self._objective.whole_step and len(batches) > 1:
            works = self._score_and_weigh(batches)
        else:
            works = [
                _Work(batch, self._carry(KEEP if self._fit(batch.inputs) else RESCORE, batch))
                for batch in batches
            ]
            ends = list(accumulate((len(batch) for batch in batches), initial=0))
            self._record.groups = [list(range(*both)) for both in pairwise(ends)]
        self._record.carries = [type(work.carry).__name__ for work in works]
        self._due = {number: self._cut(work) for number, work in enumerate(works)}
        self._record.seconds = time.perf_counter() - started

    def surrogate(self, number: int) -> Tensor:
        """Stage 3: a scalar (float32) whose gradient is what micro-batch ``number`` (from 0), or a
        part of it, contributes to the step's. To be called as long as it ``is_due``.

        Raises:
            FloatingPointError: if a log-probability that it scores is not finite.
        """
        due = self._due[number]
        work = due.pop(0)
        # A failed pass is done again from scratch, so nothing of it is kept.
        self._done.append(_Work(work.batch, self._carry(RESCORE, work.batch), work.weights))
        # The last pass of the step, by which DDP synchronizes gradients.
        wrapped = number == self._micro_batches - 1 and not due
        # Other ranks wait in it: for this rank's buffers, and then for its gradients.
        synchronizes = wrapped and self._permitted.synchronizes
        self._can_retry = (
            self._permitted.may_retry
            and not synchronizes
            and (is_divisible(work.batch.inputs) or not isinstance(work.carry, Rescore))
        )
        if work.weights is None:
            logps, watched = work.carry.score(wrapped)
            ref_logps = work.batch.reference_logps(self._scorer)
            work.weights = self._transport(logps, ref_logps, watched, work.batch)
            self._done[-1].weights = work.weights
            if isinstance(work.carry, Rescore) and not self._fit(work.batch.inputs):
                self._done.pop()
                due[:0] = self._cut(work)
                return self.surrogate(number)
        return work.carry.surrogate(work.weights, wrapped)

    def is_due(self, number: int) -> bool:
        """Whether something of micro-batch ``number`` is left to do."""
        return bool(self._due[number])

    def finish(self, number: int) -> None:
        """To be called after the backward passes of micro-batch ``number``."""
        self._can_retry = False
        if number == self._micro_batches - 1:
            self._done = []
            self._budget.step_ended()
            self._record.passes = self._scorer.take_passes()
            self._record.loss = self._loss
            emit(self._record)

    @property
    def can_retry(self) -> bool:
        """After an out-of-memory error: False if smaller parts can't help, or if the other ranks
        can't be kept in step."""
        return self._can_retry

    def retry(self, number: int) -> None:
        """Makes all of the step up to micro-batch ``number`` due again, in parts that fit.

        To be called after an out-of-memory error in micro-batch ``number``, if ``can_retry``. A
        backward pass that failed may have added to the gradients, so they must be set to 0.
        """
        failed = self._done[-1]
        then = "the step goes on without kept graphs"
        if is_divisible(failed.batch.inputs):
            self._fits = min(self._fits, padded_tokens(failed.batch.inputs) - 1)
            then = "they are cut in two, and so will be others as large"
        LOG.warning(
            "step %d ran out of memory in the backward pass of %d sequences of %d tokens; %s. The "
            "result stays exact; a smaller `micro_batch_size` is faster",
            self._record.step,
            *failed.batch.inputs["input_ids"].shape,
            then,
        )
        self._due[number], self._done = [*self._done, *self._due[number]], []
        # Later micro-batches, too: each failure makes the step begin anew.
        for later, works in self._due.items():
            for work in works:
                work.carry = self._carry(RESCORE, work.batch)
            self._due[later] = [part for work in works for part in self._cut(work)]
        self._budget.lower(self._record.kept_bytes)
        self._record.retries += 1
        free_memory()

    def abandon(self) -> None:
        """Frees the graphs, gradients and batches of a step that failed."""
        self._can_retry = False
        self._due.clear()
        self._done.clear()

    def _cut(self, work: _Work) -> list[_Work]:
        """The work in parts that fit into memory; as it is, if it has no weights yet."""
        n, weights = len(work.batch), work.weights
        if weights is None or self._fit(work.batch.inputs):
            return [work]
        halves = []
        rows = (range(n // 2), range(n // 2, n))
        for part, inputs in zip(rows, halved(work.batch.inputs), strict=True):
            batch = work.batch.take(part, inputs)
            half = _Work(batch, self._carry(RESCORE, batch), weights[part.start : part.stop])
            halves += self._cut(half)
        return halves

    def _fit(self, batch: Batch) -> bool:
        """False if a backward pass as large has failed, and the batch can be cut."""
        return not is_divisible(batch) or padded_tokens(batch) <= self._fits

    def _score_and_weigh(self, batches: Sequence[MicroBatch]) -> list[_Work]:
        """Stages 1 and 2 of a step of several micro-batches; its work in the order of stage 3."""
        step = _joined(batches)
        groups = self._plan(batches, step)
        carries = [self._carry(group.kind, group.batch) for group in groups]
        logps = torch.empty(len(step), device=step.label.device)
        ref_logps = torch.empty_like(logps)
        watched = logps.new_empty(len(step), 2)

        def score(number: int) -> None:
            group = groups[number]
            # Reference first, so that no graph of this micro-batch is alive then.
            ref_logps[group.rows] = group.batch.reference_logps(self._scorer)
            scored = self._measured_score(carries[number], group)
            logps[group.rows], watched[group.rows] = scored

        # Graphs are kept for the passes that run last, in reverse: the last graph made is the first
        # one to be back-propagated.
        held = sum(group.kind == HOLD for group in groups)
        for number in (*range(held), *reversed(range(held, len(groups)))):
            try:
                score(number)
                continue
            except torch.OutOfMemoryError:
                keeps = any(not isinstance(carry, Rescore) for carry in carries)
                if not (self._permitted.may_retry and keeps):
                    raise
            # Only now, since the exception held the tensors of the failed pass.
            LOG.warning(
                "step %d ran out of memory while it kept graphs or gradients of scoring passes; it "
                "goes on without, and later steps keep half as much. The result stays exact",
                self._record.step,
            )
            carries[:] = [self._carry(RESCORE, group.batch) for group in groups]
            self._budget.lower(self._record.kept_bytes)
            self._record.retries += 1
            free_memory()
            score(number)
        weights = self._transport(logps, ref_logps, watched, step)
        self._record.groups = [group.rows for group in groups]
        self._record.held_bytes = sum(c.nbytes for c in carries if isinstance(c, HoldGradient))
        return [
            _Work(group.batch, carry, weights[group.rows])
            for group, carry in zip(groups, carries, strict=True)
        ]

    def _plan(self, batches: Sequence[MicroBatch], step: MicroBatch) -> list[_Group]:
        """The sequences of ``step`` in as many new micro-batches as ``batches``: those with held
        gradients first, then those with kept graphs."""
        row = self._objective.step_class.sequences_per_row
        permits, fit = self._permitted, 0
        if permits.why_no_held_gradients is None and all(len(batch) == row for batch in batches):
            fit = gradients_that_fit(self._model)
        keeps = permits.why_no_kept_graph is None
        groups = []
        for rows, inputs in self._regrouped(batches, row if fit else None):
            shape = self._scorer.shape(inputs) if keeps else None
            groups.append(_Group(rows, step.take(rows, inputs), shape))
        shapes = [group.shape for group in groups if group.shape is not None]
        graphs = [self._graphs.predict(*shape) for shape in shapes] or [math.inf] * len(groups)
        budget = self._budget.of_step(max(math.prod(shape) for shape in shapes)) if keeps else 0.0
        first = graphs_come_first(step.label.device)
        kinds = allot(graphs, permits, fit=fit, budget=budget, graphs_first=first)
        for group, kind in zip(groups, kinds, strict=True):
            group.kind = kind if self._fit(group.batch.inputs) else RESCORE
        return sorted(groups, key=lambda group: CARRIES.index(group.kind))

    def _regrouped(
        self, batches: Sequence[MicroBatch], size: int | None
    ) -> Iterator[tuple[list[int], Batch]]:
        """The sequences of a step in new micro-batches of ``size`` consecutive ones, or if it is
        None, in those of the layout; each with its indices in the step.

        With images the micro-batches stay as they came.
        """
        if any(MORE in batch.inputs for batch in batches):
            ends = accumulate((len(batch) for batch in batches), initial=0)
            for batch, both in zip(batches, pairwise(ends), strict=True):
                yield list(range(*both)), batch.inputs
            return
        sequences = Sequences.from_batches([batch.inputs for batch in batches])
        if size is not None:
            # Longest first: memory peaks before any gradient is held.
            lengths = sequences.lengths()
            split = [list(range(i, i + size)) for i in range(0, len(sequences), size)]
            split.sort(key=lambda rows: -sum(lengths[row] for row in rows))
        else:
            split = self._scorer.settled().layout.groups(sequences, len(batches))
        for rows in split:
            yield rows, self._collate(sequences, rows)

    def _carry(self, kind: str, batch: MicroBatch) -> Carry:
        if kind == HOLD:
            signs = torch.where(batch.label == batch.label[0], 1.0, -1.0)
            return HoldGradient(self._scorer, batch.inputs, signs, trainable(self._model))
        return (KeepGraph if kind == KEEP else Rescore)(self._scorer, batch.inputs)

    def _measured_score(self, carry: Carry, group: _Group) -> tuple[Tensor, Tensor]:
        """The scores of a micro-batch before stage 3. Takes note of how large its graph is, if it
        is kept and none for rows as wide has been measured."""
        if not isinstance(carry, KeepGraph):
            return carry.score(wrapped=False)
        assert group.shape is not None
        rows, width = group.shape
        if self._graphs.covers(width):
            scored = carry.score(wrapped=False)
        else:
            with measured(group.batch.label.device) as made:
                scored = carry.score(wrapped=False)
            self._graphs.learn(rows, width, made.nbytes)
        self._record.kept_bytes += int(self._graphs.predict(rows, width))
        return scored

    def _transport(
        self, logps: Tensor, ref_logps: Tensor, watched: Tensor, batch: MicroBatch
    ) -> Tensor:
        """Stage 2: dL/dlogp of this rank's sequences, [sequences] float32, multiplied by what the
        host divides by (micro-batches x ranks). Repeated rows get 0."""
        columns = [logps.detach(), ref_logps, batch.label, batch.tokens, batch.mass]
        rows = torch.cat([torch.stack(columns, dim=1), watched], dim=1).double()
        mine = slice(0, len(rows))
        if self._objective.whole_step:
            rows, mine = self._gather(rows)
        # All ranks check the same gathered rows, so all raise together and none deadlocks.
        check_finite(rows[:, :2], f"step {self._record.step}")
        counts = rows[:, 4] > 0
        gradient = torch.zeros_like(rows[:, 0])
        averaged = self._micro_batches * self._ranks
        self._loss = 0.0
        if counts.any():
            counted = rows[counts]
            leaf, ref_logps, label, tokens, mass = counted[:, :5].unbind(dim=1)
            leaf = leaf.clone().requires_grad_()
            with torch.enable_grad():
                solved, loss = self._objective(leaf, ref_logps, label, tokens, mass)
                (gradient[counts],) = torch.autograd.grad(loss, leaf)
            # The host averages: over equal values of one problem, or over one problem each.
            whole = self._objective.whole_step
            self._loss = loss.item() * (1 if whole else averaged / self._problems)
            self._report(solved, prediction_metrics(counted[:, 5:], label == 1, tokens, mass))
            if is_watched():
                own = batch.mass > 0
                positives = int(((batch.label == 1) & own).sum())
                sizes = len(solved.u), len(solved.v), positives, int(own.sum())
                self._record.problems.append(Problem(*sizes))
        return (gradient[mine] * (averaged / self._problems)).to(logps.dtype)


def check_finite(rows: Tensor, where: str) -> None:
    """Raises FloatingPointError if a row of [sequences, columns] is not finite."""
    bad = ~torch.isfinite(rows).all(dim=1)
    if bad.any():
        raise FloatingPointError(
            f"{int(bad.sum())} of {len(rows)} sequence log-probabilities are NaN or infinite "
            f"in {where}; lower the learning rate, or look at the precision (bf16 instead of fp16) "
            "and at the rows"
        )


def _joined(batches: Sequence[MicroBatch]) -> MicroBatch:
    """All sequences of a step as one ``MicroBatch`` without ``inputs``."""
    cached = [batch.ref_logps for batch in batches if batch.ref_logps is not None]
    return replace(
        batches[0],
        inputs={},
        label=torch.cat([batch.label for batch in batches]),
        tokens=torch.cat([batch.tokens for batch in batches]),
        mass=torch.cat([batch.mass for batch in batches]),
        ref_logps=torch.cat(cached) if cached else None,
    )
