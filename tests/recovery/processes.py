"""Trainings in processes of their own, which can be killed or interrupted.

With ``AOT_REAL_COMMAND`` set, each is the host's own command in a new interpreter instead of a fork
that calls what that command calls.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from harness import ENV
from host_process import start_axolotl

TIMEOUT = 600


class Process:
    """A training that can be killed: ``with Process(...)``, then ``wait``."""

    def __init__(self, pid: int, wait: Callable[[], int], log: Path) -> None:
        self.pid, self.wait, self.log = pid, wait, log

    def kill(self, signum: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def alive(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def finished(self) -> None:
        code = self.wait()
        assert code == 0, f"exit {code}:\n{self.log.read_text()[-4000:]}"


Start = Callable[[Path], Process]


def command(path: Path) -> Process:
    log = path.with_suffix(".log")
    with open(log, "a") as output:
        process = subprocess.Popen(
            ["axolotl", "train", str(path), "--launcher", "python"],
            env=ENV,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Process(process.pid, lambda: process.wait(TIMEOUT), log)


def starter() -> Start:
    """``start(config)``: a training in a process of its own."""
    if os.environ.get("AOT_REAL_COMMAND"):
        return command

    def fork(path: Path) -> Process:
        log = path.with_suffix(".log")
        process = start_axolotl("train", path, "--launcher", "python", log=log)
        return Process(process.pid, lambda: process.wait(TIMEOUT), log)

    return fork
