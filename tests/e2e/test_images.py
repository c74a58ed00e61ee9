"""Rows with images: real processors, tiny random models, by the host's command."""

import json
from pathlib import Path
from typing import Any

import pytest
import vision
from cuts import LORA, assert_differs, assert_same
from harness import Run, config, train, write_rows

from aot_plugin.host import images, steps
from aot_plugin.step.record import watched_steps

pytestmark = pytest.mark.slow

ROWS = {"paired": vision.image_pairs, "unpaired": vision.image_completions}
SAME: dict[str, Any] = {"steps": 4, "logged": ("loss",), "tolerance": 2e-4}
"""Much of a vision tower's gradient is rounding, in which processors and the places of arrays in
memory make a difference: its norm says nothing, and its parameters differ by a little more."""
PEER = {"rl": "dpo", "dpo_loss_type": ["aot"], "aot_mode": None}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vision")
    return {kind: vision.save_model(folder / kind, kind) for kind in ("Llava", "Gemma3")}


class Runs:
    """Runs on 24 rows with images, in steps of 8."""

    def __init__(self, model: Path, folder: Path, mode: str, **keys: Any) -> None:
        self.model, self.folder, self.mode = model, folder, mode
        self.data = write_rows(folder / "rows.jsonl", ROWS[mode](24, folder / "images"))
        self.keys = {
            "aot_mode": mode,
            "processor_type": f"{model.name}Processor",
            "learning_rate": 0.001,
            "adam_epsilon": 0.01,
            "max_steps": 4,
        } | keys

    def run(
        self,
        micro: int,
        accumulation: int,
        type: str | None = None,
        field_weight: str | None = None,
        **keys: Any,
    ) -> Run:
        out = self.folder / f"out-{len(list(self.folder.iterdir()))}"
        sizes = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        cfg = config(self.model, self.data, out, **{**self.keys, **sizes, **keys})
        if self.mode == "unpaired":
            cfg["datasets"][0].pop("type")
            cfg["datasets"][0] |= {"type": type} if type else {}
        if field_weight:
            cfg["datasets"][0] |= {"field_weight": field_weight}
        return train(cfg)


@pytest.mark.parametrize("kind", ["Llava", "Gemma3"])
def test_pairs_train_as_the_peers_do_at_every_cut(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    rate = {"Llava": 0.001, "Gemma3": 0.006}[kind]
    runs = Runs(models[kind], tmp_path, "paired", learning_rate=rate)
    whole = runs.run(8, 1)
    assert_same(whole, runs.run(8, 1, **PEER), **SAME)
    assert_same(runs.run(2, 4), whole, **SAME)
    assert_differs(runs.run(2, 4, aot_batch="micro_batch"), whole, SAME["tolerance"])


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_adapters_and_their_carries(
    mode: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(steps.LOG, "info", lambda text, *args: said.append(text % args))
    keys = LORA | {"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"]}
    if mode == "paired":  # at a smaller beta the penalty is all but linear, and no order counts
        keys |= {"rl_beta": 1.0}
    runs = Runs(models["Llava"], tmp_path, mode, **keys, learning_rate=0.01, max_steps=3)
    whole = runs.run(8, 1)
    for micro, carry in ((1, "HoldGradient"), (2, "KeepGraph")):
        with watched_steps() as records:
            assert_same(runs.run(micro, 8 // micro), whole, steps=3)
        assert all(carry in record.carries for record in records)
        per_row = 2 if mode == "paired" else 1
        assert sorted(records[0].groups) == [
            list(range(n * micro * per_row, (n + 1) * micro * per_row)) for n in range(8 // micro)
        ]
    assert_same(runs.run(2, 4, aot_kept_memory=0), whole, steps=3)
    assert_differs(runs.run(2, 4, aot_batch="micro_batch"), whole)
    assert any("shared prompts off (rows with images are scored as they come)" in s for s in said)


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_weights(mode: str, models: dict[str, Path], tmp_path: Path) -> None:
    # Two steps: from the third on float32 drifts apart by more than the tolerance.
    runs = Runs(models["Llava"], tmp_path, mode, max_steps=2)
    rows = [json.loads(line) for line in runs.data.read_text().splitlines()]
    weighed = [{**row, "weight": 1 + number % 3} for number, row in enumerate(rows)]
    write_rows(runs.data, weighed)
    plain = runs.run(8, 1)
    whole = runs.run(8, 1, field_weight="weight")
    assert_same(runs.run(2, 4, field_weight="weight"), whole, steps=2)
    assert_differs(plain, whole)


def test_labelled_rows_of_turns_and_of_our_type_are_the_same(
    models: dict[str, Path], tmp_path: Path
) -> None:
    runs = Runs(models["Llava"], tmp_path, "unpaired")
    whole = runs.run(8, 1)
    assert_same(runs.run(2, 4), whole, **SAME)
    assert_same(runs.run(8, 1, type="chat_template.default"), whole, **SAME)
    assert_differs(runs.run(2, 4, aot_batch="micro_batch"), whole, SAME["tolerance"])


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_an_evaluation_does_not_depend_on_its_batches(
    mode: str, models: dict[str, Path], tmp_path: Path
) -> None:
    keys = {"val_set_size": 9, "eval_steps": 1, "max_steps": 2}
    runs = Runs(models["Gemma3"], tmp_path, mode, **keys)
    one, four = (runs.run(4, 2, eval_batch_size=size).logged("eval_loss") for size in (1, 4))
    assert len(one) >= 2
    assert one == pytest.approx(four, abs=1e-5)


def test_a_cut_completion_is_said(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 27 tokens, where there are two images: completions lose some, as with the peer."""
    said: list[str] = []
    monkeypatch.setattr(images.LOG, "warning", lambda text, *args: said.append(text % args))
    runs = Runs(models["Gemma3"], tmp_path, "paired", sequence_len=24, max_steps=2)
    cut = runs.run(8, 1)
    assert_same(cut, runs.run(8, 1, **PEER), steps=2)
    assert len(said) == 1
    assert "is cut at `sequence_len: 24`" in said[0]
    with pytest.raises(ValueError, match="`sequence_len: 16` cuts off an image or a whole compl"):
        runs.run(8, 1, sequence_len=16)
