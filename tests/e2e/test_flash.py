"""Training under flash attention, whose kernel is a stand-in: the run is that of padded rows."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cuts import LORA, assert_differs, assert_same
from flash_stand_in import NAME, FlashAttn, flash_attn
from harness import config, paired_rows, train, write_rows

from aot_plugin.host import steps
from aot_plugin.scoring import settle
from aot_plugin.step.record import watched_steps

__all__ = ["flash_attn"]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("cut", "checkpointing"), [((2, 4), True), ((1, 8), False)])
def test_a_run_under_flash_attention(
    cut: tuple[int, int],
    checkpointing: bool,
    tiny_model: Path,
    tmp_path: Path,
    flash_attn: FlashAttn,
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(40))
    keys: dict[str, Any] = {**LORA, "learning_rate": 0.01}
    keys |= {"micro_batch_size": cut[0], "gradient_accumulation_steps": cut[1]}
    if checkpointing:
        keys["gradient_checkpointing"] = True
        keys["gradient_checkpointing_kwargs"] = {"use_reentrant": False}

    def run(name: str, **more: Any) -> Any:
        return train(config(tiny_model, data, tmp_path / name, **keys | more))

    with mock.patch.object(settle, "possible_layouts", lambda *args: ([], "of the test")):
        expected = run("eager", attn_implementation="eager")
    assert not flash_attn.calls
    said: list[str] = []
    with (
        mock.patch.object(steps.LOG, "info", lambda text, *args: said.append(text % args)),
        watched_steps() as records,
    ):
        found = run("flash", attn_implementation=NAME)
    assert any("shared prompts on; packed rows on" in line for line in said), said
    passes = [one for record in records for one in record.passes]
    assert {one.layout for one in passes} == {"packed"}
    assert {one.rows for one in passes} == {1}
    assert flash_attn.calls
    assert_same(found, expected)
    assert_differs(run("control", attn_implementation=NAME, aot_batch="micro_batch"), expected)
