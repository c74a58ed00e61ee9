"""Precision, long sequences, extreme margins, and the same numbers for the same seed."""

import contextlib
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import config, paired_rows, random_model, train, unpaired_rows, write_rows
from torch import Tensor
from transformers import LlamaForCausalLM

from aot_plugin.ot import penalties
from aot_plugin.ot.losses import LossOptions, PairedLogps, StepLogps, UnpairedLogps, transport
from aot_plugin.scoring.logps import sequence_logps, weighted_logps_sum
from aot_plugin.scoring.model_input import padded_rows

VOCABULARY = 500


def llama(longest: int, seed: int = 0) -> LlamaForCausalLM:
    model = random_model(
        seed=seed, vocab_size=VOCABULARY, max_position_embeddings=longest, tie_word_embeddings=True
    )
    return model.eval()


def batch_of(rows: int, width: int, prompt: int, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed))
    completion = (torch.arange(width) >= prompt).long().expand(rows, -1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": completion,
    }


def oracle_logps(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """In float64 and by the definition, in the one way that shares nothing with ours."""
    exact = LlamaForCausalLM(model.config).double()
    exact.load_state_dict(model.state_dict())
    logits = exact(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (picked * batch["completion_mask"][:, 1:]).sum(1)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def step_gradient(model: LlamaForCausalLM, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The parameters' gradient of one paired step, as the trainer takes it: scored, transported,
    then pulled back with constant weights (and, for fp16, the loss scale of its scaler)."""
    autocast: Any = contextlib.nullcontext()
    if dtype != torch.float32:
        autocast = torch.autocast("cpu", dtype)
    model.zero_grad()
    head = model.get_output_embeddings()
    with torch.no_grad(), autocast:
        logps = sequence_logps(model, head, padded_rows(batch))
    assert logps.dtype == torch.float32
    leaf = logps.double().requires_grad_()
    positive = torch.arange(len(leaf)) < len(leaf) // 2
    step = PairedLogps.from_sequences(leaf, leaf.detach() * 0.9, positive, torch.ones_like(leaf))
    (weights,) = torch.autograd.grad(transport(step, LossOptions(penalties.logistic, 0.01)), leaf)
    scale = 2.0**16 if dtype == torch.float16 else 1.0
    with autocast:
        surrogate = weighted_logps_sum(model, head, padded_rows(batch), weights.float())
    (scale * surrogate).backward()
    return torch.cat([p.grad.flatten() / scale for p in model.parameters()])


BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Relative error of a step's gradient: a few units in the last place of each format."""


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_a_step_in_each_precision(dtype: torch.dtype, seed: int) -> None:
    model, batch = llama(64, seed), batch_of(16, 48, 8, seed)
    exact = step_gradient_in_float64(model, batch)
    error = relative_error(step_gradient(model, batch, dtype), exact)
    assert error < BOUNDS[dtype]
    if dtype != torch.float32:  # that autocast was on at all
        assert error > 1e-5


def step_gradient_in_float64(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    exact = LlamaForCausalLM(model.config).double()
    exact.load_state_dict(model.state_dict())
    logits = exact(batch["input_ids"]).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    logps = (picked * batch["completion_mask"][:, 1:]).sum(1)
    chosen, rejected = logps.chunk(2)
    u = (chosen - rejected).sort().values
    v = (0.9 * (chosen - rejected)).detach().sort().values
    torch.nn.functional.softplus(-0.01 * (u - v)).mean().backward()
    return torch.cat([p.grad.flatten() for p in exact.parameters()])


def test_a_sequence_of_8192_tokens() -> None:
    """Its log-probability is a sum of thousands of terms, tens of thousands of nats in all; what
    is trained on are differences of a few."""
    model, batch = llama(8192), batch_of(1, 8192, 16, seed=0)
    with torch.no_grad():
        exact = oracle_logps(model, batch)
        head = model.get_output_embeddings()
        logps = sequence_logps(model, head, padded_rows(batch))
        with torch.autocast("cpu", torch.bfloat16):
            half = sequence_logps(model, head, padded_rows(batch))
    assert exact.item() < -20_000
    assert (logps - exact).abs().item() < 0.01
    assert relative_error(half, exact) < 1e-3


def test_8192_tokens_have_the_gradient_of_the_oracle() -> None:
    model, batch = llama(8192), batch_of(1, 8192, 16, seed=1)
    weighted_logps_sum(
        model, model.get_output_embeddings(), padded_rows(batch), torch.tensor([0.5])
    ).backward()
    exact = LlamaForCausalLM(model.config).double()
    exact.load_state_dict(model.state_dict())
    logits = exact(batch["input_ids"]).logits[0, 15:-1]
    (0.5 * logits.log_softmax(-1).gather(-1, batch["input_ids"][0, 16:, None])).sum().backward()
    for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert relative_error(mine.grad, theirs.grad) < 1e-4


# beta x margin of 10,000 and more, against exact rational arithmetic.

BETA, EPSILON = 0.01, 0.1


def exact_penalty(name: str, z: Fraction) -> tuple[float, float]:
    """(h, h') of one quantile gap."""
    beta = Fraction(BETA)
    if name == "logistic":
        x = float(beta * z)
        tail = math.exp(-abs(x))
        return max(-x, 0.0) + math.log1p(tail), -BETA * (tail if x > 0 else 1.0) / (1.0 + tail)
    gap = beta - z
    if name == "squared_hinge" and gap < 0:
        return 0.0, 0.0
    return float(gap * gap), float(-2 * gap)


def exact_sort(x: list[float], sort: str) -> tuple[list[Fraction], list[list[int]]]:
    """Ascending (soft) sort, and for each place the rows over which its derivative is spread.

    Soft: w, the values in descending order, is moved by the isotonic regression of z - w, here by
    its min-max formula: the value at i is the least over a <= i of the greatest over b >= i of the
    mean of a..b.
    """
    n = len(x)
    order = sorted(range(n), key=lambda row: -x[row])
    w = [Fraction(x[row]) for row in order]
    if sort == "hard":
        return w[::-1], [[row] for row in reversed(order)]
    z = [Fraction(n - k) / Fraction(EPSILON) for k in range(n)]
    y = [a - b for a, b in zip(z, w, strict=True)]
    fit = [
        min(
            max(sum(y[a : b + 1], Fraction(0)) / (b + 1 - a) for b in range(i, n))
            for a in range(i + 1)
        )
        for i in range(n)
    ]
    blocks = [[order[k] for k in range(n) if fit[k] == fit[i]] for i in range(n)]
    return [a - b for a, b in zip(z, fit, strict=True)][::-1], blocks[::-1]


def exact_transport(
    u: list[float], v: list[float], penalty: str, sort: str
) -> tuple[float, list[float], list[float]]:
    """OT_h and its gradients in u and v, which have equally many atoms."""
    (u_sorted, u_rows), (v_sorted, v_rows) = exact_sort(u, sort), exact_sort(v, sort)
    n = len(u)
    value, of_u, of_v = 0.0, [0.0] * n, [0.0] * n
    for i in range(n):
        h, slope = exact_penalty(penalty, u_sorted[i] - v_sorted[i])
        value += h / n
        for rows, gradient, sign in ((u_rows[i], of_u, 1), (v_rows[i], of_v, -1)):
            for row in rows:
                gradient[row] += sign * slope / n / len(rows)
    return value, of_u, of_v


MARGIN = 1e4 / BETA
SAMPLES = {
    "u far below v": ([-MARGIN - 3, -MARGIN, -MARGIN + 2.5], [0.0, 1.0, -2.0]),
    "u far above v": ([MARGIN + 3, MARGIN, MARGIN - 2.5], [0.0, 1.0, -2.0]),
    "both spread": ([MARGIN, -MARGIN, 0.5], [-MARGIN, 3.0, MARGIN]),
    "crossed": ([-MARGIN, 4.0, -MARGIN + 1], [MARGIN, -1.0, MARGIN - 2]),
}


def steps(u: list[float], v: list[float]) -> dict[str, StepLogps]:
    policy = torch.tensor([*u, *v], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(len(u), dtype=torch.float64)
    paired = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(v, dtype=torch.float64, requires_grad=True)
    is_positive, ones = torch.arange(len(policy)) < len(u), torch.ones_like(policy)
    return {
        "unpaired": UnpairedLogps(policy, torch.zeros_like(policy), is_positive, ones),
        "paired": PairedLogps(paired, zero, reference, zero, ones[: len(u)], ones[: len(u)]),
    }


@pytest.mark.parametrize("sort", ["hard", "soft"])
@pytest.mark.parametrize("penalty", list(penalties.PENALTIES))
@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_margins_of_ten_thousand_over_beta(sample: str, mode: str, penalty: str, sort: Any) -> None:
    u, v = SAMPLES[sample]
    step = steps(u, v)[mode]
    options = LossOptions(penalties.PENALTIES[penalty], BETA, sort=sort, epsilon=EPSILON)
    loss = transport(step, options)
    value, of_u, of_v = exact_transport(u, v, penalty, sort)
    assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-300)
    loss.backward()
    if isinstance(step, PairedLogps):
        found = [*step.chosen.grad.tolist(), *step.ref_chosen.grad.tolist()]
    else:
        found = step.logps.grad.tolist()
    assert found == pytest.approx([*of_u, *of_v], rel=1e-9, abs=1e-300)
    # The trainer hands the gradient on in float32.
    assert torch.tensor(found, dtype=torch.float64).float().isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_a_seed_gives_the_same_numbers_to_the_bit(
    mode: str, tiny_model: Path, tmp_path: Path
) -> None:
    rows = paired_rows(32) if mode == "paired" else unpaired_rows(32)
    data = write_rows(tmp_path / "rows.jsonl", rows)

    def run(name: str, seed: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
        done = train(config(tiny_model, data, tmp_path / name, aot_mode=mode, seed=seed))
        return done.logged("loss"), done.logged("grad_norm"), done.parameters

    first, second, other = run("a", 1), run("b", 1), run("c", 2)
    assert len(first[0]) == 5
    assert first[:2] == second[:2]
    assert all(torch.equal(value, second[2][name]) for name, value in first[2].items())
    assert first[0] != other[0]
