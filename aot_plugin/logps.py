"""Sequence log-probabilities, with the LM head at completion positions only."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def sequence_logps(model: nn.Module, head: nn.Module, batch: dict[str, Any]) -> Tensor:
    """log pi(completion | prompt) of each row: the sum over its completion tokens.

    The forward pass goes through ``model`` as the trainer wrapped it (DDP, DeepSpeed and FSDP hook
    there). A pre-hook on the LM head hands it the hidden states of the positions that predict a
    completion token and no others, so logits of prompt and padding are never computed. What a
    model does to its logits afterwards (scaling, soft-capping) is elementwise and applies as ever.

    Args:
        model: the prepared causal language model.
        head: its output embedding (``model.get_output_embeddings()`` of the unwrapped model).
        batch: ``input_ids``, ``attention_mask``, ``completion_mask``, each [rows, width] int64.

    Returns:
        [rows] float32, in nats; 0 for a row without completion tokens.
    """
    targets_mask = batch["completion_mask"][:, 1:].bool()
    predicts = F.pad(targets_mask, (0, 1), value=False)
    seen = False

    def keep_predicting(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal seen
        seen = True
        return (args[0][predicts], *args[1:])

    with head.register_forward_pre_hook(keep_predicting):
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    if not seen:  # a model that multiplies by the head's weight itself
        logits = logits[predicts]
    token_logps = -F.cross_entropy(
        logits.float(), batch["input_ids"][:, 1:][targets_mask], reduction="none"
    )
    row_of_token = targets_mask.nonzero()[:, 0]
    return token_logps.new_zeros(len(targets_mask)).index_add(0, row_of_token, token_logps)
