"""Scores batches under policy and reference, and records each forward pass."""

import gc
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .logps import sequence_logps, watched_sequence_logps, weighted_logps_sum
from .model_input import FIELDS, Batch, ModelInput, is_divisible, padded_rows
from .settle import Settled

LOG = logging.getLogger(f"axolotl.{__name__}")

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Pass:
    """A forward pass.

    Attributes:
        model: "policy" or "reference".
        gradient: True if a graph was built.
        layout: "padded", "shared" or "packed" (see ``layout``).
        rows, width: shape of the model's input.
    """

    model: str
    gradient: bool
    layout: str
    rows: int
    width: int


class Scorer:
    """Scores batches with one run's models, precision and layout.

    Args:
        policy: returns the policy as it is scored.
        wrapped: returns the policy as the host has wrapped it. It is another module than ``policy``
            under DDP, whose forward pass arms the synchronization of gradients.
        head: returns the policy's LM head.
        reference: context manager that takes the wrapped policy and yields (model, LM head) of the
            reference, for instance the policy with its adapter disabled.
        settle: decides the layout; called once, with the model that scores first.
        with_gradient: context of passes with gradient (autocast).
        without_gradient: context of passes without.
        may_retry: returns True if this rank may run more passes than the others.
        excess_weight: factor of the tokens that are marked as ``excess``.
    """

    def __init__(
        self,
        policy: Callable[[], nn.Module],
        wrapped: Callable[[], nn.Module],
        head: Callable[[], nn.Module],
        reference: Callable[[nn.Module], AbstractContextManager[tuple[nn.Module, nn.Module]]],
        settle: Callable[[nn.Module], Settled],
        with_gradient: Context,
        without_gradient: Context,
        may_retry: Callable[[], bool] = lambda: True,
        excess_weight: float = 1.0,
    ) -> None:
        self._policy, self._wrapped, self._head = policy, wrapped, head
        self._reference = reference
        self._settle = settle
        self._with_gradient, self._without_gradient = with_gradient, without_gradient
        self._may_retry = may_retry
        self._excess_weight = excess_weight
        self._most = float("inf")  # padded tokens of the largest batch that fits into memory
        self._settled: Settled | None = None
        self._passes: list[Pass] = []

    def logps(self, batch: Batch) -> Tensor:
        """The policy's log-probabilities, [sequences] float32, in nats, without gradient."""
        return self.watched_logps(batch)[0]

    def watched_logps(self, batch: Batch, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """``logps``, and what is watched beside them, [sequences, 2] (``watched_sequence_logps``).

        Args:
            batch: the sequences.
            model: the policy, if another wrapping than that of training is in use (evaluation).
        """
        policy = self._policy() if model is None else model

        def score(batch: Batch) -> Tensor:
            with self._without_gradient():
                inputs = self._arranged(batch, policy, "policy")
                logps, watched = watched_sequence_logps(
                    policy, self._head(), inputs, self._excess_weight
                )
                return torch.cat([logps[:, None], watched], dim=1)

        columns = self._that_fits(score, batch)
        return columns[:, 0], columns[:, 1:]

    def logps_apart(self, batch: Batch) -> Tensor:
        """``logps`` with one sequence per row, whatever the layout."""
        with self._without_gradient():
            return sequence_logps(
                self._policy(), self._head(), padded_rows(batch), self._excess_weight
            )

    def logps_with_graph(self, batch: Batch, wrapped: bool = False) -> tuple[Tensor, Tensor]:
        """``watched_logps`` with the graph to the policy's parameters, by its own module or the
        wrapper."""
        model = self._wrapped() if wrapped else self._policy()
        with self._with_gradient():
            inputs = self._arranged(batch, model, "policy", gradient=True)
            return watched_sequence_logps(model, self._head(), inputs, self._excess_weight)

    def weighted_sum(self, batch: Batch, weights: Tensor, wrapped: bool = False) -> Tensor:
        """sum_i weights_i logp_i, [] float32 with graph, for constant weights [sequences]."""
        model = self._wrapped() if wrapped else self._policy()
        with self._with_gradient():
            inputs = self._arranged(batch, model, "policy", gradient=True)
            return weighted_logps_sum(model, self._head(), inputs, weights, self._excess_weight)

    def weighted_sum_apart(self, batch: Batch, weights: Tensor) -> Tensor:
        """``weighted_sum`` with one sequence per row, whatever the layout."""
        with self._with_gradient():
            return weighted_logps_sum(
                *(self._policy(), self._head(), padded_rows(batch), weights, self._excess_weight)
            )

    def reference_logps(self, batch: Batch, policy: nn.Module | None = None) -> Tensor:
        """The reference's log-probabilities, [sequences] float32, in nats.

        Args:
            batch: the sequences.
            policy: as ``model`` in ``watched_logps``.
        """
        scored = self._policy() if policy is None else policy

        def score(batch: Batch) -> Tensor:
            with self._without_gradient(), self._reference(scored) as (model, head):
                inputs = self._arranged(batch, scored, "reference")
                return sequence_logps(model, head, inputs, self._excess_weight)

        return self._that_fits(score, batch)

    def shape(self, batch: Batch) -> tuple[int, int]:
        """Rows and width of the model's input for a batch."""
        return self.settled().layout.shape(batch)

    def settled(self, model: nn.Module | None = None) -> Settled:
        """The layout, decided now if it has not been."""
        if self._settled is None:
            with self._without_gradient():
                self._settled = self._settle(self._policy() if model is None else model)
        return self._settled

    def take_passes(self) -> list[Pass]:
        """The passes since the last call."""
        passes, self._passes = self._passes, []
        return passes

    def _arranged(
        self, batch: Batch, model: nn.Module, name: str, gradient: bool = False
    ) -> ModelInput:
        inputs = self._input(batch, model)
        layout = "padded" if inputs.sequence is None else self.settled().layout.name
        self._passes.append(Pass(name, gradient, layout, *inputs.input_ids.shape))
        return inputs

    def _input(self, batch: Batch, model: nn.Module) -> ModelInput:
        return self.settled(model).layout.arrange(batch)

    def _that_fits(self, score: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """``score(batch)``, in halves if the memory does not suffice for one pass."""
        if padded_tokens(batch) <= self._most:
            try:
                return score(batch)
            except torch.OutOfMemoryError:
                if not (is_divisible(batch) and self._may_retry()):
                    raise
            # Only now, since the exception held the tensors of the failed pass.
            free_memory()
            if self._most == float("inf"):
                rows, width = batch["input_ids"].shape
                LOG.warning(
                    "out of memory when scoring %d rows of %d tokens: they are scored in two "
                    "passes, and so will be others as large",
                    rows,
                    width,
                )
            self._most = padded_tokens(batch) - 1
        if not is_divisible(batch):
            return score(batch)
        return torch.cat([self._that_fits(score, half) for half in halved(batch)])


def padded_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding included."""
    return batch["input_ids"].numel()


def halved(batch: Batch) -> list[Batch]:
    """The sequences of a batch that ``is_divisible`` in two batches."""
    middle = len(batch["input_ids"]) // 2
    return [
        {name: batch[name][part] for name in FIELDS}
        for part in (slice(None, middle), slice(middle, None))
    ]


def free_memory() -> None:
    """Returns the memory of a failed pass to the allocator and to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
