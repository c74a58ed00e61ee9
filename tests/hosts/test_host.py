"""Training on the installed release of the host, whichever it is (`tests/hosts/run.sh RELEASE`)."""

import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from harness import Run, axolotl, config, paired_rows, unpaired_rows, write_config, write_rows
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
        keys |= {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}

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
