"""Sequence log-probabilities, with the LM head at completion positions only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .excess import excess_factors
from .lm_head import token_logps, watched_of_logits, watched_token_logps
from .model_head import (
    chunk_no_more,
    chunkable_head,
    examined,
    parameters_behind,
    replaced_forward,
)
from .model_input import ModelInput


def sequence_logps(
    model: nn.Module, head: nn.Module, inputs: ModelInput, excess_weight: float = 1.0
) -> Tensor:
    """log pi(completion | prompt) of each sequence: the sum over its completion tokens.

    Args:
        model: the prepared causal language model. The forward pass goes through it as the trainer
            wrapped it (DDP, DeepSpeed and FSDP hook there).
        head: its output embedding (``model.get_output_embeddings()`` of the unwrapped model).
        inputs: the sequences, in any layout.
        excess_weight: factor of the tokens that are marked as ``excess``.

    Returns:
        [sequences] float32, in nats; 0 for a sequence without completion tokens.
    """
    return _by_sequence(model, head, inputs, excess_weight, watch=False)[0]


def watched_sequence_logps(
    model: nn.Module, head: nn.Module, inputs: ModelInput, excess_weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``sequence_logps``, and what is watched beside them, [sequences, 2] float32 without graph:
    how many completion tokens are the most probable ones, and the sum over the completion tokens of
    the entropy of their predictions, in nats."""
    return _by_sequence(model, head, inputs, excess_weight, watch=True)


def _by_sequence(
    model: nn.Module, head: nn.Module, inputs: ModelInput, excess_weight: float, watch: bool
) -> tuple[Tensor, Tensor]:
    logps, sequence, watched = _token_logps(model, head, inputs, watch=watch)
    if excess_weight != 1:
        logps = logps * excess_factors(inputs, excess_weight)

    def summed(values: Tensor) -> Tensor:
        # In float64: thousands of float32 terms, added one by one, lose a tenth of a nat.
        sums = values.new_zeros(inputs.sequences, *values.shape[1:], dtype=torch.float64)
        return sums.index_add(0, sequence, values.double()).float()

    return summed(logps), summed(watched) if watch else watched


def weighted_logps_sum(
    model: nn.Module,
    head: nn.Module,
    inputs: ModelInput,
    weights: Tensor,
    excess_weight: float = 1.0,
) -> Tensor:
    """sum(weights x ``sequence_logps``) for constant weights [sequences] float32: the surrogate of
    the backward stage, in a form that computes the logits once."""
    return _token_logps(model, head, inputs, weights, excess_weight)[0].sum()


@torch.no_grad()
def completion_token_logps(
    model: nn.Module, head: nn.Module, inputs: ModelInput
) -> tuple[Tensor, Tensor]:
    """log p of each completion token [n], those of a sequence in order, and its sequence [n]."""
    return _token_logps(model, head, inputs)[:2]


def _token_logps(
    model: nn.Module,
    head: nn.Module,
    inputs: ModelInput,
    weights: Tensor | None = None,
    excess_weight: float = 1.0,
    watch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per completion token its log-probability (with weights: one weighted sum), its sequence, and
    what is watched (see ``lm_head``), which is void without ``watch``."""
    targets_mask = inputs.completion_mask[:, 1:].bool()
    predicts = F.pad(targets_mask, (0, 1), value=False)
    targets = inputs.input_ids[:, 1:][targets_mask]
    if inputs.sequence is None:
        sequence = targets_mask.nonzero()[:, 0]
    else:
        sequence = inputs.sequence[:, 1:][targets_mask]
    token_weights = None if weights is None else weights[sequence]
    if token_weights is not None and excess_weight != 1:
        token_weights = token_weights * excess_factors(inputs, excess_weight)

    def forward() -> Tensor:
        return model(**inputs.arguments(), use_cache=False).logits

    found = examined(model, head, inputs)
    if found.why_not_chunked is None:
        own_forward = head.forward
        results: list[Tensor] = []
        watched = torch.empty(0)
        nodes: list[Any] = []

        def in_place_of_logits(hidden: Tensor) -> Tensor:
            nonlocal watched
            chunkable = chunkable_head(head, own_forward, found)
            if watch:
                result, watched = watched_token_logps(chunkable, hidden[predicts], targets)
            else:
                result = token_logps(chunkable, hidden[predicts], targets, token_weights)
            results.append(result)
            zeros = _zeros_after(results[-1], hidden)
            nodes.append(zeros.grad_fn)
            return zeros

        with replaced_forward(head, in_place_of_logits):
            returned = forward()
        if not any(True for _ in parameters_behind(returned.grad_fn, nodes)):
            (result,) = results
            return result + 0 * returned.sum(), sequence, watched
        chunk_no_more(head, "the model has a trained parameter that changes its logits")

    seen: list[bool] = []

    def keep_predicting(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(True)
        return (args[0][predicts], *args[1:])

    with head.register_forward_pre_hook(keep_predicting):
        logits = forward()
    if not seen:  # a model that multiplies by the head's weight itself
        logits = logits[predicts]
    watched = watched_of_logits(logits, targets) if watch else logits.new_empty(0)
    logps = -F.cross_entropy(logits.float(), targets, reduction="none")
    return (logps if token_weights is None else token_weights * logps), sequence, watched


def _zeros_after(result: Tensor, hidden: Tensor) -> Tensor:
    """Logits that the model may change as it likes: it can't change the result, which doesn't pass
    through it.

    But DDP, DeepSpeed and FSDP find the graph by what the model returns, and there they gather
    weights for the backward pass. So the zeros hang on the result's graph, the sum that is returned
    adds them, and the backward pass comes through all hooks before it gets to the result. The
    gradient that it brings on this way is 0 x f'(0) = 0. One zero a token, whatever the vocabulary.
    """
    zero = (0 * result.nan_to_num()).sum()
    return zero + hidden.new_zeros(*hidden.shape[:-1], 1, dtype=zero.dtype)
