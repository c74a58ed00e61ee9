"""The GPU kit at tiny sizes, as on a machine without Axolotl."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT_THE_HOST = """
import runpy, sys
sys.modules |= dict.fromkeys(("axolotl", "trl", "datasets"))
sys.argv = sys.argv[1:]
sys.path.insert(0, "benchmarks")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_kit_runs_on_a_cpu_without_the_host(tmp_path):
    results = tmp_path / "gpu.jsonl"
    command = ["benchmarks/gpu.py", "--tiny", "--json", str(results)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_HOST, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    parts = [json.loads(line) for line in results.read_text().splitlines()]
    assert [part["card"] for part in parts] == ["none"] * 4
    found = {name: rows for part in parts for name, rows in part.items()}

    layouts = [row for row in found["layouts"] if row["name"] == "sdpa"]
    # Shared prompts need full attention; packed rows with a window need a kernel that CPUs lack.
    full, windowed = ["padded", "shared"] * 2, ["padded"] * 2
    assert [row["layout"] for row in layouts] == full + windowed
    assert all(row["ok"] for row in layouts)
    # A fault would be seen.
    assert all(row["gradient_fault"] > 10 * row["gradient_error"] for row in layouts)

    plain, second, kept, held = found["steps"][:4]
    assert plain["passes"] == kept["passes"] == held["passes"] == 4 < second["passes"] == 6
    assert second["tokens_over_limit"] > kept["tokens_over_limit"] >= 1.0
    assert held["carries"] == ["HoldGradient"] and kept["carries"] == ["KeepGraph"]
    assert 0.0 < kept["gradient_differs"] < 0.1

    # What a CPU can't do is said, not left out.
    flash = [row for row in found["layouts"] if row["name"].startswith("flash")]
    assert flash and all("needs CUDA" in row["skipped"] for row in flash)
    assert found["out_of_memory"] == [{"name": "all", "skipped": "needs CUDA"}]
