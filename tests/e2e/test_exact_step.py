"""The gradient of a step does not depend on how the step is cut into micro-batches.

Each test compares whole training runs (losses, gradient norms, final parameters), and each carries
a negative control, sorting inside micro-batches on the same data, which must miss by a wide
margin: on data whose couplings are the identity every method would agree.
"""

import weakref
from pathlib import Path
from typing import Any

import pytest
from cuts import LORA, NO_SIGNS, Cutter, assert_differs, assert_same
from safetensors.torch import load_file

from aot_plugin.host import steps
from aot_plugin.ot import losses
from aot_plugin.step import budget, carry
from aot_plugin.step.record import watched_steps

pytestmark = pytest.mark.slow

SIZES = ("aot/sorted_u", "aot/sorted_v")
CUTS = ((16, 1), (4, 4), (2, 8), (1, 16))


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.parametrize("penalty", ["logistic", "squared_hinge", "least_squares"])
@pytest.mark.parametrize("sort", ["hard", "soft"])
def test_every_cut_gives_the_same_run(
    mode: str, penalty: str, sort: str, tiny_model: Path, tmp_path: Path
) -> None:
    keys = {"aot_penalty": penalty, "aot_sort": sort, "learning_rate": 0.001}
    if sort == "soft":
        keys["aot_sort_epsilon"] = 2.0  # gaps above 0.5 nats are smoothed: not the hard sort
        if penalty != "logistic":
            # Gradients of the order of 0.1 and, where the hinge is met, of 0: with its usual
            # epsilon Adam makes whole steps of the rounding of the latter. A hinge that is not met
            # keeps the loss away from 0, where nothing but rounding would be compared.
            keys |= {"adam_epsilon": 0.01, "rl_beta": 2.0}
    cutter = Cutter(tmp_path, tiny_model, mode, **keys)
    whole = cutter.run(16, 1)
    cuts = CUTS[1:] if (penalty, sort) == ("logistic", "hard") else ((2, 8),)
    for micro, accumulation in cuts:
        assert_same(cutter.run(micro, accumulation), whole)
    assert_differs(cutter.run(2, 8, aot_batch="micro_batch"), whole)


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_the_shorter_window_at_the_end_of_an_epoch(
    mode: str, tiny_model: Path, tmp_path: Path
) -> None:
    """40 rows in steps of 16: the third step of each epoch holds 8, in fewer micro-batches."""
    cutter = Cutter(tmp_path, tiny_model, mode, rows=40, max_steps=6, num_epochs=2)
    whole = cutter.run(16, 1)
    count = [u + v for u, v in zip(*map(whole.logged, SIZES), strict=True)]
    rows_per_pair = 2 if mode == "paired" else 1
    assert count == [rows * rows_per_pair for rows in (16, 16, 8, 16, 16, 8)]
    assert_same(cutter.run(4, 4), whole)
    assert_same(cutter.run(3, 6, max_steps=4), cutter.run(18, 1, max_steps=4), steps=4)
    assert_differs(cutter.run(4, 4, aot_batch="micro_batch"), whole)


@pytest.mark.parametrize("adapter", ["lora", "precomputed", "checkpointed", "reentrant"])
def test_adapters_and_checkpointing(adapter: str, tiny_model: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {**LORA, "learning_rate": 0.01}
    if adapter == "precomputed":
        keys["precompute_ref_log_probs"] = True
    if adapter in ("checkpointed", "reentrant"):
        keys["gradient_checkpointing"] = True
        keys["gradient_checkpointing_kwargs"] = {"use_reentrant": adapter == "reentrant"}
    cutter = Cutter(tmp_path, tiny_model, "paired", **keys)
    whole = cutter.run(16, 1)
    assert_same(cutter.run(2, 8), whole)
    assert_same(cutter.run(1, 16), whole)
    assert_differs(cutter.run(2, 8, aot_batch="micro_batch"), whole)


class Held:
    """Counts the gradients that are held, those that are used, and those held at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
        self.taken = self.used = self.most = 0
        alive: list[Any] = []
        take, use = carry.HoldGradient.score, carry.scaled_gradient

        def counted_take(held: carry.HoldGradient, wrapped: bool) -> Any:
            self.taken += 1
            logps = take(held, wrapped)
            alive.append(weakref.ref(held._gradient[0]))
            self.most = max(self.most, sum(ref() is not None for ref in alive))
            return logps

        def counted_use(*args: Any) -> Any:
            self.used += 1
            return use(*args)

        monkeypatch.setattr(carry.HoldGradient, "score", counted_take)
        monkeypatch.setattr(carry, "scaled_gradient", counted_use)
        monkeypatch.setattr(budget, "HELD_SHARE", share)


SAID = {
    0: "held gradients off (the adapter is too large); kept graphs on",
    5: "held gradients of 5 of 16 micro-batches on; kept graphs on",
    16: "held gradients on; kept graphs off (the gradients of all micro-batches are held)",
}


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.parametrize("fit", SAID)
def test_held_gradients(
    mode: str, fit: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of one row: as many gradients are held as fit, and the run is the same."""
    cutter = Cutter(tmp_path, tiny_model, mode, **LORA, aot_kept_memory=0)
    whole = cutter.run(16, 1)
    adapter = sum(p.nbytes for p in whole.parameters.values())
    base = sum(p.nbytes for p in load_file(tiny_model / "model.safetensors").values())
    held = Held(monkeypatch, (fit + 0.5) * adapter / (base + adapter))
    said: list[str] = []
    monkeypatch.setattr(steps.LOG, "info", lambda text, *args: said.append(text % args))
    with watched_steps() as records:
        assert_same(cutter.run(1, 16), whole)
    kept = ["KeepGraph"] * (fit < 16)
    carries = ["HoldGradient"] * fit + kept + ["Rescore"] * (16 - fit - len(kept))
    assert [record.carries for record in records] == 5 * [carries]
    assert any(SAID[fit] in line for line in said), said
    assert (held.taken, held.used, held.most) == (5 * fit, 5 * fit, fit)
    assert_differs(cutter.run(2, 8, aot_batch="micro_batch"), whole)


def test_a_loss_of_more_than_margins_uses_no_held_gradient(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two responses of a pair then count by different factors."""

    def lopsided(step: Any, options: Any) -> Any:
        return losses.transport(step, options) - 0.01 * step.chosen.mean()

    monkeypatch.setitem(losses.LOSSES, "lopsided", lopsided)
    keys = {"learning_rate": 0.01, "aot_loss": "lopsided", **NO_SIGNS}
    cutter = Cutter(tmp_path, tiny_model, "paired", **LORA, **keys)
    whole = cutter.run(16, 1)
    held = Held(monkeypatch, 100.0)
    assert_same(cutter.run(1, 16), whole)
    assert (held.taken, held.used) == (5 * 16, 0)
    assert_differs(cutter.run(1, 16, aot_loss="transport"), whole)


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_an_sft_term_of_the_whole_step(mode: str, tiny_model: Path, tmp_path: Path) -> None:
    """A mean over the step's tokens: not that over micro-batches."""
    keys = {"aot_sft_weight": 0.5, "learning_rate": 0.01, **NO_SIGNS}
    cutter = Cutter(tmp_path, tiny_model, mode, **LORA, **keys)
    whole = cutter.run(16, 1)
    assert_same(cutter.run(1, 16), whole)
    assert_differs(cutter.run(1, 16, aot_sft_weight=0), whole)
    assert_differs(cutter.run(4, 4, aot_batch="micro_batch"), whole)
    if mode == "paired":
        peer = {"rl": "dpo", "dpo_loss_type": ["aot", "sft"], "dpo_loss_weights": [1.0, 0.5]}
        peer |= {"aot_mode": None, "aot_sft_weight": None}
        assert_same(whole, cutter.run(16, 1, **peer))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_micro_batch_sorting_is_the_peers(
    accumulation: int, tiny_model: Path, tmp_path: Path
) -> None:
    """`aot_batch: micro_batch`, and any sorting at one micro-batch per step, is TRL's `aot`."""
    cutter = Cutter(tmp_path, tiny_model, "paired")
    peer = cutter.run(4, accumulation, rl="dpo", dpo_loss_type=["aot"], aot_mode=None)
    assert_same(cutter.run(4, accumulation, aot_batch="micro_batch"), peer)
    if accumulation == 1:
        assert_same(cutter.run(4, 1), peer)
    else:
        assert_differs(cutter.run(4, accumulation), peer)
