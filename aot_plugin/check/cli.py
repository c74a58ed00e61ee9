"""The command ``axolotl aot-check``: its arguments and errors."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

DESCRIPTION = """\
Check a config before a training, in seconds and without loading the model.

The config is validated as Axolotl does. The first rows of every entry of `datasets` and
`test_datasets` are prepared as in a training, and three of them are shown: what is prompt, and what
is trained. Nothing is written."""

ROWS = 200
"""Rows of each entry that are looked at."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command to ``parser``."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of a training")
    parser.add_argument(
        "--rows", type=_positive, default=ROWS, help="rows of each entry; default: %(default)s"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("write a number above 0")
    return number


def main(arguments: argparse.Namespace) -> str:
    """Checks a config.

    Returns:
        The facts as text.

    Raises:
        ValueError: in one line, if a training would fail.
    """
    # Standard output is for the facts. The host's handlers take what it is when they are set up.
    with contextlib.redirect_stdout(sys.stderr), _quiet():
        try:
            from .loading import load_facts

            facts = load_facts(arguments.config, arguments.rows)
        except Exception as error:
            from .loading import in_one_line

            raise ValueError(in_one_line(error)) from error
    from .text import written

    text = written(facts, colours=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    if facts.failure is None:
        return text
    print(text, flush=True)
    raise ValueError(facts.failure)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings are shown, and what the host says of its progress is not."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
