"""What an optimizer step did, for whoever looks on: tests, benchmarks, a profile."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..scoring.scorer import Pass


@dataclass
class Problem:
    """A transport problem: sizes of U and V over all ranks, and of this rank's part its positive
    (or chosen) sequences and all its sequences, without repeated rows."""

    u: int
    v: int
    positives: int
    sequences: int


@dataclass
class StepRecord:
    """One optimizer step on one rank.

    Attributes:
        step: its number in the run, from 1.
        micro_batches: how many.
        sequences: token ids of the sequences, in the order of the host's batches (if watched).
        carries: of each micro-batch, in the order of the backward passes: the carry's class.
        groups: of each micro-batch, in the same order: the numbers of its sequences.
        problems: one over the whole step, or one for each micro-batch (if watched).
        passes: forward passes of policy and reference.
        loss: the step's true loss as it is logged, before it is averaged over ranks.
        seconds: of the first two moves (score, transport).
        held_bytes: of the gradients that waited for their weights, all together.
    """

    step: int
    micro_batches: int
    sequences: list[list[int]] = field(default_factory=list)
    carries: list[str] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    loss: float = 0.0
    seconds: float = 0.0
    held_bytes: int = 0


_watchers: list[list[StepRecord]] = []


@contextmanager
def watched_steps() -> Iterator[list[StepRecord]]:
    """A list that every step of this process joins as it ends."""
    records: list[StepRecord] = []
    _watchers.append(records)
    try:
        yield records
    finally:
        _watchers[:] = [other for other in _watchers if other is not records]


def is_watched() -> bool:
    return bool(_watchers)


def emit(record: StepRecord) -> None:
    for records in _watchers:
        records.append(record)
