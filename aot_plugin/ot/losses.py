"""Losses on the log-probabilities of one optimizer step (torch only).

A loss is a function (logps of the step, options) -> scalar. The trainer calls it once per step,
on the rows of all micro-batches and ranks, in float64, and takes the gradient with respect to the
policy's log-probabilities; nothing else of the model is visible here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .penalties import Penalty, smoothed
from .transport import SortKind, transport_value


@dataclass(frozen=True)
class PairedLogps:
    """Sequence log-probabilities of n preference pairs, each of shape [n], float64, in nats."""

    sequences_per_row: ClassVar[int] = 2

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor

    @classmethod
    def from_sequences(cls, logps: Tensor, ref_logps: Tensor, is_positive: Tensor) -> "PairedLogps":
        """Pairs from 2n sequences: the i-th chosen one belongs to the i-th rejected one."""
        return cls(
            logps[is_positive], logps[~is_positive], ref_logps[is_positive], ref_logps[~is_positive]
        )

    @property
    def u(self) -> Tensor:
        """Policy margins log pi(y+|x) - log pi(y-|x): the sample that should dominate."""
        return self.chosen - self.rejected

    @property
    def v(self) -> Tensor:
        """Reference margins: the sample that should be dominated."""
        return self.ref_chosen - self.ref_rejected


@dataclass(frozen=True)
class UnpairedLogps:
    """Sequence log-probabilities of labelled rows: ``logps``, ``ref_logps`` [n + m] float64 in
    nats, ``is_positive`` [n + m] bool; n positive and m negative rows in any order."""

    sequences_per_row: ClassVar[int] = 1

    logps: Tensor
    ref_logps: Tensor
    is_positive: Tensor

    @classmethod
    def from_sequences(
        cls, logps: Tensor, ref_logps: Tensor, is_positive: Tensor
    ) -> "UnpairedLogps":
        return cls(logps, ref_logps, is_positive)

    @property
    def u(self) -> Tensor:
        """Logratios log pi/pi_ref of the n positive rows: should dominate."""
        return (self.logps - self.ref_logps)[self.is_positive]

    @property
    def v(self) -> Tensor:
        """Logratios of the m negative rows: should be dominated."""
        return (self.logps - self.ref_logps)[~self.is_positive]


StepLogps = PairedLogps | UnpairedLogps


@dataclass(frozen=True)
class LossOptions:
    """What the YAML says about the loss: ``rl_beta`` and the ``aot_*`` keys, resolved."""

    penalty: Penalty
    beta: float
    label_smoothing: float = 0.0
    sort: SortKind = "hard"
    epsilon: float = 0.1


StepLoss = Callable[[StepLogps, LossOptions], Tensor]


def transport(step: StepLogps, options: LossOptions) -> Tensor:
    """AOT (arXiv 2406.05882): OT_h(U, V) with h the penalty. The paper's paired and unpaired forms
    differ only in what u and v are, which the step's own class says.

    A step without positives or without negatives says nothing about dominance: its value is 0.
    """
    u, v = step.u, step.v
    if len(u) == 0 or len(v) == 0:
        return (u.sum() + v.sum()) * 0.0
    penalty = smoothed(options.penalty, options.label_smoothing)
    return transport_value(u, v, lambda z: penalty(z, options.beta), options.sort, options.epsilon)


LOSSES: dict[str, StepLoss] = {"transport": transport}
