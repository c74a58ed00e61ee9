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

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from ..ot.losses import LossOptions, PairedLogps, StepLogps, StepLoss, UnpairedLogps
from ..scoring.batching import Sequences
from ..scoring.model_input import Batch
from ..scoring.scorer import Scorer
from .budget import Permits, allot, gradients_that_fit, trainable
from .carry import Carry, HoldGradient, KeepGraph, Rescore
from .record import Problem, StepRecord, emit, is_watched


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that the host collated into one batch.

    Attributes:
        inputs: token ids and masks.
        is_positive: [sequences] bool; True for a chosen (paired) or positive (unpaired) sequence.
        counts: [sequences] bool; False for a repeated row, which has mass 0 in the loss.
        ref_logps: [sequences] float32, in nats; None if the reference has not been scored yet.
    """

    inputs: Batch
    is_positive: Tensor
    counts: Tensor
    ref_logps: Tensor | None

    def __len__(self) -> int:
        return len(self.is_positive)

    def reference_logps(self, scorer: Scorer, policy: nn.Module | None = None) -> Tensor:
        """``ref_logps``, or those that the reference gives now (``policy`` as in ``Scorer``)."""
        if self.ref_logps is not None:
            return self.ref_logps
        return scorer.reference_logps(self.inputs, policy)

    def take(self, rows: Sequence[int], inputs: Batch) -> "MicroBatch":
        """The sequences ``rows`` of this batch, with ``inputs`` as their token ids and masks."""
        index = torch.as_tensor(rows, device=self.is_positive.device)
        ref_logps = None if self.ref_logps is None else self.ref_logps[index]
        return MicroBatch(inputs, self.is_positive[index], self.counts[index], ref_logps)


@dataclass(frozen=True)
class Objective:
    """The loss of a step as a function of its sequences' log-probabilities.

    Attributes:
        loss: the function, built in or of another package.
        options: penalty, beta, sort and label smoothing.
        step_class: builds u and v from sequences.
        whole_step: True if all sequences of a step, over micro-batches and ranks, form one
            transport problem; False if each micro-batch of each rank does.
    """

    loss: StepLoss
    options: LossOptions
    step_class: type[PairedLogps] | type[UnpairedLogps]
    whole_step: bool

    def __call__(
        self, logps: Tensor, ref_logps: Tensor, is_positive: Tensor
    ) -> tuple[StepLogps, Tensor]:
        """The sequences as pairs or labelled rows, and their loss, [] float64, for float64
        log-probabilities [sequences]."""
        step = self.step_class.from_sequences(logps, ref_logps, is_positive)
        return step, self.loss(step, self.options)


class StepEngine:
    """Runs the optimizer steps of a training run.

    Args:
        scorer: scores batches under policy and reference.
        objective: the loss.
        model: the unwrapped policy; its trainable parameters are those that gradients refer to.
        gather: maps this rank's rows to (rows of all ranks, slice of this rank's).
        ranks: number of ranks.
        permits: returns which carries are allowed; called once per step.
        collate: builds a batch from ``Sequences`` and the indices of some of them.
        report: called with each transport problem after it is solved.
    """

    def __init__(
        self,
        scorer: Scorer,
        objective: Objective,
        model: nn.Module,
        *,
        gather: Callable[[Tensor], tuple[Tensor, slice]],
        ranks: int,
        permits: Callable[[], Permits],
        collate: Callable[[Sequences, Sequence[int]], Batch],
        report: Callable[[StepLogps], None],
    ) -> None:
        self._scorer, self._objective, self._model = scorer, objective, model
        self._gather, self._ranks, self._permits = gather, ranks, permits
        self._collate, self._report = collate, report
        self._due: dict[int, tuple[Carry, MicroBatch, Tensor | None]] = {}
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
            FloatingPointError: on all ranks, if any log-probability is not finite.
        """
        started = time.perf_counter()
        self._micro_batches = len(batches)
        averaged = len(batches) * self._ranks
        self._problems = 1 if self._objective.whole_step else averaged - empty
        self._scorer.take_passes()
        self._record = StepRecord(step, len(batches))
        if is_watched():
            ids = Sequences.from_batches([batch.inputs for batch in batches]).input_ids
            self._record.sequences = [row.tolist() for row in ids]
        if self._objective.whole_step and len(batches) > 1:
            self._due = self._score_and_weigh(batches)
        else:
            kept = (KeepGraph(self._scorer, batch.inputs) for batch in batches)
            pairs = enumerate(zip(kept, batches, strict=True))
            self._due = {number: (carry, batch, None) for number, (carry, batch) in pairs}
            ends = list(accumulate((len(batch) for batch in batches), initial=0))
            self._record.groups = [list(range(*both)) for both in pairwise(ends)]
        self._record.carries = [type(carry).__name__ for carry, _, _ in self._due.values()]
        self._record.seconds = time.perf_counter() - started

    def surrogate(self, number: int) -> Tensor:
        """Stage 3: a scalar (float32) whose gradient is the contribution of micro-batch ``number``
        to the step's gradient. Call once per micro-batch, from 0."""
        carry, batch, weights = self._due.pop(number)
        if weights is None:
            logps = carry.score()
            weights = self._transport(logps, batch.reference_logps(self._scorer), batch)
        surrogate = carry.surrogate(weights)
        if not self._due:
            self._record.passes = self._scorer.take_passes()
            self._record.loss = self._loss
            emit(self._record)
        return surrogate

    def abandon(self) -> None:
        """Frees the graphs, gradients and batches of a step that failed."""
        self._due.clear()

    def _score_and_weigh(
        self, batches: Sequence[MicroBatch]
    ) -> dict[int, tuple[Carry, MicroBatch, Tensor | None]]:
        sequences = Sequences.from_batches([batch.inputs for batch in batches])
        step = _joined(batches)
        row = self._objective.step_class.sequences_per_row
        one_row_each = all(len(batch) == row for batch in batches)
        allotted = allot(
            len(batches), one_row_each, self._permits(), gradients_that_fit(self._model)
        )
        if allotted.held:
            # One row per micro-batch, longest first: memory peaks before any gradient is held.
            lengths = sequences.lengths()
            groups = [list(range(i, i + row)) for i in range(0, len(sequences), row)]
            groups.sort(key=lambda rows: -sum(lengths[row] for row in rows))
        else:
            groups = sequences.groups(len(batches), self._scorer.layouts().cost)
        parts = [step.take(rows, self._collate(sequences, rows)) for rows in groups]
        carries = [
            self._carry(part, number < allotted.held, number < allotted.held + allotted.kept)
            for number, part in enumerate(parts)
        ]
        logps = torch.empty(len(sequences), device=step.is_positive.device)
        ref_logps = torch.empty_like(logps)
        # The graph is kept for the pass that runs last: at most one graph is alive at a time.
        held = allotted.held
        for number in (*range(held), *reversed(range(held, len(groups)))):
            # Reference first, so that no graph is alive during its forward pass.
            ref_logps[groups[number]] = parts[number].reference_logps(self._scorer)
            logps[groups[number]] = carries[number].score()
        weights = self._transport(logps, ref_logps, step)
        self._record.groups = groups
        held_ones = (carry for carry in carries if isinstance(carry, HoldGradient))
        self._record.held_bytes = sum(carry.nbytes for carry in held_ones)
        return {
            number: (carry, part, weights[rows])
            for number, (carry, part, rows) in enumerate(zip(carries, parts, groups, strict=True))
        }

    def _carry(self, batch: MicroBatch, hold: bool, keep: bool) -> Carry:
        if hold:
            signs = torch.where(batch.is_positive == batch.is_positive[0], 1.0, -1.0)
            return HoldGradient(self._scorer, batch.inputs, signs, trainable(self._model))
        return (KeepGraph if keep else Rescore)(self._scorer, batch.inputs)

    def _transport(self, logps: Tensor, ref_logps: Tensor, batch: MicroBatch) -> Tensor:
        """Stage 2: dL/dlogp of this rank's sequences, [sequences] float32, multiplied by what the
        host divides by (micro-batches x ranks). Repeated rows get 0."""
        columns = [logps.detach(), ref_logps, batch.is_positive, batch.counts]
        rows = torch.stack(columns, dim=1).double()
        mine = slice(0, len(rows))
        if self._objective.whole_step:
            rows, mine = self._gather(rows)
        # All ranks check the same gathered rows, so all raise together and none deadlocks.
        check_finite(rows, f"step {self._record.step}")
        counts = rows[:, 3].bool()
        gradient = torch.zeros_like(rows[:, 0])
        averaged = self._micro_batches * self._ranks
        self._loss = 0.0
        if counts.any():
            leaf = rows[counts, 0].requires_grad_()
            with torch.enable_grad():
                solved, loss = self._objective(leaf, rows[counts, 1], rows[counts, 2].bool())
                (gradient[counts],) = torch.autograd.grad(loss, leaf)
            # The host averages: over equal values of one problem, or over one problem each.
            whole = self._objective.whole_step
            self._loss = loss.item() * (1 if whole else averaged / self._problems)
            self._report(solved)
            if is_watched():
                positives = int((batch.is_positive & batch.counts).sum())
                sizes = len(solved.u), len(solved.v), positives, int(batch.counts.sum())
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
        is_positive=torch.cat([batch.is_positive for batch in batches]),
        counts=torch.cat([batch.counts for batch in batches]),
        ref_logps=torch.cat(cached) if cached else None,
    )
