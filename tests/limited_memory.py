"""A device that runs out of memory, since a CPU never raises ``torch.OutOfMemoryError``.

The model's base counts the tokens of all graphs that are alive, and raises the error above a
capacity.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from aot_plugin.host import steps
from aot_plugin.scoring import scorer
from aot_plugin.step import engine


class Memory:
    """A device that has room for so many tokens.

    Args:
        graphs: tokens of graphs alive, at most.
        scoring: tokens of a pass without gradient, at most.
        backward: tokens of one backward pass, at most.
    """

    def __init__(self, graphs: float = 1e9, scoring: float = 1e9, backward: float = 1e9) -> None:
        self.graphs, self.scoring, self.backward = graphs, scoring, backward
        self.alive = self.most_alive = self.failures = 0

    def fail(self) -> None:
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def enter(self, hidden: Tensor) -> Tensor:
        tokens = hidden.shape[0] * hidden.shape[1]
        if not hidden.requires_grad:
            if tokens > self.scoring:
                self.fail()
            return hidden
        if self.alive + tokens > self.graphs:
            self.fail()
        return _Occupied.apply(hidden, self, tokens)

    def free(self, tokens: int) -> None:
        self.alive -= tokens


class _Graph:
    """Lives as long as the graph that holds it."""


class _Occupied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, memory: Memory, tokens: int) -> Tensor:
        ctx.graph, ctx.memory, ctx.tokens = _Graph(), memory, tokens
        memory.alive += tokens
        memory.most_alive = max(memory.most_alive, memory.alive)
        weakref.finalize(ctx.graph, memory.free, tokens)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.tokens > ctx.memory.backward:
            ctx.memory.fail()
        return grad.clone(), None, None


@contextmanager
def limited(memory: Memory) -> Iterator[list[str]]:
    """Runs with this memory from the first step on; yields what was logged about it."""
    forward = transformers.LlamaModel.forward
    begin = steps.StepsMixin._begin
    said: list[str] = []
    inside: list[bool] = []

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if inside:
            output.last_hidden_state = memory.enter(output.last_hidden_state)
        return output

    def noted(self: Any, *args: Any) -> Any:
        if self.state.global_step > 0:  # the probe and the checks of the first step are not cut
            inside.append(True)
        return begin(self, *args)

    def warning(text: str, *args: Any) -> None:
        said.append(text % args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlamaModel, "forward", checked)
        patch.setattr(steps.StepsMixin, "_begin", noted)
        patch.setattr(engine.LOG, "warning", warning)
        patch.setattr(scorer.LOG, "warning", warning)
        yield said
