"""A record of what each optimizer step did, for tests, benchmarks and profiling."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..scoring.scorer import Pass


@dataclass
class Problem:
    """Sizes of a transport problem, without repeated rows.

    Attributes:
        u, v: size of each sample over all ranks.
        positives: chosen or positive sequences on this rank.
        sequences: all sequences on this rank.
    """

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
        carries: class name of each micro-batch's carry, in the order of the backward passes.
        groups: indices of each micro-batch's sequences, in the same order.
        problems: one for the step, or one for each micro-batch (if watched).
        passes: forward passes of policy and reference.
        loss: the step's loss as logged, before averaging over ranks.
        seconds: wall-clock time of score and transport.
        held_bytes: total size of the held gradients.
        kept_bytes: total size of the kept graphs, as predicted from measured ones.
        retries: how often the step ran out of memory, and was cut further or went on without kept
            graphs and gradients.
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
    kept_bytes: int = 0
    retries: int = 0


_watchers: list[list[StepRecord]] = []


@contextmanager
def watched_steps() -> Iterator[list[StepRecord]]:
    """Yields a list to which every step of this process is appended when it ends."""
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
