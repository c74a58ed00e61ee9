"""Two ranks and fewer rows than ranks or steps need: an end within the time limit, not a wait."""

from pathlib import Path
from typing import Any

import pytest
from harness import Run, config, paired_rows, unpaired_rows, write_rows
from ranks_helpers import job, log, on_ranks

pytestmark = pytest.mark.slow


def test_more_ranks_than_rows(tiny_model: Path, tmp_path: Path) -> None:
    """The sampler of the host repeats rows for the rank that has none, as it does in its own runs.

    Pairs that have one text twice are dropped; where none is left every rank says so.
    """
    keys: dict[str, Any] = {"max_steps": 2, "num_epochs": 10, "micro_batch_size": 1}
    keys |= {"gradient_accumulation_steps": 2, "dataset_num_proc": 0}
    pair = paired_rows(1)[0]
    jobs = []
    for name, rows, mode in (
        ("one-pair", [pair], "paired"),
        ("two-labels", unpaired_rows(2), "unpaired"),
        ("equal", [pair | {"rejected": pair["chosen"]}] * 4, "paired"),
    ):
        data = write_rows(tmp_path / f"{name}.jsonl", rows)
        prepared = str(tmp_path / f"{name}.prepared")
        cfg = config(tiny_model, data, tmp_path / name, aot_mode=mode, **keys)
        jobs.append(job(cfg | {"dataset_prepared_path": prepared}))
    jobs[-1]["fails"] = "yes"
    assert on_ranks(jobs, tmp_path / "work", timeout=400) == 0, log(tmp_path / "work")[-6000:]
    for name in ("one-pair", "two-labels"):
        assert len(Run.last(tmp_path / name).logged("loss")) == 2, name
    for rank in range(2):
        error = Path(jobs[-1]["config"]).with_suffix(f".rank{rank}.txt").read_text()
        assert "`datasets`: no rows are left to train on" in error
