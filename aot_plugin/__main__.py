"""Command-line tools for training runs: `python -m aot_plugin COMMAND`.

Modules are imported only by the command that needs them.
"""

import argparse
import sys

from .report import cli as report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m aot_plugin", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "report",
        help="compare runs by first-order stochastic dominance",
        description=report.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_arguments(command)
    command.set_defaults(run=report.main)
    arguments = parser.parse_args(argv)
    try:
        print(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
