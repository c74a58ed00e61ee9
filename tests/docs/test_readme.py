"""The README's table of options is the reference: the host's own tools don't show our keys."""

import re
from pathlib import Path

from aot_plugin.config import DEFAULT_BETA, AOTInputArgs, AOTOptions

README = (Path(__file__).parents[2] / "README.md").read_text()
ROWS = {
    cells[0]: cells
    for cells in (
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in README.splitlines()
        if line.startswith("| `")
    )
}


def test_the_table_lists_every_option_and_no_other() -> None:
    documented = {name.strip("`") for name in ROWS}
    assert documented == (set(AOTInputArgs.model_fields) - {"aot_datasets"}) | {"rl_beta"}


def test_the_table_gives_the_defaults() -> None:
    defaults = {**vars(AOTOptions()), "aot_mode": "paired", "rl_beta": DEFAULT_BETA}
    for key, value in defaults.items():
        shown = ROWS[f"`{key}`"][2].strip("`")
        expected = str(value).lower() if isinstance(value, bool) else f"{value}"
        assert shown in (expected, re.sub(r"\.0$", "", expected)), key
