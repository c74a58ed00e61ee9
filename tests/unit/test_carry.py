"""Held gradients of layers that do, and do not, back-propagate inside their own backward pass."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aot_plugin.step.carry import HoldGradient


class Recomputed(torch.autograd.Function):
    """``layer(x)``, and its parameters' gradients by a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(x), grad)
        return None, x.grad


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("earlier", [False, True], ids=["first", "after others"])
def test_a_held_gradient_is_whole(recomputed: bool, earlier: bool) -> None:
    torch.manual_seed(0)
    below, above = nn.Linear(3, 3), nn.Linear(3, 1)
    parameters = [*below.parameters(), *above.parameters()]
    x, weights, signs = torch.randn(2, 3), torch.tensor([0.3, -0.3]), torch.tensor([1.0, -1.0])

    def logps() -> Tensor:
        hidden = below(x)
        scores = Recomputed.apply(above, hidden) if recomputed else above(hidden)
        return scores[:, 0]

    expected = torch.autograd.grad((weights * above(below(x))[:, 0]).sum(), parameters)
    seconds: list[bool] = []

    def weighted_sum(batch: Any, weights: Tensor, wrapped: bool) -> Tensor:
        seconds.append(True)
        return (weights * logps()).sum()

    if earlier:  # what the step has accumulated so far
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
    scorer: Any = SimpleNamespace(
        logps_with_graph=lambda batch, wrapped: (logps(), torch.zeros(2, 2)),
        weighted_sum=weighted_sum,
    )
    carry = HoldGradient(scorer, {}, signs, parameters)
    carry.score(wrapped=False)
    carry.surrogate(weights, wrapped=False).backward()
    assert bool(seconds) == recomputed
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient + earlier)
