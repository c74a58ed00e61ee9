"""Scores batches under policy and reference, and records each forward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .layout import Layouts
from .logps import sequence_logps, weighted_logps_sum
from .model_input import Batch, ModelInput, padded_rows
from .shared_prompts import share_prompts

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Pass:
    """A forward pass.

    Attributes:
        model: "policy" or "reference".
        gradient: True if a graph was built.
        layout: "padded" or "shared".
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
        policy: returns the policy as currently wrapped (DDP, DeepSpeed, FSDP, torch.compile).
        head: returns the policy's LM head.
        reference: context manager that takes the wrapped policy and yields (model, LM head) of the
            reference, for instance the policy with its adapter disabled.
        settle: decides the layout; called once, with the model that scores first.
        with_gradient: context of passes with gradient (autocast).
        without_gradient: context of passes without.
        multiple: row widths are rounded up to a multiple of it.
    """

    def __init__(
        self,
        policy: Callable[[], nn.Module],
        head: Callable[[], nn.Module],
        reference: Callable[[nn.Module], AbstractContextManager[tuple[nn.Module, nn.Module]]],
        settle: Callable[[nn.Module], Layouts],
        with_gradient: Context,
        without_gradient: Context,
        multiple: int = 1,
    ) -> None:
        self._policy, self._head, self._reference = policy, head, reference
        self._settle = settle
        self._with_gradient, self._without_gradient = with_gradient, without_gradient
        self._multiple = multiple
        self._layouts: Layouts | None = None
        self._passes: list[Pass] = []

    def logps(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """The policy's log-probabilities, [sequences] float32, in nats, without gradient.

        Args:
            batch: the sequences.
            model: the policy, if another wrapping than that of training is in use (evaluation).
        """
        model = self._policy() if model is None else model
        with self._without_gradient():
            return sequence_logps(model, self._head(), self._arranged(batch, model, "policy"))

    def logps_apart(self, batch: Batch) -> Tensor:
        """``logps`` with one sequence per row, whatever the layout."""
        with self._without_gradient():
            return sequence_logps(self._policy(), self._head(), padded_rows(batch))

    def logps_with_graph(self, batch: Batch) -> Tensor:
        """``logps`` with the graph to the policy's parameters."""
        model = self._policy()
        with self._with_gradient():
            inputs = self._arranged(batch, model, "policy", gradient=True)
            return sequence_logps(model, self._head(), inputs)

    def weighted_sum(self, batch: Batch, weights: Tensor) -> Tensor:
        """sum_i weights_i logp_i, [] float32 with graph, for constant weights [sequences]."""
        model = self._policy()
        with self._with_gradient():
            inputs = self._arranged(batch, model, "policy", gradient=True)
            return weighted_logps_sum(model, self._head(), inputs, weights)

    def reference_logps(self, batch: Batch, policy: nn.Module | None = None) -> Tensor:
        """The reference's log-probabilities, [sequences] float32, in nats.

        Args:
            batch: the sequences.
            policy: as ``model`` in ``logps``.
        """
        policy = self._policy() if policy is None else policy
        with self._without_gradient(), self._reference(policy) as (model, head):
            return sequence_logps(model, head, self._arranged(batch, policy, "reference"))

    def layouts(self, model: nn.Module | None = None) -> Layouts:
        """The layout, decided now if it has not been."""
        if self._layouts is None:
            with self._without_gradient():
                self._layouts = self._settle(self._policy() if model is None else model)
        return self._layouts

    def take_passes(self) -> list[Pass]:
        """The passes since the last call."""
        passes, self._passes = self._passes, []
        return passes

    def _arranged(
        self, batch: Batch, model: nn.Module, name: str, gradient: bool = False
    ) -> ModelInput:
        cost = self.layouts(model).cost
        inputs = padded_rows(batch) if cost is None else share_prompts(batch, cost, self._multiple)
        layout = "padded" if inputs.sequence is None else "shared"
        self._passes.append(Pass(name, gradient, layout, *inputs.input_ids.shape))
        return inputs
