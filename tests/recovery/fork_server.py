"""Trains by the function that the host's command calls, each run in a process of its own.

    python fork_server.py

Reads lines ``CONFIG LOG`` from the standard input, and answers each with a line ``@ID`` of the
process that trains, then with ``@STATUS``. An import of the host takes longer than a tiny run, so
it is done once, and every run is a fork.
"""

import gc
import os
import signal
import sys


def train(config: str, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["train"]
    from axolotl.cli.train import do_cli

    do_cli(config=config)


def main() -> None:
    # All of the host, before the forks.
    import axolotl.train
    import axolotl.utils.data.rl  # noqa: F401

    import aot_plugin.trainer  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                train(*line.split())
            except SystemExit as exit:
                os._exit(int(exit.code or 0))
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(f"@{child}", flush=True)
        print(f"@{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


if __name__ == "__main__":
    main()
