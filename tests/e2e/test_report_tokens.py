"""`report --eval-data` scores the tokens that the run itself evaluated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import config, paired_rows, train, write_rows

from aot_plugin.report.scores import load_run
from aot_plugin.report.scoring import score_run

pytestmark = pytest.mark.slow
BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
TEMPLATES: dict[str, dict[str, Any]] = {
    "without end of turn": {"chat_template": "jinja", "chat_template_jinja": BARE},
    "opens a block": {"chat_template": "qwen3"},
    "with a key": {"chat_template": "qwen3", "chat_template_kwargs": {"enable_thinking": False}},
}


@pytest.mark.parametrize(
    ("template", "mode"), [*((name, "paired") for name in TEMPLATES), ("with a key", "unpaired")]
)
def test_the_report_scores_what_was_evaluated(
    template: str, mode: str, tiny_model: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = paired_rows(6)
    if mode == "unpaired":
        rows = [
            {"messages": row["messages"], "completion": row[name], "label": name == "chosen"}
            for row in rows
            for name in ("chosen", "rejected")
        ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    entry = {"path": str(data), "ds_type": "json", "split": "train"}
    entries = [entry | {"type": "chat_template.default"}]
    keys = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    cfg = config(
        *(tiny_model, data, tmp_path / "out"),
        **keys | TEMPLATES[template],
        aot_mode=mode,
        datasets=entries,
        test_datasets=entries,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        dataset_num_proc=0,
        learning_rate=0.01,
    )
    train(cfg)
    evaluated = load_run(tmp_path / "out")[-1]
    scored = score_run(tmp_path / "out", data, base_model=str(tiny_model), dtype="float32")
    assert len(evaluated.u) == 6
    for name, values in evaluated.columns.items():
        found = scored.columns[name]
        if name.endswith("tokens"):
            assert sorted(values) == sorted(found)
        elif name.endswith("logps"):
            np.testing.assert_allclose(np.sort(found), np.sort(values), rtol=1e-4)
    # What the template adds to a response of six words.
    (used,) = json.loads((tmp_path / "out" / "aot" / "rendering.json").read_text())
    assert used["chat_template_kwargs"] == TEMPLATES[template].get("chat_template_kwargs")
