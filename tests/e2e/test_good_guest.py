"""With another `rl` the plugin changes nothing: same validated config, same losses to the bit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from harness import config, paired_rows, unpaired_rows, write_config, write_rows
from host_process import Fork

pytestmark = pytest.mark.slow


def run(cfg: dict[str, Any], plugin: str) -> tuple[list[bool], dict[str, Any], list[Any]]:
    out = Path(cfg["output_dir"])
    path = write_config(out.parent / "config.yml", cfg)
    process = Fork("guest:train", str(path), plugin, log=path.with_suffix(".log"))
    assert process.wait() == 0, process.log.read_text()[-6000:]
    seen = json.loads(path.with_suffix(".json").read_text())
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    history = [
        {key: entry[key] for key in ("loss", "grad_norm") if key in entry}
        for entry in state["log_history"]
    ]
    os.rename(out, out.with_name(f"{out.name}-{plugin}"))
    return seen["loaded"], seen["config"], history


@pytest.mark.parametrize("rl", ["dpo", "kto", "orpo", None])
def test_other_runs_are_the_same_to_the_bit(
    rl: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = paired_rows(16)
    if rl == "kto":
        rows = unpaired_rows(16)
    if rl is None:
        rows = [{"text": row["completion"]} for row in unpaired_rows(16)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    keys = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    cfg = config(tiny_model, data, tmp_path / "out", rl=rl, **keys)
    if rl == "orpo":
        rows = [
            {
                "prompt": row["messages"][0]["content"],
                "chosen": [*row["messages"], row["chosen"]],
                "rejected": [*row["messages"], row["rejected"]],
            }
            for row in rows
        ]
        write_rows(data, rows)
        cfg["datasets"][0]["type"] = "chat_template.argilla"
        cfg["chat_template"] = "chatml"
    if rl is None:
        cfg["datasets"][0]["type"] = "completion"
        del cfg["rl"], cfg["rl_beta"]
    with_plugin, cfg_with, history_with = run(cfg, "installed")
    without, cfg_without, history_without = run(cfg, "hidden")
    assert with_plugin == [True, False]  # discovered, but no trainer of ours imported
    assert without == [False, False]
    assert cfg_with == cfg_without
    assert history_with == history_without
    assert len(history_with) >= 2
