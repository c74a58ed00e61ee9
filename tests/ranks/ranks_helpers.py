"""Starts ``launch.py`` under torchrun, and compares runs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ENV, Run, write_config

LAUNCH = Path(__file__).with_name("launch.py")
TOLERANCE = 1e-4


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b))


def assert_same(
    run: Run,
    reference: Run,
    parameters: dict[str, torch.Tensor] | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Losses, gradient norms and final parameters agree over all steps."""
    for key in ("loss", "grad_norm"):
        values, expected = run.logged(key), reference.logged(key)
        assert len(values) == len(expected) >= 5
        for step, (a, b) in enumerate(zip(values, expected, strict=True), 1):
            assert relative(a, b) < tolerance, (key, step, values, expected)
    parameters = run.parameters if parameters is None else parameters
    assert parameters.keys() == reference.parameters.keys()
    for name, parameter in reference.parameters.items():
        difference = (parameters[name].float() - parameter.float()).norm()
        assert difference <= tolerance * parameter.float().norm(), name


def assert_same_evaluation(run: Run, reference: Run) -> None:
    """Every number of every evaluation agrees; what is timed aside."""
    timed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    keys = {key for entry in reference.history for key in entry if key.startswith("eval_")} - timed
    assert {"eval_loss", "eval_aot/violation_fraction", "eval_rewards/margins"} <= keys
    for key in keys:
        # Margins are differences of sums of about 90 nats, which float32 resolves to 1e-5.
        resolution = 0.0 if key == "eval_loss" else 1e-3
        expected = pytest.approx(reference.logged(key), rel=TOLERANCE, abs=resolution)
        assert run.logged(key) == expected, key
        assert len(run.logged(key)) == 3  # before the first step, and every three steps


def torchrun(jobs: list[dict[str, str]], work: Path, ranks: int = 2, timeout: int = 600) -> int:
    """Train the jobs on CPU ranks; the return code. What they print goes to ``work/log.txt``."""
    process = _start(jobs, work, ranks, "--standalone", "--nproc-per-node", str(ranks))
    try:
        return process.wait(timeout)
    finally:
        _end(process)


def two_nodes(jobs: list[list[dict[str, str]]], works: list[Path], timeout: int) -> list[int]:
    """The same on two nodes of one rank each, with their own jobs and working folders, which talk
    over the loopback address; the return codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    address += ["--master-port", port]
    processes = [
        _start(jobs[node], work, 2, *address, "--node-rank", str(node))
        for node, work in enumerate(works)
    ]
    until = time.monotonic() + timeout
    try:
        return [process.wait(max(until - time.monotonic(), 1)) for process in processes]
    finally:
        for process in processes:
            _end(process)


def _start(jobs: list[dict[str, str]], work: Path, ranks: int, *where: str) -> subprocess.Popen:
    work.mkdir(parents=True, exist_ok=True)
    listing = work / "jobs.json"
    listing.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", *where]
    with open(work / "log.txt", "w") as output:
        return subprocess.Popen(
            [*command, str(LAUNCH), str(listing), str(ranks)],
            env={
                **ENV,
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
            cwd=work,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _end(process: subprocess.Popen) -> None:
    """At a timeout torchrun ends its ranks (they have process groups of their own, so a rank that
    waits for ever would outlive a killed torchrun), and is killed if it can't."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def job(cfg: dict[str, Any], **keys: str) -> dict[str, str]:
    output_dir = Path(cfg["output_dir"])
    path = write_config(output_dir.parent / f"{output_dir.name}.yml", cfg)
    wrapper = "deepspeed" if "deepspeed" in cfg else "fsdp2" if "fsdp_config" in cfg else "ddp"
    return {"config": str(path), "wrapper": wrapper, **keys}


def assert_every_rank_raised(output: Path, bad: int, sequences: int) -> None:
    """Both ranks of a job with the fault "not_finite" say so, and in which step."""
    for rank in range(2):
        trace = output.with_name(f"{output.name}.rank{rank}.txt").read_text()
        assert f"FloatingPointError: {bad} of {sequences} sequence" in trace
        assert "in step 2;" in trace


def log(work: Path) -> str:
    return (work / "log.txt").read_text()
