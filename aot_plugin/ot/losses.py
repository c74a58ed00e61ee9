"""Losses on the log-probabilities of one optimizer step (torch only).

A loss is a function (logps of the step, options) -> scalar. The trainer calls it once per step,
on the rows of all micro-batches and ranks, in float64, and takes the gradient with respect to the
policy's log-probabilities; nothing else of the model is visible here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .penalties import Penalty, smoothed
from .transport import OrderKind, SortKind, transport_value


@dataclass(frozen=True)
class PairedLogps:
    """n preference pairs.

    Attributes:
        chosen, rejected, ref_chosen, ref_rejected: sequence log-probabilities under policy and
            reference, each [n] float64, in nats.
        chosen_tokens, rejected_tokens: completion tokens, each [n] float64.
        mass: relative masses of the pairs, [n] float64; None if all are equal. Both u_i and v_i
            have the mass of pair i.
    """

    sequences_per_row: ClassVar[int] = 2

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    mass: Tensor | None = None

    @classmethod
    def from_sequences(
        cls,
        logps: Tensor,
        ref_logps: Tensor,
        label: Tensor,
        tokens: Tensor,
        mass: Tensor | None = None,
    ) -> "PairedLogps":
        """Pairs from 2n sequences: the i-th chosen one (label 1) belongs to the i-th rejected one
        (label 0), and has the same mass."""
        is_positive = label == 1
        columns = (logps, ref_logps, tokens)
        (chosen, ref_chosen, chosen_tokens), (rejected, ref_rejected, rejected_tokens) = (
            [column[rows] for column in columns] for rows in (is_positive, ~is_positive)
        )
        mass = unless_equal(mass)
        return cls(
            *(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens),
            mass=None if mass is None else mass[is_positive],
        )

    @property
    def u(self) -> Tensor:
        """Policy margins log pi(y+|x) - log pi(y-|x): the sample that should dominate."""
        return self.chosen - self.rejected

    @property
    def v(self) -> Tensor:
        """Reference margins: the sample that should be dominated."""
        return self.ref_chosen - self.ref_rejected

    def per_token(self) -> "PairedLogps":
        """The pairs with each log-probability divided by its number of completion tokens."""
        chosen, rejected = self.chosen_tokens.clamp(min=1), self.rejected_tokens.clamp(min=1)
        return replace(
            self,
            chosen=self.chosen / chosen,
            rejected=self.rejected / rejected,
            ref_chosen=self.ref_chosen / chosen,
            ref_rejected=self.ref_rejected / rejected,
        )

    @property
    def u_mass(self) -> Tensor | None:
        """Relative masses of u, [n]; None if all are equal."""
        return self.mass

    @property
    def v_mass(self) -> Tensor | None:
        """Relative masses of v, [n]; None if all are equal."""
        return self.mass

    @property
    def preferred(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities and completion tokens of the chosen responses, whose masses are those
        of u."""
        return self.chosen, self.chosen_tokens

    @property
    def comparisons(self) -> tuple["PairedLogps", ...]:
        """The transport problems of the step: one."""
        return (self,)


@dataclass(frozen=True)
class UnpairedLogps:
    """n positive and m negative rows, in any order.

    Attributes:
        logps, ref_logps: sequence log-probabilities under policy and reference, [n + m] float64, in
            nats.
        is_positive: [n + m] bool.
        tokens: completion tokens, [n + m] float64.
        mass: relative masses of the rows, [n + m] float64; None if all are equal. Only ratios among
            the positive rows and among the negative ones matter: each sample has total mass 1.
        level: levels of graded rows, [n + m] float64, from 0 to 1; None if there are none between.
            The positive rows are those of level 1.
    """

    sequences_per_row: ClassVar[int] = 1

    logps: Tensor
    ref_logps: Tensor
    is_positive: Tensor
    tokens: Tensor
    mass: Tensor | None = None
    level: Tensor | None = None

    @classmethod
    def from_sequences(
        cls,
        logps: Tensor,
        ref_logps: Tensor,
        label: Tensor,
        tokens: Tensor,
        mass: Tensor | None = None,
    ) -> "UnpairedLogps":
        """Rows from n + m sequences with labels 1 and 0 or, if they are graded, levels between."""
        is_positive = label == 1
        level = label if ((label != 0) & ~is_positive).any() else None
        return cls(logps, ref_logps, is_positive, tokens, unless_equal(mass), level)

    @property
    def u(self) -> Tensor:
        """Logratios log pi/pi_ref of the n positive rows: should dominate."""
        return (self.logps - self.ref_logps)[self.is_positive]

    @property
    def v(self) -> Tensor:
        """Logratios of the m negative rows: should be dominated."""
        return (self.logps - self.ref_logps)[~self.is_positive]

    def per_token(self) -> "UnpairedLogps":
        """The rows with each log-probability divided by its number of completion tokens."""
        tokens = self.tokens.clamp(min=1)
        return replace(self, logps=self.logps / tokens, ref_logps=self.ref_logps / tokens)

    @property
    def u_mass(self) -> Tensor | None:
        """Relative masses of u, [n]; None if all are equal."""
        return None if self.mass is None else self.mass[self.is_positive]

    @property
    def v_mass(self) -> Tensor | None:
        """Relative masses of v, [m]; None if all are equal."""
        return None if self.mass is None else self.mass[~self.is_positive]

    @property
    def preferred(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities and completion tokens of the positive rows, whose masses are those of
        u."""
        return self.logps[self.is_positive], self.tokens[self.is_positive]

    @cached_property
    def comparisons(self) -> tuple["UnpairedLogps", ...]:
        """The transport problems of the step: each level that it has with the next lower one,
        highest first; without levels one. Empty if all rows have one label or level."""
        if self.level is None:
            return (self,) if 0 < self.is_positive.sum() < len(self.is_positive) else ()
        present = self.level.unique().flip(0)
        return tuple(
            self._rows((self.level == high) | (self.level == low), self.level == high)
            for high, low in pairwise(present)
        )

    def _rows(self, rows: Tensor, is_positive: Tensor) -> "UnpairedLogps":
        """Some of the rows, [n + m] bool, without levels."""
        return UnpairedLogps(
            *(self.logps[rows], self.ref_logps[rows], is_positive[rows], self.tokens[rows]),
            mass=None if self.mass is None else unless_equal(self.mass[rows]),
        )


StepLogps = PairedLogps | UnpairedLogps
ScoreKind = Literal["sum", "mean"]


def compared(step: StepLogps, score: ScoreKind) -> StepLogps:
    """The step with the scores that are compared: log-probabilities of whole responses ("sum"), or
    per token ("mean")."""
    return step.per_token() if score == "mean" else step


def unless_equal(mass: Tensor | None) -> Tensor | None:
    """``mass`` [n]; None if all are equal, where sums are those without masses to the last bit."""
    return None if mass is None or torch.equal(mass, mass[:1].expand_as(mass)) else mass


@dataclass(frozen=True)
class LossOptions:
    """What the YAML says about the loss: ``rl_beta`` and the ``aot_*`` keys, resolved."""

    penalty: Penalty
    beta: float
    label_smoothing: float = 0.0
    sort: SortKind = "hard"
    epsilon: float = 0.1
    sft_weight: float = 0.0
    order: OrderKind = "first"


StepLoss = Callable[[StepLogps, LossOptions], Tensor]


def transport(step: StepLogps, options: LossOptions) -> Tensor:
    """AOT (arXiv 2406.05882): OT_h(U, V) with h the penalty. The paper's paired and unpaired forms
    differ only in what u and v are, which the step's own class says.

    With ``options.order`` "second" the penalty applies to the integrated gaps.

    A step without positives or without negatives says nothing about dominance: its value is 0.
    """
    u, v = step.u, step.v
    if len(u) == 0 or len(v) == 0:
        return (u.sum() + v.sum()) * 0.0
    penalty = smoothed(options.penalty, options.label_smoothing)
    return transport_value(
        u,
        v,
        lambda z: penalty(z, options.beta),
        options.sort,
        options.epsilon,
        step.u_mass,
        step.v_mass,
        options.order,
        # Of the squared hinge, and of its mirror image if labels are smoothed.
        kinks=(options.beta, -options.beta),
    )


def negative_log_likelihood(step: StepLogps) -> Tensor:
    """Mean over the completion tokens of chosen or positive responses of -log p(token), in nats;
    0 for a step that has none. This is the loss of supervised fine-tuning on these responses. A
    token counts with the mass of its row."""
    logps, tokens = step.preferred
    if (mass := step.u_mass) is None:
        return -logps.sum() / tokens.sum().clamp(min=1)
    total = (mass * tokens).sum()
    return -(mass * logps).sum() / torch.where(total > 0, total, 1.0)


def of_means(loss: StepLoss) -> StepLoss:
    """``loss`` of per-token log-probabilities (``aot_score: mean``). Their sums over a response
    favour short responses; IPO and SimPO (arXiv 2405.14734, sec. 2.2) take the means as well."""
    return lambda step, options: loss(step.per_token(), options)


def over_levels(loss: StepLoss) -> StepLoss:
    """The mean of ``loss`` over the comparisons of a step: of graded rows, each level with the next
    lower one that the step has; 0 if all rows have one level."""

    def mean(step: StepLogps, options: LossOptions) -> Tensor:
        if isinstance(step, PairedLogps) or step.level is None:
            return loss(step, options)
        losses = [loss(part, options) for part in step.comparisons]
        return torch.stack(losses).mean() if losses else step.logps.sum() * 0.0

    return mean


def with_sft(loss: StepLoss) -> StepLoss:
    """``loss`` + ``sft_weight`` x ``negative_log_likelihood``: keeps the likelihood of good
    responses from falling (Pang et al. 2024, arXiv 2404.19733, eq. 1)."""

    def both(step: StepLogps, options: LossOptions) -> Tensor:
        return loss(step, options) + options.sft_weight * negative_log_likelihood(step)

    return both


LOSSES: dict[str, StepLoss] = {"transport": transport}
