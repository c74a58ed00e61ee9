"""Command-line tools around training: `python -m aot_plugin COMMAND`.

Modules are imported only by the command that needs them.
"""

import argparse
import sys

from . import examples
from .report import cli as report

COMMANDS = (
    ("configs", "write the example configs to a directory", examples),
    ("report", "compare runs by first-order stochastic dominance", report),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m aot_plugin", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary, module in COMMANDS:
        command = commands.add_parser(
            name,
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
