"""Sequence log-probabilities, with the LM head at completion positions only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lm_head import token_logps
from .model_input import ModelInput


def sequence_logps(model: nn.Module, head: nn.Module, inputs: ModelInput) -> Tensor:
    """log pi(completion | prompt) of each sequence: the sum over its completion tokens.

    Args:
        model: the prepared causal language model. The forward pass goes through it as the trainer
            wrapped it (DDP, DeepSpeed and FSDP hook there).
        head: its output embedding (``model.get_output_embeddings()`` of the unwrapped model).
        inputs: the sequences, in any layout.

    Returns:
        [sequences] float32, in nats; 0 for a sequence without completion tokens.
    """
    logps, sequence = _token_logps(model, head, inputs, None)
    # In float64: thousands of float32 terms, added one by one, lose a tenth of a nat.
    sums = logps.new_zeros(inputs.sequences, dtype=torch.float64)
    return sums.index_add(0, sequence, logps.double()).float()


def weighted_logps_sum(
    model: nn.Module, head: nn.Module, inputs: ModelInput, weights: Tensor
) -> Tensor:
    """sum(weights x ``sequence_logps``) for constant weights [sequences] float32: the surrogate of
    the backward stage, in a form that computes the logits once."""
    return _token_logps(model, head, inputs, weights)[0].sum()


@torch.no_grad()
def completion_token_logps(
    model: nn.Module, head: nn.Module, inputs: ModelInput
) -> tuple[Tensor, Tensor]:
    """log p of each completion token [n], those of a sequence in order, and its sequence [n]."""
    return _token_logps(model, head, inputs, None)


def why_head_is_not_chunked(head: nn.Module) -> str | None:
    """What keeps all logits of a micro-batch's completion tokens in memory at once; None if they
    exist for a chunk of tokens at a time. What the model does to its logits is known after its
    first forward pass."""
    if getattr(head, _NEEDS_LOGITS, False):
        return "the model changes its logits (scaling, soft-capping, a cut)"
    if type(head) is not nn.Linear:
        return f"the LM head is a {type(head).__module__.split('.')[0]} {type(head).__name__}"
    if "forward" in vars(head):
        return "another package has exchanged the LM head's forward pass"
    return None


def _token_logps(
    model: nn.Module, head: nn.Module, inputs: ModelInput, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Per completion token its log-probability (with weights: one weighted sum), and its
    sequence."""
    targets_mask = inputs.completion_mask[:, 1:].bool()
    predicts = F.pad(targets_mask, (0, 1), value=False)
    targets = inputs.input_ids[:, 1:][targets_mask]
    if inputs.sequence is None:
        sequence = targets_mask.nonzero()[:, 0]
    else:
        sequence = inputs.sequence[:, 1:][targets_mask]
    token_weights = None if weights is None else weights[sequence]

    def forward() -> Tensor:
        return model(**inputs.arguments(), use_cache=False).logits

    # An adapter on the head, or a forward that somebody else has exchanged, is left alone.
    if why_head_is_not_chunked(head) is None and _gives_all_logits(model, head, inputs):
        assert isinstance(head, nn.Linear)
        linear: nn.Linear = head
        found: list[Tensor] = []

        def in_place_of_logits(hidden: Tensor) -> Tensor:
            found.append(
                token_logps(hidden[predicts], linear.weight, linear.bias, targets, token_weights)
            )
            return found[-1]

        with _replaced_forward(head, in_place_of_logits):
            result = forward()
        if len(found) == 1 and _same(result.detach(), found[0].detach()):
            return result, sequence
        # This model does something to its logits (scaling, soft-capping): it needs real ones.
        setattr(head, _NEEDS_LOGITS, True)

    seen: list[bool] = []

    def keep_predicting(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(True)
        return (args[0][predicts], *args[1:])

    with head.register_forward_pre_hook(keep_predicting):
        logits = forward()
    if not seen:  # a model that multiplies by the head's weight itself
        logits = logits[predicts]
    logps = -F.cross_entropy(logits.float(), targets, reduction="none")
    return (logps if token_weights is None else token_weights * logps), sequence


@torch.no_grad()
def vocabulary(model: nn.Module, head: nn.Module, inputs: ModelInput) -> int:
    """Tokens that the model gives logits for: asked once, of the first tokens of these rows."""
    if not hasattr(head, _VOCABULARY):
        ids = inputs.input_ids[:1, :8]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        setattr(head, _VOCABULARY, logits.shape[-1])
    return getattr(head, _VOCABULARY)


def _gives_all_logits(model: nn.Module, head: nn.Module, inputs: ModelInput) -> bool:
    # A model that cuts off what pads its vocabulary would not show it on the stand-in's vector.
    if vocabulary(model, head, inputs) == getattr(head, "out_features", None):
        return True
    setattr(head, _NEEDS_LOGITS, True)
    return False


def _same(a: Tensor, b: Tensor) -> bool:
    """Equality with NaN equal to NaN: a rank whose numbers are not finite must not run one forward
    pass more than the others, which would deadlock."""
    if a.shape != b.shape:
        return False
    return torch.allclose(a.double(), b.double(), rtol=0.0, atol=0.0, equal_nan=True)


_NEEDS_LOGITS = "_aot_plugin_model_needs_logits"
_VOCABULARY = "_aot_plugin_vocabulary"


@contextmanager
def _replaced_forward(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Exchange what the head computes. Its hooks, where DeepSpeed and FSDP gather weights, stay."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
