"""Killed runs, started again by the same command, end as an unbroken one does.

``AOT_KILLS`` is the number of kills (CI's is small).
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Run, config, paired_rows, unpaired_rows, write_config, write_rows
from processes import TIMEOUT, Process, Start

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("AOT_KILLS", "3"))
STEPS = 8


def crash_config(model: Path, folder: Path, mode: str, precompute: bool) -> Path:
    folder.mkdir()
    rows = paired_rows(40) if mode == "paired" else unpaired_rows(40)
    cfg = config(
        model,
        write_rows(folder / "rows.jsonl", rows),
        folder / "out",
        aot_mode=mode,
        max_steps=STEPS,
        # A resumed run measures its first graph anew, so other passes would round otherwise.
        aot_kept_memory=0,
        num_epochs=10,
        save_steps=2,
        save_total_limit=2,
        val_set_size=0.2,
        eval_steps=2,
        gradient_accumulation_steps=2,
        precompute_ref_log_probs=precompute,
        auto_resume_from_checkpoints=True,
        dataset_num_proc=0,
    )
    return write_config(folder / "config.yml", cfg)


def appears(*patterns: str) -> Callable[[Path, Path], bool]:
    return lambda folder, log: any(any(folder.glob(pattern)) for pattern in patterns)


def logged(text: str) -> Callable[[Path, Path], bool]:
    return lambda folder, log: log.exists() and text in log.read_text()


MOMENTS: dict[str, tuple[Callable[[Path, Path], bool], float]] = {
    "preprocessing": (appears("prepared/*"), 0.5),
    "the prepared rows are written": (appears("prepared/*/*.arrow"), 0.01),
    "the reference cache is written": (logged("reference log probs"), 0.5),
    "training": (logged("'loss'"), 2.0),
    "the first checkpoint is written": (appears("out/checkpoint-2"), 0.12),
    "a later checkpoint is written": (appears("out/checkpoint-6"), 0.12),
    "an evaluation is written": (appears("out/aot/*", "out/aot/.*"), 0.1),
    "the model is written": (appears("out/*.safetensors"), 0.05),
}
"""What is waited for, and the seconds after it within which the kill falls at random."""


def kill_at(process: Process, moment: str, folder: Path, rng: random.Random) -> bool:
    """Kill at a random time after the moment has come; whether the run was still going."""
    come, within = MOMENTS[moment]
    end = time.monotonic() + TIMEOUT
    while process.alive() and not come(folder, process.log):
        assert time.monotonic() < end, process.log.read_text()[-4000:]
        time.sleep(0.001)
    time.sleep(rng.uniform(0, within))
    going = process.alive()
    process.kill()
    assert process.wait() == -signal.SIGKILL or not going
    return going


def left(folder: Path) -> str:
    """What a killed run had written, for the record."""
    checkpoints = [
        f"{path.name}{'' if (path / 'trainer_state.json').exists() else ' (half)'}"
        for path in sorted(folder.glob("out/checkpoint-*"))
    ]
    prepared = len([*folder.glob("prepared/*/state.json")])
    return f"{', '.join(checkpoints) or 'no checkpoint'}; prepared sets: {prepared}"


COMPARED = ("loss", "grad_norm", "eval_loss", "eval_rewards/margins", "aot/w1")


def by_step(run: Run, key: str) -> dict[int, float]:
    """A metric by the step. (A run that goes on evaluates once more before its first step.)"""
    return {int(entry["step"]): entry[key] for entry in run.history if key in entry}


def assert_same_losses(folder: Path, unbroken: Run) -> None:
    run = Run.last(folder / "out")
    assert run.checkpoint.name == f"checkpoint-{STEPS}"
    for key in COMPARED:
        expected = by_step(unbroken, key)
        assert len(expected) >= 4, key
        assert by_step(run, key) == pytest.approx(expected, rel=1e-6, abs=1e-6), key
    for path in (folder / "out" / "aot").glob("*.json"):
        json.loads(path.read_text())


@pytest.mark.timeout(3600)
def test_kills_at_random_moments(start: Start, tiny_model: Path, tmp_path: Path) -> None:
    rng = random.Random(int(os.environ.get("AOT_KILL_SEED", "0")))
    kinds = [("paired", True), ("unpaired", False), ("unpaired", True), ("paired", False)]
    unbroken = {}
    kills = trial = 0
    while kills < KILLS:
        mode, precompute = kinds[trial % len(kinds)]
        if (mode, precompute) not in unbroken:
            whole = crash_config(tiny_model, tmp_path / f"whole-{trial}", mode, precompute)
            start(whole).finished()
            unbroken[mode, precompute] = Run.last(whole.parent / "out")
        folder = tmp_path / f"trial-{trial}"
        path = crash_config(tiny_model, folder, mode, precompute)
        # Some runs are killed twice: the second time while they go on from a checkpoint.
        moments = [m for m in MOMENTS if precompute or "reference" not in m]
        for moment in sorted(
            rng.sample(moments, 2 if rng.random() < 0.5 else 1), key=moments.index
        ):
            killed = kill_at(start(path), moment, folder, rng)
            kills += killed
            fate = "killed" if killed else "was over"
            print(f"{mode}, precomputed {precompute}: {moment}: {fate}; {left(folder)}")
        start(path).finished()
        assert_same_losses(folder, unbroken[mode, precompute])
        trial += 1
