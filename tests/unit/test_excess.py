"""Marks and factors of the tokens by which one response of a pair is longer."""

import torch

from aot_plugin.scoring.excess import EXCESS, excess_factors, mark_excess
from aot_plugin.scoring.model_input import padded_rows


def test_tokens_beyond_the_shorter_response_are_marked() -> None:
    chosen = [[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]]  # 4 and 2 tokens
    rejected = [[0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0]]  # 2 and 3: the first one predicts nothing
    mask = torch.tensor(chosen + rejected)
    marked = mark_excess(mask)
    assert marked.tolist() == [
        [0, 0, 1, 1, EXCESS, EXCESS],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [1, 1, 1, EXCESS, 0, 0],
    ]
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": marked}
    factors = excess_factors(padded_rows(batch), 0.25)
    assert factors.tolist() == [1, 1, 0.25, 0.25, 1, 1, 1, 1, 1, 1, 0.25]
