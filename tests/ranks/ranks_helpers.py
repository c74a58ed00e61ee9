"""Starts ``launch.py`` on several ranks, and compares runs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ENV, Run, write_config
from host_process import Fork

LAUNCH = Path(__file__).with_name("launch.py")
RANK_ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
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


def on_ranks(jobs: list[dict[str, Any]], work: Path, ranks: int = 2, timeout: int = 600) -> int:
    """Train the jobs on CPU ranks of one machine; 0, or the status of the first rank to fail, with
    which all end. What they print goes to ``work/log.txt``."""
    port = free_port()
    processes = [_rank(jobs, work, rank, ranks, port, local_rank=rank) for rank in range(ranks)]
    until = time.monotonic() + timeout
    running = set(processes)
    try:
        while running:
            ends = wait([process.sentinel for process in running], until - time.monotonic())
            assert ends, f"after {timeout} s:\n{log(work)[-4000:]}"
            ended = {process for process in running if process.sentinel in ends}
            running -= ended
            for process in ended:
                if code := process.wait():
                    return code
        return 0
    finally:
        _end(running)


def two_nodes(jobs: list[list[dict[str, Any]]], works: list[Path], timeout: int) -> list[int]:
    """The same on two nodes of one rank each, with their own jobs and working folders, which talk
    over the loopback address; the return codes. A node whose rank fails ends alone."""
    port = free_port()
    processes = [_rank(jobs[node], work, node, 2, port) for node, work in enumerate(works)]
    until = time.monotonic() + timeout
    try:
        return [process.wait(max(until - time.monotonic(), 1)) for process in processes]
    finally:
        _end(processes)


def torchrun(jobs: list[dict[str, Any]], work: Path, ranks: int = 2, timeout: int = 600) -> int:
    """``on_ranks`` by torchrun itself, in new interpreters; its return code."""
    listing = _listing(jobs, work)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(LAUNCH), str(listing), str(ranks)]
    with open(work / "log.txt", "w") as output:
        process = subprocess.Popen(
            command,
            env=ENV | RANK_ENV,
            cwd=work,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        return process.wait(timeout)
    finally:
        # At a timeout torchrun ends its ranks (they have process groups of their own, so a rank
        # that waits for ever would outlive a killed torchrun), and is killed if it can't.
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _listing(jobs: list[dict[str, Any]], work: Path) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    listing = work / "jobs.json"
    listing.write_text(json.dumps(jobs))
    return listing


def _rank(
    jobs: list[dict[str, Any]], work: Path, rank: int, ranks: int, port: int, local_rank: int = 0
) -> Fork:
    """One rank, with the environment that torchrun gives it."""
    numbers = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    env = RANK_ENV | {"MASTER_ADDR": "127.0.0.1"} | {key: str(n) for key, n in numbers.items()}
    listing = _listing(jobs, work)
    return Fork("launch:main", str(listing), ranks, log=work / "log.txt", cwd=work, env=env)


def _end(processes: Iterable[Fork]) -> None:
    """Says where each rank that runs hangs (see ``launch.py``), and ends it."""
    for end in (Fork.terminate, Fork.kill):
        for process in processes:
            end(process)
        wait_until = time.monotonic() + 10
        for process in processes:
            process.join(max(wait_until - time.monotonic(), 0))


def job(cfg: dict[str, Any], **keys: Any) -> dict[str, Any]:
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
