"""Training on top of a saved adapter, and what runs with an adapter leave behind."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cuts import assert_same
from harness import (
    Run,
    base_model,
    config,
    paired_rows,
    save_adapter,
    train,
    unpaired_rows,
    write_config,
    write_rows,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file

from aot_plugin.host import adapters
from aot_plugin.report.scores import Scores
from aot_plugin.report.scoring import score_run

pytestmark = pytest.mark.slow

NEW = {"lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
ROWS = {"paired": paired_rows(24), "unpaired": unpaired_rows(24)}


def retrain(adapter: Path) -> None:
    """Other weights under the same name."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file)


def merge(model: Path, adapter: Path, path: Path) -> Path:
    shutil.copytree(model, path)
    merged = PeftModel.from_pretrained(base_model(model), str(adapter)).merge_and_unload()
    merged.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "sft")


class Runner:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def config(self, name: str, mode: str = "paired", **keys: Any) -> dict[str, Any]:
        data = write_rows(self.folder / f"{mode}.jsonl", ROWS[mode])
        keys = {"adapter": "lora", "aot_mode": mode, "max_steps": 2, "dataset_num_proc": 0} | keys
        cfg = config(keys.pop("model", self.model), data, self.folder / name, **keys)
        return cfg | {"test_datasets": cfg["datasets"], "eval_on_start": True, "eval_steps": 2}

    def train(self, name: str, mode: str = "paired", **keys: Any) -> Run:
        return train(self.config(name, mode, **keys))

    def scores(self, name: str, step: int) -> Scores:
        return Scores.load(self.folder / name / "aot" / f"scores-eval-step{step}.parquet")

    def scores_of_evaluate(self, name: str) -> Scores:
        """What ``axolotl evaluate`` has written."""
        return Scores.load(self.folder / name / "aot" / "scores-evaluate-step0.parquet")


@pytest.fixture
def runner(tiny_model: Path, tmp_path: Path) -> Runner:
    return Runner(tmp_path, tiny_model)


def logps(scores: Scores, reference: bool) -> np.ndarray:
    names = [n for n in scores.columns if n.endswith("logps") and n.startswith("ref") == reference]
    return np.concatenate([scores.columns[name] for name in sorted(names)])


def test_scores_of_the_policy_and_the_reference(runner: Runner) -> None:
    """The helper above finds both."""
    runner.train("run", max_steps=1, eval_steps=1, **NEW)
    scores = runner.scores("run", 1)
    assert len(logps(scores, True)) == len(logps(scores, False)) == 48


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_it_begins_as_the_adapter_and_is_held_against_it(
    mode: str, runner: Runner, start: Path
) -> None:
    """As if the adapter had been merged into the base model, and a new one trained on that."""
    merged = merge(runner.model, start, runner.folder / "merged-model")
    run = runner.train("run", mode, lora_model_dir=str(start))
    other = runner.train("merged", mode, model=merged, **NEW)
    runner.train("base", mode, max_steps=1, eval_steps=1, **NEW)
    begins, ends = runner.scores("run", 0), runner.scores("run", 2)
    expected = logps(runner.scores("merged", 0), False)
    np.testing.assert_allclose(logps(begins, False), expected, atol=1e-3)
    np.testing.assert_allclose(logps(begins, True), logps(begins, False), atol=1e-4)
    np.testing.assert_allclose(logps(ends, True), expected, atol=1e-3)
    assert np.abs(logps(ends, False) - expected).max() > 0.1  # it was trained
    assert run.logged("loss")[0] == pytest.approx(other.logged("loss")[0], rel=1e-5)
    # The negative control: without the adapter, other numbers.
    assert np.abs(logps(runner.scores("base", 0), True) - expected).max() > 0.5


def test_every_way_to_the_same_run(runner: Runner, start: Path) -> None:
    keys = {"lora_model_dir": str(start), "max_steps": 5, "learning_rate": 0.001}
    cuts = {"micro_batch_size": 1, "gradient_accumulation_steps": 8}
    whole = runner.train("whole", micro_batch_size=8, gradient_accumulation_steps=1, **keys)
    assert_same(runner.train("cut", **cuts, **keys), whole)
    cached = runner.train("cached", precompute_ref_log_probs=True, **keys)
    assert_same(cached, whole)
    # The negative control, the base model for a reference, does not begin.
    with (
        mock.patch(
            "aot_plugin.host.scoring.use_adapter", lambda model, adapter_name: _disabled(model)
        ),
        pytest.raises(ValueError, match="before the first step the policy must be the reference"),
    ):
        runner.train("against-the-base", **cuts, **keys)


def _disabled(model: Any) -> Any:
    return model.disable_adapter()


@pytest.mark.parametrize(
    "keys",
    [
        {"use_dora": True, "use_rslora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["dora", "embeddings", "modules_to_save"],
)
def test_all_of_the_adapter_is_in_the_reference(keys: dict[str, Any], runner: Runner) -> None:
    start = save_adapter(runner.model, runner.folder / "sft", **keys)
    runner.train("run", max_steps=2, lora_model_dir=str(start))
    begins, ends = runner.scores("run", 0), runner.scores("run", 2)
    np.testing.assert_allclose(logps(begins, True), logps(begins, False), atol=1e-4)
    np.testing.assert_allclose(logps(ends, True), logps(begins, True), atol=1e-4)
    assert np.abs(logps(ends, False) - logps(ends, True)).max() > 0.1
    reloaded = PeftModel.from_pretrained(base_model(runner.model), str(runner.folder / "run"))
    assert list(reloaded.peft_config) == ["default"]


def test_on_quantized_weights(runner: Runner, start: Path) -> None:
    """TRL rounds the policy's adapter to bfloat16, and not its copy."""
    keys = {"adapter": "qlora", "load_in_4bit": True, "lora_model_dir": str(start)}
    run = runner.train("run", **keys)
    assert {parameter.dtype for parameter in run.parameters.values()} == {torch.bfloat16}
    begins, ends = runner.scores("run", 0), runner.scores("run", 2)
    np.testing.assert_array_equal(logps(begins, True), logps(begins, False))
    np.testing.assert_allclose(logps(ends, True), logps(begins, True), rtol=1e-6)
    assert np.abs(logps(ends, False) - logps(ends, True)).max() > 0.01
    precise = runner.train("float32", max_steps=1, lora_fp32_gradients=True, **keys)
    assert {parameter.dtype for parameter in precise.parameters.values()} == {torch.float32}


def test_a_resumed_run_on_another_base_model(runner: Runner, monkeypatch: Any) -> None:
    """Its reference would be another one."""
    said: list[str] = []
    monkeypatch.setattr(adapters.LOG, "warning", lambda text, *args: said.append(text % args))
    keys = {**NEW, "max_steps": 2, "save_steps": 1}
    runner.train("run", **keys)
    resume = {"resume_from_checkpoint": str(runner.folder / "run" / "checkpoint-1")}
    runner.train("same", **keys, **resume)
    assert said == []
    other = shutil.copytree(runner.model, runner.folder / "another")
    runner.train("other", **keys, **resume, base_model=str(other))
    (line,) = said
    assert line.endswith(f"was trained on {runner.model}, and base_model is {other}")


def test_the_life_of_a_run_on_an_adapter(runner: Runner, start: Path) -> None:
    from axolotl.cli.evaluate import do_cli as evaluate
    from axolotl.cli.merge_lora import do_cli as merge_lora

    keys = {"lora_model_dir": str(start), "max_steps": 4, "save_steps": 2, "eval_steps": 4}
    whole = runner.train("run", **keys)
    out = runner.folder / "run"
    assert not list(out.rglob("ref")) and not list(out.glob("model*"))

    first = out / "checkpoint-2"
    resumed = runner.train("resumed", **keys, resume_from_checkpoint=str(first))
    assert_same(resumed, whole, tolerance=1e-5, steps=4)
    with pytest.raises(ValueError, match=f"began with `lora_model_dir: {re.escape(str(start))}`"):
        runner.train("other", max_steps=4, **NEW, resume_from_checkpoint=str(first))
    moved = shutil.copytree(start, runner.folder / "moved")
    keys_of_moved = keys | {"lora_model_dir": str(moved), "max_steps": 3, "save_steps": 3}
    runner.train("resumed-moved", **keys_of_moved, resume_from_checkpoint=str(first))
    retrain(moved)
    with pytest.raises(ValueError, match=r"and the weights in .*moved are others than it had"):
        runner.train("retrained", **keys_of_moved, resume_from_checkpoint=str(first))
    with pytest.raises(ValueError, match="would be written over"):
        runner.train("run", lora_model_dir=str(out))

    # Evaluated, it is held against what it was trained against.
    path = write_config(runner.folder / "run.yml", runner.config("evaluated", **keys))
    with mock.patch.object(sys, "argv", ["evaluate"]):
        evaluate(config=str(path), lora_model_dir=str(out))
    evaluated, ends = runner.scores_of_evaluate("evaluated"), runner.scores("run", 4)
    for reference in (False, True):
        np.testing.assert_allclose(logps(evaluated, reference), logps(ends, reference), atol=1e-3)
    # So it is by the report, from the rows as text.
    rows = [
        {"prompt": r["messages"], "chosen": [r["chosen"]], "rejected": [r["rejected"]]}
        for r in ROWS["paired"]
    ]
    reported = score_run(out, write_rows(runner.folder / "held-out.jsonl", rows))
    np.testing.assert_allclose(  # the host shuffles the rows
        np.sort(reported.chosen_logratios), np.sort(ends.chosen_logratios), atol=1e-3
    )

    # Merged without a flag, it is what was trained, not what training began with.
    with mock.patch.object(sys, "argv", ["merge-lora"]):
        merge_lora(config=str(write_config(runner.folder / "m.yml", runner.config("run", **keys))))
    merged = base_model(out / "merged").state_dict()
    trained = PeftModel.from_pretrained(base_model(runner.model), str(out)).merge_and_unload()
    for name, parameter in trained.state_dict().items():
        torch.testing.assert_close(merged[name], parameter, atol=1e-5, rtol=1e-4)


def test_the_output_holds_the_adapter_and_no_base_model(runner: Runner) -> None:
    """The host's `rl: dpo` ends in an error here, or writes the base model beside the adapter."""
    run = runner.train("run", **NEW, lora_modules_to_save=["embed_tokens", "lm_head"])
    out = runner.folder / "run"
    weights = {
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.suffix in (".safetensors", ".bin") and path.name != "training_args.bin"
    }
    assert weights == {
        "adapter_model.safetensors",
        f"{run.checkpoint.name}/adapter_model.safetensors",
    }
    assert Run(out).parameters.keys() == run.parameters.keys()
    for name, parameter in run.parameters.items():
        assert torch.equal(Run(out).parameters[name], parameter), name
    policy = PeftModel.from_pretrained(base_model(runner.model), str(out))
    head = policy.get_output_embeddings().modules_to_save["default"].weight
    assert not torch.equal(head, base_model(runner.model).lm_head.weight)
