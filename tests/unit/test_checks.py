"""What is more than rounding, and what is not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aot_plugin.host.checks import (
    FirstScores,
    first_scores,
    random_network,
    randomness,
    reference_error,
    wrong_reference,
)


class Settings:
    precompute_ref_log_probs = False
    aot_reference_folder = "prepared/aot_reference"


class Model(nn.Module):
    """Scores rows by an embedding, a product and a dropout."""

    def __init__(self, p: float, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 64, dtype=dtype)
        self.linear = nn.Linear(64, 64, dtype=dtype)
        self.dropout = nn.Dropout(p)

    def get_output_embeddings(self) -> None:
        return None

    @torch.no_grad()
    def score(self, batch: dict[str, Any]) -> Tensor:
        values = self.dropout(self.linear(self.embedding(batch["input_ids"])))
        return (values.float().sum(dim=-1) * batch["completion_mask"]).sum(dim=1)


def measured(p: float = 0.0, dtype: torch.dtype = torch.float32) -> FirstScores:
    model = Model(p, dtype)
    ids = torch.arange(48).reshape(4, 12)
    completion = torch.ones_like(ids)
    completion[:, :4] = 0
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["completion_mask"] = completion
    return first_scores(model.score, model.score, batch, model, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deterministic_network_and_its_own_reference(dtype: torch.dtype) -> None:
    first = measured(dtype=dtype)
    assert first.tokens.tolist() == [8, 8, 8, 8]
    assert (first.scores == first.again).all() and (first.scores == first.other).all()
    assert (first.scores != first.elsewhere).any()  # rounding was measured
    assert not randomness(first)
    assert not reference_error(first, first.scores)
    assert not reference_error(first, first.elsewhere)


def test_random_generators_stay_as_they_were() -> None:
    model = Model(0.1, torch.float32)
    ids = torch.arange(48).reshape(4, 12)
    batch = dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), ids)
    state = torch.get_rng_state()
    first_scores(model.score, model.score, batch, model, None)
    assert (torch.get_rng_state() == state).all()


def test_a_random_network() -> None:
    found = randomness(measured(p=0.1))
    assert found
    text = random_network(found, Model(0.1, torch.float32), Settings())
    assert "the dropout 'dropout' (0.1)" in text and "8 tokens" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_reference(dtype: torch.dtype) -> None:
    first = measured(dtype=dtype)
    found = reference_error(first, first.scores + torch.tensor([0.0, 0.0, 1.5, 0.0]))
    assert found and found.nats == pytest.approx(1.5, rel=1e-4)
    assert "differ by 1.5 nats on a completion of 8 tokens" in wrong_reference(
        found, nn.Linear(1, 1), Settings()
    )


def test_rounding_grows_with_the_root_of_the_length() -> None:
    zeros, noise = torch.zeros(2), torch.tensor([0.1, 0.0])

    def first(tokens: int) -> FirstScores:
        return FirstScores(zeros, zeros, zeros, noise, torch.tensor([tokens] * 2), 1e-7)

    bound = {n: reference_error(first(n), zeros).rounding for n in (4, 400)}
    # The same noise in sum: what a token contributes to it is less, the longer the rows are.
    assert bound[400] == pytest.approx(bound[4], rel=1e-6)
    mixed = FirstScores(zeros, zeros, zeros, noise, torch.tensor([4, 400]), 1e-7)
    of_long = reference_error(mixed, torch.tensor([0.0, 100.0]))
    of_short = reference_error(mixed, torch.tensor([100.0, 0.0]))
    assert of_long.rounding == pytest.approx(10 * of_short.rounding, rel=1e-2)


def test_nan_is_left_to_the_step() -> None:
    first = measured()
    assert not reference_error(first, first.scores * float("nan"))
