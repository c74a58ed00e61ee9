"""Score and gradient see one network, and before the first step the policy is the reference."""

import gc
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import LORA, Cutter, assert_differs, assert_same
from harness import config, paired_rows, train, unpaired_rows, write_rows
from safetensors.torch import load_file, save_file

from aot_plugin import trainer
from aot_plugin.host.checks import SAVED_REFERENCE
from aot_plugin.step import budget
from aot_plugin.step.carry import HoldGradient

pytestmark = pytest.mark.slow

IN_PROCESS = {"dataset_num_proc": 0}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
FULL = {**IN_PROCESS, "overrides_of_model_config": ROPE, "max_steps": 2}


def test_schedule_free_optimizers(tiny_model: Path, tmp_path: Path) -> None:
    """An evaluation leaves the optimizer's averaged weights in the model, which the host's training
    step exchanges before its forward pass: the step must not have been scored by then."""
    keys = {"optimizer": "schedule_free_adamw", "learning_rate": 0.01, **LORA, **IN_PROCESS}
    keys |= {"val_set_size": 0.25, "eval_steps": 1, "max_steps": 4}
    cutter = Cutter(tmp_path, tiny_model, "paired", **keys)
    whole = cutter.run(8, 1)
    run = cutter.run(1, 8)
    assert_same(run, whole, steps=4)
    assert len(run.logged("eval_loss")) >= 4
    assert_differs(cutter.run(2, 4, aot_batch="micro_batch"), whole)


def test_a_callback_that_changes_the_network_before_a_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As quantization-aware training does: the host calls it when it has drawn the batches."""
    from transformers.trainer_callback import CallbackHandler

    begin = CallbackHandler.on_step_begin

    def shift(self: Any, args: Any, state: Any, control: Any) -> Any:
        if state.global_step == 1:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if "lora_B" in name:
                        parameter += 0.02
        return begin(self, args, state, control)

    cutter = Cutter(tmp_path, tiny_model, "paired", **LORA, **IN_PROCESS, max_steps=3)
    without = cutter.run(8, 1)
    monkeypatch.setattr(CallbackHandler, "on_step_begin", shift)
    whole = cutter.run(8, 1)
    assert_same(cutter.run(2, 4), whole, steps=3)
    assert_differs(without, whole)


def test_functional_dropout(tiny_model: Path, tmp_path: Path) -> None:
    """It belongs to no module of its own, so only the scores can show it."""
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(16))
    keys = {"overrides_of_model_config": {"attention_dropout": 0.1}, "max_steps": 1, **IN_PROCESS}
    with pytest.raises(ValueError, match=r"the network is random.*set to 0: `attention_dropout: 0"):
        train(config(tiny_model, data, tmp_path / "out", **keys))
    kept = config(tiny_model, data, tmp_path / "kept", aot_batch="micro_batch", **keys)
    assert len(train(kept).logged("loss")) == 1


def test_the_reference_of_unpaired_full_fine_tuning_has_the_policys_config(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", unpaired_rows(32))
    keys = {"aot_mode": "unpaired", **FULL}
    run = train(config(tiny_model, data, tmp_path / "out", **keys))
    assert run.logged("loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    # TRL's own reference, from the checkpoint without the overrides, is refused.
    monkeypatch.setattr(trainer, "loaded_after", lambda policy: None)
    with pytest.raises(ValueError, match="before the first step the policy must be the reference"):
        train(config(tiny_model, data, tmp_path / "wrong", **keys))


def test_an_adapter_that_changes_the_base_model(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(16))
    keys = {**LORA, **IN_PROCESS, "peft_init_lora_weights": "pissa", "max_steps": 1}
    with pytest.raises(ValueError, match=r"`peft_init_lora_weights: pissa`"):
        train(config(tiny_model, data, tmp_path / "out", **keys))


def test_an_optimizer_that_updates_in_the_backward_pass(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LOMO does: the second micro-batch would see other weights than those of the scores."""
    training_step = trainer.AOTTrainerMixin.training_step

    def with_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(self, *args, **kwargs)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.data -= 1e-4 * parameter.grad
        return loss

    monkeypatch.setattr(trainer.AOTTrainerMixin, "training_step", with_update)
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(16))
    keys = {**LORA, **IN_PROCESS, "max_steps": 1}
    with pytest.raises(ValueError, match="the weights changed between two micro-batches"):
        train(config(tiny_model, data, tmp_path / "out", **keys))
    one = {"micro_batch_size": 8, "gradient_accumulation_steps": 1}
    assert train(config(tiny_model, data, tmp_path / "one", **keys, **one)).logged("loss")


def test_a_resumed_run_may_begin_with_a_step_of_one_micro_batch(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Ten rows are steps of four micro-batches and of one. What the optimizer does between the
    first step and the second is no update within a step."""
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(10))
    keys = {**LORA, **IN_PROCESS, "num_epochs": 3, "save_steps": 1, "learning_rate": 0.01}
    whole = train(config(tiny_model, data, tmp_path / "out", **{**keys, "max_steps": 3}))
    resumed = config(tiny_model, data, tmp_path / "out", **{**keys, "max_steps": 3})
    resumed["resume_from_checkpoint"] = str(tmp_path / "out" / "checkpoint-1")
    again = train(resumed | {"output_dir": str(tmp_path / "again")})
    assert again.logged("loss") == pytest.approx(whole.logged("loss"), rel=1e-6)


def test_out_of_memory_in_the_middle_of_a_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever catches it gets back what the step held, and can train on."""
    mixin = trainer.AOTTrainerMixin
    take, compute_loss, whole_train = HoldGradient.score, mixin.compute_loss, mixin.train
    held: list[Any] = []
    calls: list[int] = []

    def recorded(carry: HoldGradient, wrapped: bool) -> Any:
        logps = take(carry, wrapped)
        held.append(weakref.ref(carry._gradient[0]))
        return logps

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute_loss(self, *args, **kwargs)

    def train_again(self: Any, *args: Any, **kwargs: Any) -> Any:
        with pytest.raises(torch.OutOfMemoryError):
            whole_train(self, *args, **kwargs)
        gc.collect()
        assert len(held) == 8 and not any(ref() is not None for ref in held)
        return whole_train(self, *args, **kwargs)

    # Unpaired rows come in an order that depends on the seed alone.
    keys = {**LORA, **IN_PROCESS, "max_steps": 2}
    cutter = Cutter(tmp_path, tiny_model, "unpaired", **keys)
    whole = cutter.run(1, 8)
    monkeypatch.setattr(HoldGradient, "score", recorded)
    monkeypatch.setattr(mixin, "compute_loss", failing)
    monkeypatch.setattr(mixin, "train", train_again)
    monkeypatch.setattr(budget, "HELD_SHARE", 100.0)
    assert_same(cutter.run(1, 8), whole, steps=2)


class Forgetful(torch.autograd.Function):
    """The identity, whose backward pass knows the first row of a micro-batch only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.cat([grad[:1], torch.zeros_like(grad[1:])])


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.parametrize("adapter", [LORA, {}], ids=["lora", "full"])
def test_a_wrong_backward_pass_for_several_rows(
    mode: str, adapter: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """No score shows it: `tiled_mlp` of Axolotl 0.21 was of this kind."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: Forgetful.apply(forward(self, x)))
    rows = paired_rows(16) if mode == "paired" else unpaired_rows(16)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    cfg = config(tiny_model, data, tmp_path / "out", aot_mode=mode, **adapter, **IN_PROCESS)
    with pytest.raises(ValueError, match="the gradient of rows together is not the sum"):
        train(cfg)


@pytest.mark.parametrize(
    ("mode", "keys"),
    [
        ("paired", LORA),
        ("unpaired", {}),
        ("paired", {**LORA, "precompute_ref_log_probs": True}),
    ],
    ids=["adapter", "full", "cached reference"],
)
def test_a_resumed_run_keeps_its_reference(
    mode: str, keys: dict[str, Any], tiny_model: Path, tmp_path: Path, caplog: Any
) -> None:
    """Other weights under the same path show in what the reference says of random rows."""
    base = shutil.copytree(tiny_model, tmp_path / "model")
    rows = paired_rows(16) if mode == "paired" else unpaired_rows(16)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    keys = {"aot_mode": mode, "save_steps": 1, "dataset_prepared_path": None, **keys}
    first = config(base, data, tmp_path / "out", **{**keys, "max_steps": 1}, **IN_PROCESS)
    train(first)
    saved = tmp_path / "out" / "checkpoint-1" / SAVED_REFERENCE
    again = {**first, "max_steps": 2, "resume_from_checkpoint": str(saved.parent)}
    # Its rounding is that of another kernel, and no other reference.
    others = {"attn_implementation": "eager", "output_dir": str(tmp_path / "again")}
    assert len(train({**again, **others}).logged("loss")) == 2

    assert "the weights of the reference are not" not in caplog.text
    weights = load_file(base / "model.safetensors")
    changed = weights["model.norm.weight"]
    changed[0] = torch.nextafter(changed[0], changed[0] + 1)  # too little for any score to show
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert len(train({**again, **others}).logged("loss")) == 2
    assert "the weights of the reference are not those with which this run began" in caplog.text

    name = next(name for name in weights if "layers.0" in name and "q_proj" in name)
    weights[name] *= 1.1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    other = {**again, "output_dir": str(tmp_path / "other")}
    with pytest.raises(ValueError, match=r"not the one with which this run began.*aot_reference"):
        train(other)
    saved.unlink()
    assert len(train(other).logged("loss")) == 2


def test_the_reference_is_saved_before_a_checkpoint_is_uploaded(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hub_strategy: checkpoint` uploads it once the optimizer is saved."""
    from transformers import Trainer

    save, seen = Trainer._save_optimizer_and_scheduler, []

    def watched(self: Any, output_dir: str) -> None:
        seen.append((Path(output_dir) / SAVED_REFERENCE).is_file())
        save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", watched)
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(16))
    keys = {"aot_mode": "paired", "max_steps": 2, "save_steps": 1, **IN_PROCESS}
    train(config(tiny_model, data, tmp_path / "out", **keys))
    assert seen == [True, True]
    assert not (tmp_path / "out" / SAVED_REFERENCE).exists()


def test_embeddings_of_new_tokens_drawn_with_another_seed(tiny_model: Path, tmp_path: Path) -> None:
    """Few random rows hold the one new token, whose embedding the host draws for the reference."""
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(16))
    keys = {"tokens": ["<|new|>"], "save_steps": 1, "seed": 42, **IN_PROCESS}
    first = config(tiny_model, data, tmp_path / "out", aot_mode="paired", max_steps=1, **keys)
    train(first)
    checkpoint = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-1")}
    again = {**first, **checkpoint, "max_steps": 2, "output_dir": str(tmp_path / "again")}
    assert len(train(again).logged("loss")) == 2
    with pytest.raises(ValueError, match=r"not the one with which this run began.*another `seed`"):
        train({**again, "seed": 7})
