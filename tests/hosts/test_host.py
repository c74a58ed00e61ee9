"""Training on the installed release of the host, whichever it is (`tests/hosts/run.sh RELEASE`)."""

import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from harness import (
    Run,
    axolotl,
    config,
    paired_rows,
    save_adapter,
    unpaired_rows,
    write_config,
    write_rows,
)
from packaging.version import Version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("AOT_PLUGIN_HOST" not in os.environ, reason="tests/hosts/run.sh sets it"),
]

# Entry points of plugins are read from 0.21 on.
PLUGINS = (
    {} if Version(version("axolotl")) >= Version("0.21") else {"plugins": ["aot_plugin.AOTPlugin"]}
)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_training(mode: str, adapter: bool, tiny_model: Path, tmp_path: Path) -> None:
    """One micro-batch, several, and a cached reference, computed and found again: the same run."""
    rows = paired_rows(32) if mode == "paired" else unpaired_rows(32)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    keys = {"aot_mode": mode, "max_steps": 3, "val_set_size": 0.25, "eval_steps": 3, **PLUGINS}
    if adapter:
        # Older hosts draw a new adapter before they set the seed.
        start = save_adapter(tiny_model, tmp_path / "start")
        keys |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_model_dir": str(start)}
        keys["lora_target_modules"] = ["q_proj", "v_proj", "down_proj"]

    def losses(name: str, micro: int, said: str = "speed: ", **others: Any) -> list[float]:
        # By the command: older hosts merge a plugin's training arguments as they are imported.
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
        cfg = config(tiny_model, data, tmp_path / name, **keys, **cut, **others)
        path = write_config(tmp_path / f"{name}.yml", cfg)
        assert said in axolotl("train", path, "--launcher", "python")
        run = Run.last(tmp_path / name)
        assert run.logged("eval_loss") and (tmp_path / name / "aot").is_dir()
        return run.logged("loss")

    whole = losses("whole", 8)
    assert whole[0] == pytest.approx(math.log(2), abs=1e-4)
    assert len(set(whole)) == 3
    assert losses("cut", 2) == pytest.approx(whole, rel=1e-4)
    cached = {"precompute_ref_log_probs": True}
    assert losses("computed", 2, **cached) == pytest.approx(whole, rel=1e-4)
    found = losses("found", 2, "dataset's reference log-probabilities are read", **cached)
    assert found == pytest.approx(whole, rel=1e-4)
    if not adapter:  # whose first steps are too small to tell
        assert losses("apart", 2, aot_batch="micro_batch") != pytest.approx(whole, rel=1e-3)


def test_options(tiny_model: Path, tmp_path: Path) -> None:
    """Most of what a run can ask for, at once: levels, weights, lengths, order, answers."""
    rows = [row | {"stars": i % 3, "trust": 1 + i % 4} for i, row in enumerate(unpaired_rows(48))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    keys = {"aot_mode": "unpaired", "max_steps": 3, "val_set_size": 0.25, "eval_steps": 3}
    keys |= {"aot_grades": [1, 2], "aot_order": "second", "aot_score": "mean", "aot_samples": 2}
    keys |= {"aot_sft_weight": 0.1, "rl_beta": 2.0, **PLUGINS}

    def losses(micro: int) -> list[float]:
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": 12 // micro}
        cfg = config(tiny_model, data, tmp_path / str(micro), **keys, **cut)
        entry = {"path": str(data), "ds_type": "json", "type": "chat_template.default"}
        cfg["datasets"] = [entry | {"field_label": "stars", "field_weight": "trust"}]
        axolotl("train", write_config(tmp_path / f"{micro}.yml", cfg), "--launcher", "python")
        run = Run.last(tmp_path / str(micro))
        assert run.logged("aot/levels") == [3.0] * 3
        assert len(list((tmp_path / str(micro) / "aot").glob("samples-*"))) >= 1
        return run.logged("loss")

    whole = losses(12)
    assert len(set(whole)) == 3
    assert losses(3) == pytest.approx(whole, rel=1e-4)
