"""A run that is interrupted (SIGINT, Ctrl-C) leaves what the host leaves of its own runs."""

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from harness import config, paired_rows, unpaired_rows, write_config, write_rows
from processes import TIMEOUT, Start
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def interrupted(start: Start, model: Path, folder: Path, **keys: Any) -> set[str]:
    """The kinds of files in the output directory of a run that was stopped after some steps."""
    folder.mkdir()
    unpaired = keys.get("aot_mode") == "unpaired" or keys["rl"] == "kto"
    data = write_rows(folder / "rows.jsonl", (unpaired_rows if unpaired else paired_rows)(32))
    cfg = config(model, data, folder / "out", **keys, max_steps=10_000, num_epochs=10_000)
    cfg |= {"save_steps": 2, "save_total_limit": 1, "dataset_num_proc": 0}
    process = start(write_config(folder / "config.yml", cfg))
    end = time.monotonic() + TIMEOUT
    while not any((folder / "out").glob("checkpoint-*/trainer_state.json")):
        assert process.alive() and time.monotonic() < end, process.log.read_text()[-4000:]
        time.sleep(0.01)
    process.kill(signal.SIGINT)
    process.finished()
    assert load_file(folder / "out" / "model.safetensors")
    files = (path for path in (folder / "out").rglob("*") if path.is_file())
    names = (str(path.relative_to(folder / "out")) for path in files)
    # Which checkpoint was the last one, and how whole it is, depends on the moment.
    return {re.sub(r"checkpoint-\d+/.*", "checkpoint", name) for name in names}


@pytest.mark.parametrize(("mode", "host"), [("paired", "dpo"), ("unpaired", "kto")])
def test_an_interrupted_run_leaves_the_hosts_files(
    mode: str,
    host: str,
    start: Start,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    ours = interrupted(start, tiny_model, tmp_path / "ours", rl="aot", aot_mode=mode)
    theirs = interrupted(start, tiny_model, tmp_path / "theirs", rl=host)
    assert {"model.safetensors", "config.json", "checkpoint"} <= theirs
    assert ours - {"aot/rendering.json"} == theirs
