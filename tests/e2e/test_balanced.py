"""`aot_draw: balanced`, by the host's own command: equal numbers of both labels in every step."""

from pathlib import Path
from typing import Any

import pytest
from harness import Run, config, train, unpaired_rows, write_rows

from aot_plugin.host import callbacks

pytestmark = pytest.mark.slow

ROWS, POSITIVES = 40, 5
SORTED = [4] * 8 + [3]
"""Of each label: an epoch of 70 rows in steps of 8."""


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    work = tmp_path_factory.mktemp("balanced")
    rows = unpaired_rows(ROWS, positive_every=ROWS // POSITIVES)
    data = write_rows(work / "rows.jsonl", rows)

    def trained(name: str, micro: int, accumulation: int, **keys: Any) -> Run:
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        epoch = {"max_steps": None, "save_steps": None, "num_epochs": 1, "save_strategy": "epoch"}
        keys = {"aot_mode": "unpaired", **cut, **epoch, **keys}
        return train(config(tiny_model, data, work / name, **keys))

    return trained


def test_every_step_has_equal_numbers_however_it_is_cut(run: Any) -> None:
    whole, parts = run("8x1", 8, 1, aot_draw="balanced"), run("2x4", 2, 4, aot_draw="balanced")
    for one in (whole, parts):
        assert one.logged("aot/sorted_u") == one.logged("aot/sorted_v") == SORTED
    assert parts.logged("loss") == pytest.approx(whole.logged("loss"), rel=1e-4)


def test_in_proportion_an_epoch_has_every_row_once(run: Any) -> None:
    proportional = run("proportional", 8, 1)
    assert proportional.logged("aot/sorted_u") == [1] * POSITIVES
    assert proportional.logged("aot/sorted_v") == [7] * POSITIVES


def test_micro_batches_that_are_sorted_alone_have_equal_numbers(run: Any) -> None:
    alone = run("alone", 2, 4, aot_draw="balanced", aot_batch="micro_batch")
    assert alone.logged("aot/one_sided_steps")[-1] == 0


def test_a_resumed_run_says_that_its_epochs_are_others(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(callbacks.LOG, "warning", lambda text, *args: said.append(text % args))
    keys = {"save_strategy": "steps", "save_steps": 3, "max_steps": 9}
    first = run("first", 8, 1, aot_draw="balanced", **keys)
    kept = str(first.checkpoint.parent / "checkpoint-6")
    run("same", 8, 1, aot_draw="balanced", resume_from_checkpoint=kept, **keys)
    assert not any("the checkpoint was saved" in line for line in said)
    run("other", 8, 1, resume_from_checkpoint=kept, **keys)
    (line,) = [line for line in said if "the checkpoint was saved" in line]
    assert "step 6 as epoch 0.67, and is epoch 1.20" in line and "`aot_draw`" in line
