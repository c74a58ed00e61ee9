"""Command-line tools around training: `python -m aot_plugin COMMAND`.

Modules are imported only by the command that needs them.
"""

import argparse
import sys

from . import examples
from .check import cli as check
from .report import cli as report

COMMANDS = (
    ("check", "show what a config will train, before a training", check),
    ("configs", "write the example configs to a directory", examples),
    ("report", "compare runs by first-order stochastic dominance", report),
)


def main(
    argv: list[str] | None = None, prog: str = "python -m aot_plugin", prefix: str = ""
) -> int:
    """Runs a command.

    Args:
        argv: the command and its arguments; those of the process if it is None.
        prog: the program that was called, for its help and errors.
        prefix: what the commands' names begin with there.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary, module in COMMANDS:
        command = commands.add_parser(
            prefix + name,
            help=summary,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.main, prog=command.prog)
    arguments = parser.parse_args(argv)
    try:
        print(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f"{arguments.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
