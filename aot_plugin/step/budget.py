"""Which carry each micro-batch of a step gets, from what is permitted and what fits into memory."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HELD_SHARE = 1 / 3
"""Memory that held gradients may take in a step, as a share of what the model's weights take."""

FREE_SHARE = 0.8
"""Share of a GPU's free memory that a step may use; the rest allows for fragmentation."""

CPU_SHARE = 1 / 8
"""Memory that kept graphs may take on a CPU, as a share of the machine's. A constant, so that equal
runs are cut equally."""


@dataclass(frozen=True)
class Permits:
    """What the host's wrapper and settings allow.

    Attributes:
        why_no_kept_graph, why_no_held_gradients: why a carry is not allowed, for the log; None if
            it is.
        synchronizes: True if the last backward pass of a step must follow a forward pass through
            the wrapper (DDP).
        may_retry: True if a rank may run more passes than the others, so that a micro-batch that
            does not fit into memory can be cut.
    """

    why_no_kept_graph: str | None
    why_no_held_gradients: str | None
    synchronizes: bool = False
    may_retry: bool = True


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients_that_fit(model: nn.Module) -> int:
    """How many copies of the trainable parameters' gradients may be held at once."""

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.nbytes for parameter in parameters)

    gradient = size(trainable(model))
    # ZeRO-3 leaves a rank's parameters empty between passes.
    return int(size(model.parameters()) * HELD_SHARE / gradient) if gradient else 0


HOLD, KEEP, RESCORE = CARRIES = ("HoldGradient", "KeepGraph", "Rescore")
"""Class names of the carries, in the order of the backward passes."""


def graphs_come_first(device: torch.device) -> bool:
    """Whether a graph is kept in place of a held gradient where both are possible.

    On a GPU a kept graph is faster: of a model of 1B parameters an H200 took 5.0 s for a step of 16
    single pairs with kept graphs, and 5.9 s with held gradients. On a CPU both take the same time,
    and held gradients take less memory.
    """
    return device.type == "cuda"


def allot(
    graphs: Sequence[float],
    permits: Permits,
    *,
    fit: int,
    budget: float,
    graphs_first: bool = False,
) -> list[str]:
    """Allots carries to the micro-batches of a step.

    Without ``graphs_first`` gradients are held as far as they fit, and graphs kept of the others.
    The micro-batch that is scored last is back-propagated first. Its graph is always kept if that
    is allowed: the backward pass comes next and needs it anyway. The graphs of others are kept in
    addition, the largest first, as far as ``budget`` goes.

    Args:
        graphs: bytes of each micro-batch's graph; inf if it has not been measured.
        permits: which carries are allowed.
        fit: how many gradients may be held: 0, or if every micro-batch is a single row,
            ``gradients_that_fit``.
        budget: bytes for additional graphs.
        graphs_first: see ``graphs_come_first``.

    Returns:
        HOLD, KEEP or RESCORE for each micro-batch.
    """
    kinds = [RESCORE] * len(graphs)
    free = len(graphs) - permits.synchronizes
    if permits.why_no_held_gradients is not None:
        fit = 0

    def left() -> list[int]:
        return [number for number in range(free) if kinds[number] == RESCORE]

    def hold() -> None:
        for number in left()[:fit]:
            kinds[number] = HOLD

    def keep() -> None:
        room = budget
        for place, number in enumerate(left()):
            size = graphs[number] if place else 0.0
            if size <= room:
                room -= size
                kinds[number] = KEEP

    stages = [hold] if permits.why_no_kept_graph is not None else [hold, keep]
    for stage in reversed(stages) if graphs_first else stages:
        stage()
    return kinds


class GraphSizes:
    """Bytes of a scoring pass's graph, predicted from those that were measured.

    A graph grows in proportion to the tokens of its rows, and at most in proportion to the square
    of their width (masks, and scores of eager attention).
    """

    def __init__(self) -> None:
        self._per_token = 0.0
        self._widest = 0

    def __bool__(self) -> bool:
        return self._widest > 0

    def covers(self, width: int) -> bool:
        """Whether a graph of rows as wide has been measured."""
        return width <= self._widest

    def learn(self, rows: int, width: int, nbytes: int) -> None:
        """Takes note of a measured graph of ``rows`` rows of ``width`` tokens."""
        self._per_token = max(self._per_token, nbytes / (rows * width))
        self._widest = max(self._widest, width)

    def predict(self, rows: int, width: int) -> float:
        """Bytes, at the most per token that was measured; inf if nothing was."""
        if not self:
            return float("inf")
        return rows * width * self._per_token * max(1.0, width / self._widest)


class Budget:
    """Bytes that a step may use for kept graphs.

    On a GPU: what is free at the beginning of a step, less what the first step needed at its peak,
    in proportion to the largest micro-batch. On a CPU: a share of the machine's memory, divided by
    its ranks.

    Args:
        device: where the model is.
        ranks: number of ranks that share the memory of a CPU.
        limit: bytes that are never exceeded; None for no other limit.
    """

    def __init__(self, device: torch.device, ranks: int, limit: float | None = None) -> None:
        self._device = device
        self._limit = float("inf") if limit is None else limit
        self._ranks = ranks
        self._largest = self._before = 0
        self._needed: float | None = None

    def of_step(self, largest: int) -> float:
        """Bytes for the step that begins now, whose largest micro-batch has ``largest`` tokens."""
        if self._device.type != "cuda":
            of_machine = psutil.virtual_memory().total * CPU_SHARE / self._ranks
            return min(self._limit, of_machine)
        if self._needed is None:
            self._largest = largest
            self._before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)  # the peak was that of loading
            return 0.0
        step = self._needed * max(1.0, largest / self._largest)
        return max(0.0, min(self._limit, FREE_SHARE * _available(self._device) - step))

    def step_ended(self) -> None:
        """To be called after the last backward pass of a step, before the host's log, which resets
        the peak."""
        if self._needed is None and self._largest:
            self._needed = torch.cuda.max_memory_allocated(self._device) - self._before

    def lower(self, kept: float) -> None:
        """After a step that ran out of memory with ``kept`` bytes of graphs: half of them for the
        next ones."""
        self._limit = min(self._limit, kept / 2)


def _available(device: torch.device) -> float:
    """Bytes that this process can still allocate on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused


class Made(Protocol):
    """Bytes of the tensors that were made in a context and are alive after it."""

    @property
    def nbytes(self) -> int: ...


@contextmanager
def measured(device: torch.device) -> Iterator[Made]:
    """Measures the tensors that survive this context."""
    if device.type == "cuda":
        # By its allocator, since compiled functions (flex attention) run uncompiled in a mode.
        with _OfAllocator(device) as made:
            yield made
    else:
        with Allocations() as allocations:
            yield allocations


class _OfAllocator(AbstractContextManager["_OfAllocator"]):
    """By the difference of the bytes that are allocated on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.nbytes = device, -torch.cuda.memory_allocated(device)

    def __exit__(self, *_: Any) -> None:
        self.nbytes += torch.cuda.memory_allocated(self._device)


class Allocations(TorchDispatchMode):
    """By the storages that operations return: those that are still alive, views counted once."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = set(map(_address, _tensors((args, kwargs))))
        outputs = func(*args, **(kwargs or {}))
        for tensor in _tensors(outputs):
            if _address(tensor) not in given:
                storage = tensor.untyped_storage()
                self._made[_address(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        return outputs

    @property
    def nbytes(self) -> int:
        return sum(size for storage, size in self._made.values() if not storage.expired())


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
