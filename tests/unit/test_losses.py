"""Losses, and the log-probabilities under them, against TRL's real trainer and the definitions."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from harness import paired_rows
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from aot_plugin.ot.coupling import recoupled_fraction
from aot_plugin.ot.losses import (
    LossOptions,
    PairedLogps,
    UnpairedLogps,
    negative_log_likelihood,
    transport,
    with_sft,
)
from aot_plugin.ot.penalties import PENALTIES, logistic, smoothed
from aot_plugin.scoring.logps import sequence_logps, weighted_logps_sum
from aot_plugin.scoring.model_input import padded_rows

PAIRS, BETA = 32, 0.1


def perturbed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A policy some way from its reference: margins, and so couplings, differ."""
    generator = torch.Generator().manual_seed(1)
    policy = deepcopy(model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return policy


def flat_gradient(model: torch.nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# Against TRL.


@pytest.fixture
def trl(
    tiny_llama: LlamaForCausalLM, word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Any:
    """TRL's trainer as a user makes it; its loss is chosen afterwards (``loss_and_gradient``)."""
    args = DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        beta=BETA,
        per_device_train_batch_size=PAIRS,
        report_to="none",
        seed=0,
    )
    rows = [
        {
            "prompt": row["messages"],
            "chosen": [row["chosen"]],
            "rejected": [row["rejected"]],
        }
        for row in paired_rows(PAIRS, words=6)
    ]
    return DPOTrainer(
        perturbed(tiny_llama),
        ref_model=tiny_llama,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer,
    )


def trl_loss(
    trainer: DPOTrainer, batch: dict[str, Any], loss_type: str, smoothing: float = 0.0
) -> tuple[float, Tensor]:
    trainer.loss_types, trainer.label_smoothing = [loss_type], smoothing
    loss = trainer.compute_loss(trainer.model, batch)
    return loss.item(), flat_gradient(trainer.model, loss)


def our_step(trainer: DPOTrainer, batch: dict[str, Any], paired: bool) -> Any:
    logps = sequence_logps(trainer.model, trainer.model.get_output_embeddings(), padded_rows(batch))
    with torch.no_grad():
        head = trainer.ref_model.get_output_embeddings()
        ref_logps = sequence_logps(trainer.ref_model, head, padded_rows(batch))
    is_positive = torch.arange(2 * PAIRS) < PAIRS
    step_class = PairedLogps if paired else UnpairedLogps
    tokens = batch["completion_mask"][:, 1:].sum(dim=1)
    return step_class.from_sequences(logps.double(), ref_logps.double(), is_positive, tokens)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_equals_trl_on_one_batch_and_dpo_does_not(
    trl: DPOTrainer, loss_type: str, smoothing: float
):
    """Random responses of equal length re-couple the rows, so equality is not that of an identity
    coupling: the negative control, DPO, is far away."""
    batch = next(iter(trl.get_train_dataloader()))
    assert batch["completion_mask"].sum(1).unique().tolist() == [7]  # 6 words and the end
    step = our_step(trl, batch, paired=loss_type == "aot")
    assert recoupled_fraction(step.u.detach().numpy(), step.v.detach().numpy()) > 0.3

    ours = transport(step, LossOptions(logistic, BETA, label_smoothing=smoothing))
    value, gradient = ours.item(), flat_gradient(trl.model, ours)
    their_value, their_gradient = trl_loss(trl, batch, loss_type, smoothing)
    assert their_gradient.norm() > 0.1
    assert value == pytest.approx(their_value, rel=1e-5)
    assert relative_error(gradient, their_gradient) < 1e-5

    if smoothing == 0:  # TRL's plain DPO knows no label smoothing
        dpo_value, dpo_gradient = trl_loss(trl, batch, "sigmoid")
        assert abs(value - dpo_value) > 0.02 * value
        assert relative_error(gradient, dpo_gradient) > 0.1


def test_the_sft_term_equals_trl(trl: DPOTrainer) -> None:
    batch = next(iter(trl.get_train_dataloader()))
    # Chosen responses of different lengths, so that a mean over sequences is another number.
    batch["completion_mask"][:3, -4:] = 0
    step = our_step(trl, batch, paired=True)
    assert len(step.chosen_tokens.unique()) == 2
    ours = with_sft(transport)(step, LossOptions(logistic, BETA, sft_weight=0.3))
    trl.loss_weights = [1.0, 0.3]
    trl.loss_types, trl.label_smoothing = ["aot", "sft"], 0.0
    theirs = trl.compute_loss(trl.model, batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    expected = flat_gradient(trl.model, theirs)
    assert relative_error(flat_gradient(trl.model, ours), expected) < 1e-4
    # The negative control: without the term.
    assert relative_error(flat_gradient(trl.model, our_loss(trl, batch)), expected) > 0.1


def our_loss(trainer: DPOTrainer, batch: dict[str, Any]) -> Tensor:
    return transport(our_step(trainer, batch, paired=True), LossOptions(logistic, BETA))


# The definitions.


def random_logps(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logps, ref_logps = -40 + 5 * torch.randn(2, n, generator=generator).double()
    is_positive = torch.rand(n, generator=generator) < 0.4
    return logps, ref_logps, is_positive, torch.randint(1, 9, (n,), generator=generator).double()


def test_u_and_v_of_pairs_and_of_labelled_rows():
    logps = torch.tensor([1.0, 20.0, 300.0, 4000.0]).double()
    ref_logps = torch.tensor([0.5, 10.0, 100.0, 1000.0]).double()
    # The i-th chosen row belongs to the i-th rejected one, wherever they stand.
    is_positive = torch.tensor([False, True, True, False])
    tokens = torch.tensor([5.0, 6.0, 7.0, 8.0]).double()
    pairs = PairedLogps.from_sequences(logps, ref_logps, is_positive, tokens)
    assert pairs.u.tolist() == [19.0, -3700.0]
    assert pairs.v.tolist() == [9.5, -900.0]
    assert (pairs.chosen_tokens.tolist(), pairs.rejected_tokens.tolist()) == ([6, 7], [5, 8])
    rows = UnpairedLogps.from_sequences(logps, ref_logps, is_positive, tokens)
    assert rows.u.tolist() == [10.0, 200.0]
    assert rows.v.tolist() == [0.5, 3000.0]
    for step in (pairs, rows):
        assert [column.tolist() for column in step.preferred] == [[20.0, 300.0], [6.0, 7.0]]
        assert negative_log_likelihood(step).item() == -320.0 / 13


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_penalties_are_the_formulas_of_the_paper(name: str):
    z, beta = torch.linspace(-9, 9, 37).double(), 0.6
    formula = {
        "logistic": (1 + (-beta * z).exp()).log(),
        "squared_hinge": (beta - z).clamp(min=0) ** 2,
        "least_squares": (beta - z) ** 2,
    }[name]
    torch.testing.assert_close(PENALTIES[name](z, beta), formula)


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_penalties_are_convex(name: str):
    z = torch.linspace(-9, 9, 361).double()
    h = PENALTIES[name](z, 0.6)
    assert (h[:-2] - 2 * h[1:-1] + h[2:] >= -1e-12).all()


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_label_smoothing_mixes_in_flipped_labels(name: str):
    z, h = torch.linspace(-5, 5, 21).double(), PENALTIES[name]
    expected = 0.7 * h(z, 0.5) + 0.3 * h(-z, 0.5)
    torch.testing.assert_close(smoothed(h, 0.3)(z, 0.5), expected)
    assert smoothed(h, 0.0) is h


def test_options_reach_the_transport_problem():
    """Each option changes the value: none is dropped on the way."""
    step = UnpairedLogps.from_sequences(*random_logps(30))
    base = {"penalty": logistic, "beta": 0.3}
    variants = [
        {},
        {"beta": 0.5},
        {"penalty": PENALTIES["squared_hinge"]},
        {"label_smoothing": 0.1},
        {"sort": "soft", "epsilon": 0.5},
        {"sort": "soft", "epsilon": 5.0},
    ]
    values = [transport(step, LossOptions(**(base | variant))).item() for variant in variants]
    assert len(set(values)) == len(variants)


@pytest.mark.parametrize("label", [True, False])
def test_a_one_sided_step_is_zero_with_zero_gradient(label: bool):
    logps, ref_logps, _, tokens = random_logps(5)
    logps.requires_grad_()
    step = UnpairedLogps.from_sequences(logps, ref_logps, torch.full((5,), label), tokens)
    loss = transport(step, LossOptions(logistic, 0.1))
    loss.backward()
    assert loss.item() == 0
    assert logps.grad.tolist() == [0.0] * 5


# Log-probabilities of sequences.


def naive_logps(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """All logits, a log-softmax over each, and a sum over the completion."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probabilities = F.log_softmax(logits, dim=-1)
    rows = []
    columns = zip(batch["input_ids"], batch["completion_mask"], strict=True)
    for row, (ids, mask) in enumerate(columns):
        terms = [log_probabilities[row, t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]]
        rows.append(torch.stack(terms).sum() if terms else logits.new_zeros(()))
    return torch.stack(rows)


def padded_batch(side: str, lengths: list[tuple[int, int]], vocabulary: int) -> dict[str, Tensor]:
    """Rows of (prompt tokens, completion tokens), padded on one side."""
    generator = torch.Generator().manual_seed(2)
    width = max(map(sum, lengths)) + 2
    batch = {
        key: torch.zeros(len(lengths), width, dtype=torch.int64)
        for key in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, (prompt, completion) in enumerate(lengths):
        size = prompt + completion
        start = width - size if side == "left" else 0
        ids = torch.randint(3, vocabulary, (size,), generator=generator)
        batch["input_ids"][row, start : start + size] = ids
        batch["attention_mask"][row, start : start + size] = 1
        batch["completion_mask"][row, start + prompt : start + size] = 1
    return batch


LENGTHS = [(3, 5), (6, 1), (2, 9), (4, 0), (1, 1)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_logps_equal_the_full_logits(tiny_llama: LlamaForCausalLM, side: str):
    batch = padded_batch(side, LENGTHS, tiny_llama.config.vocab_size)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    expected = naive_logps(tiny_llama, batch)
    actual = sequence_logps(tiny_llama, tiny_llama.get_output_embeddings(), padded_rows(batch))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual[3] == 0  # no completion tokens
    expected_gradient = flat_gradient(tiny_llama, (weights * expected).sum())
    actual_gradient = flat_gradient(tiny_llama, (weights * actual).sum())
    assert expected_gradient.norm() > 1
    assert relative_error(actual_gradient, expected_gradient) < 1e-5


def test_a_batch_without_completion_tokens_is_zero(tiny_llama: LlamaForCausalLM):
    batch = padded_batch("right", [(3, 0), (5, 0)], tiny_llama.config.vocab_size)
    logps = sequence_logps(tiny_llama, tiny_llama.get_output_embeddings(), padded_rows(batch))
    assert logps.tolist() == [0.0, 0.0]
    assert not flat_gradient(tiny_llama, logps.sum()).any()


def test_the_side_of_the_padding_does_not_matter(tiny_llama: LlamaForCausalLM):
    """Rotary positions are relative, so a shifted row keeps its log-probability."""
    left, right = (
        sequence_logps(
            tiny_llama,
            tiny_llama.get_output_embeddings(),
            padded_rows(padded_batch(side, LENGTHS, tiny_llama.config.vocab_size)),
        )
        for side in ("left", "right")
    )
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_full_logits_are_never_held(tiny_llama: LlamaForCausalLM):
    batch = padded_batch("right", LENGTHS, tiny_llama.config.vocab_size)
    head, shapes = tiny_llama.get_output_embeddings(), []
    sequence_logps(tiny_llama, head, padded_rows(batch))  # asks once how many tokens have logits
    with head.register_forward_hook(lambda module, args, output: shapes.append(output.shape)):
        sequence_logps(tiny_llama, head, padded_rows(batch))
    assert shapes == [(*batch["input_ids"].shape, 1)]  # a number per token
    assert "forward" not in vars(head)  # the model is left as it was
    assert not head._forward_pre_hooks


def test_a_model_that_does_not_call_its_head(tiny_llama: LlamaForCausalLM):
    """Some models multiply by the head's weight themselves: full logits, the same result."""

    class Headless(torch.nn.Module):
        def forward(self, use_cache: bool, **inputs: Tensor) -> Any:
            hidden = tiny_llama.model(**inputs).last_hidden_state
            output = type("Output", (), {})()
            output.logits = hidden @ tiny_llama.lm_head.weight.T
            return output

    batch = padded_batch("right", LENGTHS, tiny_llama.config.vocab_size)
    actual = sequence_logps(Headless(), tiny_llama.lm_head, padded_rows(batch))
    torch.testing.assert_close(actual, naive_logps(tiny_llama, batch), rtol=1e-5, atol=1e-5)


def test_a_model_that_cuts_off_what_pads_its_vocabulary(tiny_llama: LlamaForCausalLM):
    """On a vector of fewer tokens than it keeps the cut would not show."""
    kept = tiny_llama.config.vocab_size - 3

    class Cut(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            found = tiny_llama(**inputs)
            found.logits = found.logits[..., :kept]
            return found

    batch = padded_batch("right", LENGTHS, kept)
    head = tiny_llama.get_output_embeddings()
    with torch.no_grad():
        head.weight[kept:] *= 30
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    expected = naive_logps(Cut(), batch)
    actual = sequence_logps(Cut(), head, padded_rows(batch))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    total = weighted_logps_sum(Cut(), head, padded_rows(batch), weights)
    torch.testing.assert_close(total, (weights * expected).sum(), rtol=1e-5, atol=1e-5)
