"""Scores that correct for lengths, against TRL's and over every cut of a step."""

import random
from pathlib import Path
from typing import Any

import pytest
from cuts import LORA, NO_SIGNS, Cutter, assert_differs, assert_same
from harness import paired_rows, sentence, unpaired_rows, write_rows

from aot_plugin.ot.dominance import dominance_statistics
from aot_plugin.report.scores import load_run

pytestmark = pytest.mark.slow


@pytest.fixture
def cutter_of(tiny_model: Path, tmp_path: Path) -> Any:
    """Makes a ``Cutter`` whose responses have 2 to 12 words."""

    def make(mode: str, rows: int = 64, **keys: Any) -> Cutter:
        cutter = Cutter(tmp_path, tiny_model, mode, **{"learning_rate": 0.01, **NO_SIGNS, **keys})
        rng, data = random.Random(1), paired_rows(rows) if mode == "paired" else unpaired_rows(rows)
        for row in data:
            for name in {"completion", "chosen", "rejected"} & row.keys():
                text = sentence(rng, rng.randint(2, 12))
                row[name] = text if name == "completion" else {"role": "assistant", "content": text}
        cutter.data = write_rows(tmp_path / "unlike.jsonl", data)
        return cutter

    return make


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_scores_per_token(mode: str, cutter_of: Any) -> None:
    cutter = cutter_of(mode, aot_score="mean", rl_beta=2.0, **LORA)
    whole = cutter.run(16, 1)
    assert_same(cutter.run(1, 16), whole)
    assert_differs(cutter.run(4, 4, aot_batch="micro_batch"), whole)
    assert_differs(cutter.run(16, 1, aot_score="sum"), whole)


def test_one_pair_per_token_is_ipo(cutter_of: Any) -> None:
    """TRL takes (mean margin - 1/(2 beta))^2: our least squares for a single pair."""
    cutter = cutter_of("paired", rows=12, **LORA)
    peer = cutter.run(1, 1, rl="ipo", rl_beta=0.4, aot_mode=None)
    keys = {"aot_score": "mean", "aot_penalty": "least_squares"}
    assert_same(cutter.run(1, 1, rl_beta=1 / 0.8, **keys), peer)
    assert_differs(cutter.run(1, 1, rl_beta=1 / 0.8, **keys | {"aot_score": "sum"}), peer)


def test_excess_tokens_count_less_as_in_trl(cutter_of: Any) -> None:
    cutter = cutter_of("paired", dpo_ld_alpha=0.3, rl_beta=0.5, **LORA)
    whole = cutter.run(16, 1)
    peer = {"rl": "dpo", "dpo_loss_type": ["aot"], "aot_mode": None}
    assert_same(whole, cutter.run(16, 1, **peer))
    assert_same(cutter.run(1, 16, aot_kept_memory=0), whole)
    assert_same(cutter.run(4, 4), whole)
    assert_differs(cutter.run(4, 4, aot_batch="micro_batch"), whole)
    assert_differs(cutter.run(16, 1, dpo_ld_alpha=None), whole)
    assert "aot/nll" not in whole.history[0]


def test_a_cached_reference_is_that_of_the_weight(cutter_of: Any) -> None:
    """The second run must not read what the first one cached for another weight of the excess."""
    cutter = cutter_of("paired", rl_beta=0.5, precompute_ref_log_probs=True, **LORA)
    for alpha in (0.3, 1.0):
        expected = cutter.run(4, 4, dpo_ld_alpha=alpha, precompute_ref_log_probs=False)
        assert_same(cutter.run(4, 4, dpo_ld_alpha=alpha), expected)


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_an_evaluation_compares_what_the_loss_does(mode: str, cutter_of: Any) -> None:
    cutter = cutter_of(mode, aot_score="mean", rl_beta=2.0, val_set_size=16, **LORA)
    run = cutter.run(4, 4, eval_steps=2)
    scores = load_run(run.checkpoint.parent)[-1]
    (logged,) = [
        line["eval_aot/w1"]
        for line in run.history
        if "eval_loss" in line and line["step"] == scores.step
    ]
    assert scores.unit == "nats per token"
    tokens = scores.chosen_tokens
    assert len(set(tokens)) > 3
    assert dominance_statistics(scores.u, scores.v)["w1"] == pytest.approx(logged)
    columns = scores.columns
    if mode == "paired":
        per_token = (columns["chosen_logps"] - columns["ref_chosen_logps"]) / tokens
    else:
        logratios = columns["logps"] - columns["ref_logps"]
        per_token = logratios[columns["label"]] / tokens
    assert scores.chosen_logratios == pytest.approx(per_token)
