"""Log-probabilities of batches under policy and reference, and a count of what they took."""

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
    """A forward pass: of which model ("policy" or "reference"), whether with gradient, and the
    rows and width of its input, in the layout "padded" or "shared"."""

    model: str
    gradient: bool
    layout: str
    rows: int
    width: int


class Scorer:
    """Scores batches the way that one run does.

    Args:
        policy: the policy as it is wrapped at the moment.
        head: the policy's LM head.
        reference: a context in which the reference can score, given the policy as it is wrapped:
            (model, LM head). It may be the policy with its adapter switched off.
        settle: how a model may be given its sequences; asked once, of the first one that is about
            to score any, the policy or the reference.
        with_gradient: what a pass with gradient runs in (autocast).
        without_gradient: what any other pass runs in.
        multiple: what the width of rows is rounded up to.
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
            model: the policy, where it is not wrapped as it is in training.
        """
        model = self._policy() if model is None else model
        with self._without_gradient():
            return sequence_logps(model, self._head(), self._arranged(batch, model, "policy"))

    def logps_apart(self, batch: Batch) -> Tensor:
        """The same, with each sequence in a row of its own."""
        with self._without_gradient():
            return sequence_logps(self._policy(), self._head(), padded_rows(batch))

    def logps_with_graph(self, batch: Batch) -> Tensor:
        """The same with gradient, in the policy's parameters."""
        model = self._policy()
        with self._with_gradient():
            inputs = self._arranged(batch, model, "policy", gradient=True)
            return sequence_logps(model, self._head(), inputs)

    def weighted_sum(self, batch: Batch, weights: Tensor) -> Tensor:
        """sum(weights x logps), [] float32 with gradient, for constant weights [sequences]."""
        model = self._policy()
        with self._with_gradient():
            inputs = self._arranged(batch, model, "policy", gradient=True)
            return weighted_logps_sum(model, self._head(), inputs, weights)

    def reference_logps(self, batch: Batch, policy: nn.Module | None = None) -> Tensor:
        """The reference's log-probabilities, [sequences] float32, in nats.

        Args:
            policy: as ``model`` above.
        """
        policy = self._policy() if policy is None else policy
        with self._without_gradient(), self._reference(policy) as (model, head):
            return sequence_logps(model, head, self._arranged(batch, policy, "reference"))

    def layouts(self, model: nn.Module | None = None) -> Layouts:
        """How sequences are given to the model, settled by now or at once."""
        if self._layouts is None:
            with self._without_gradient():
                self._layouts = self._settle(self._policy() if model is None else model)
        return self._layouts

    def take_passes(self) -> list[Pass]:
        """The passes since this was asked last."""
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
