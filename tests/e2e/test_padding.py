"""The host's `pad_to_multiple_of`, in both modes: other widths, the same numbers."""

from pathlib import Path
from typing import Any

import pytest
from cuts import NO_SIGNS
from harness import Run, config, paired_rows, train, unpaired_rows, write_rows

from aot_plugin.step.record import watched_steps

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_pad_to_multiple_of(mode: str, accumulation: int, tiny_model: Path, tmp_path: Path) -> None:
    rows = paired_rows(16) if mode == "paired" else unpaired_rows(16)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    widths: dict[str, set[int]] = {}

    def run(name: str, **keys: Any) -> Run:
        keys |= {"gradient_accumulation_steps": accumulation, "dataset_num_proc": 0, **NO_SIGNS}
        cfg = config(tiny_model, data, tmp_path / name, aot_mode=mode, max_steps=2, **keys)
        with watched_steps() as steps:
            found = train(cfg)
        widths[name] = {made.width for step in steps for made in step.passes}
        return found

    plain, padded = run("plain"), run("padded", pad_to_multiple_of=64)
    assert {width % 64 for width in widths["padded"]} == {0} != {w % 64 for w in widths["plain"]}
    assert padded.logged("loss") == pytest.approx(plain.logged("loss"), rel=1e-5)
