"""The host in processes of its own: forks of one process that has imported it.

An import of the host takes longer than a tiny run. So Python's own fork server imports it once for
all tests of a worker, and each run is a fork with its own arguments, environment, working folder
and output. The server never imports the plugin: a run finds it as a new interpreter does.
"""

import gc
import io
import multiprocessing
import os
import pkgutil
import signal
import sys
import tempfile
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

HOST = [
    "axolotl.cli.main",
    "axolotl.cli.train",
    "axolotl.train",
    "axolotl.utils.data.rl",
]
"""What is imported before the forks: all that a run of the host imports."""

multiprocessing.get_context("forkserver").set_forkserver_preload(HOST)


class Fork(ForkServerProcess):
    """A process that calls a function, and starts at once.

    Args:
        function: ``module:name``; the module is imported in the process.
        args: the function's arguments.
        log: file that the output is appended to.
        cwd: working folder; that of the tests if it is None.
        stdin: what the process can read.
        env: additions to the environment. ``PYTHONPATH`` goes before the tests' own.
    """

    def __init__(
        self,
        function: str,
        *args: Any,
        log: Path,
        cwd: Path | None = None,
        stdin: str = "",
        env: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.function, self.args, self.log = function, args, log
        self.cwd, self.stdin, self.env = cwd, stdin, env or {}
        self.start()

    def run(self) -> None:
        gc.freeze()  # the host collects garbage often; what it imported need not be looked at again
        # Processes and interrupts as in a new interpreter.
        multiprocessing.set_start_method(None, force=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(self.env)
        sys.path[:0] = filter(None, self.env.get("PYTHONPATH", "").split(os.pathsep))
        if self.cwd is not None:
            os.chdir(self.cwd)
        sys.stdin = io.StringIO(self.stdin)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        pkgutil.resolve_name(self.function)(*self.args)

    def wait(self, timeout: float = 600) -> int:
        """The exit status, as ``subprocess`` gives it.

        Raises:
            TimeoutError: if it is still running; it is killed.
        """
        self.join(timeout)
        if self.exitcode is None:
            self.kill()
            self.join()
            raise TimeoutError(f"after {timeout} s:\n{self.log.read_text()[-4000:]}")
        return self.exitcode


def _command(args: list[str]) -> None:
    from axolotl.cli.main import main

    sys.argv = [str(Path(sys.executable).with_name("axolotl")), *args]
    main()


def start_axolotl(*args: str | Path, log: Path, **options: Any) -> Fork:
    """Start what the script ``axolotl`` calls; ``options`` are those of ``Fork``."""
    return Fork("host_process:_command", list(map(str, args)), log=log, **options)


def forked_axolotl(*args: str | Path, **options: Any) -> str:
    """Run what the script ``axolotl`` calls; returns its whole output.

    Raises:
        AssertionError: if it fails.
    """
    with tempfile.NamedTemporaryFile() as log:
        code = start_axolotl(*args, log=Path(log.name), **options).wait()
        output = Path(log.name).read_text()
    assert code == 0, f"axolotl {args} failed:\n{output[-6000:]}"
    return output
