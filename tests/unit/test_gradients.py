"""The gradient of rows together against that of rows alone, where rounding is large."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aot_plugin.scoring.gradients import gradient_error, relative_error


def test_rows_that_want_the_opposite() -> None:
    """Two equally probable answers to one question: their gradients add up to rounding."""
    yes, no = torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])
    rounded = torch.tensor([0.004, 0.0])
    assert relative_error([[rounded]], [[yes], [no]]) < 0.01
    assert relative_error([[yes]], [[yes], [no]]) > 0.5


def test_a_gradient_that_is_nan_together_only() -> None:
    rows = [[torch.ones(2), torch.ones(2)]]
    assert relative_error([[torch.ones(2), torch.full((2,), math.nan)]], rows) == math.inf


@pytest.mark.parametrize(("rounding", "explained"), [(0.0, False), (0.5, False), (0.8, True)])
def test_an_error_that_rounding_explains(rounding: float, explained: bool) -> None:
    """Rows that a model is certain of have gradients of the size of their rounding."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    factor = 1.0

    @contextmanager
    def perturbed() -> Iterator[None]:
        nonlocal factor
        factor = 1 + rounding
        yield
        factor = 1.0

    def weighted_sum(batch: Any, weights: Tensor) -> Tensor:
        return 0.1 * model.weight.sum() * len(weights)  # a tenth of the rows' gradients

    def weighted_sum_apart(batch: Any, weights: Tensor) -> Tensor:
        return factor * model.weight.sum()

    scorer: Any = SimpleNamespace(weighted_sum=weighted_sum, weighted_sum_apart=weighted_sum_apart)
    tokens = torch.ones(2, 3, dtype=torch.int64)
    batch = {"input_ids": tokens, "attention_mask": tokens, "completion_mask": tokens}
    assert (gradient_error(scorer, batch, model, perturbed) == 0) == explained


class FirstRowOnly(torch.autograd.Function):
    """x w, whose gradient in w knows the first row only; that in x is right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w.T, x[:1].mT.flatten(0, 1) @ grad[:1].flatten(0, 1)


@pytest.mark.parametrize("wrong", [None, "dense", "experts", "head"])
def test_a_layer_that_stands_behind_many_others(wrong: str | None) -> None:
    """Models whose first layers are dense have their experts, and their kernels, further on."""
    torch.manual_seed(0)
    model = nn.ModuleDict()
    model["dense"] = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(20))
    model["experts"] = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
    model["head"] = nn.Linear(4, 4, bias=False)

    def score(batch: Any, weights: Tensor, together: bool) -> Tensor:
        x = batch["input_ids"][:, None] / 100
        for name, w in list(model.named_parameters()):
            broken = together and wrong is not None and wrong in name and name != "dense.0.weight"
            x = torch.tanh(FirstRowOnly.apply(x, w) if broken else x @ w) + x
        return (x.sum((1, 2)) * weights).sum()

    scorer: Any = SimpleNamespace(
        weighted_sum=lambda batch, weights: score(batch, weights, True),
        weighted_sum_apart=lambda batch, weights: score(batch, weights, False),
    )
    tokens = torch.tensor([[1, 2, 3, 4], [4, 1, 1, 2]])
    batch = {"input_ids": tokens, "attention_mask": tokens, "completion_mask": tokens}
    assert (gradient_error(scorer, batch, model, nullcontext) > 0.1) == (wrong is not None)
