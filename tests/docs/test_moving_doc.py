"""docs/moving-from-dpo-and-kto.md says of every refused key that it is, and quotes real errors."""

import re
from pathlib import Path
from typing import Any

import pytest

from aot_plugin import config
from aot_plugin.host.keys import FOREIGN, REFUSED, REFUSED_IF_ON, REFUSED_OF_TRL

DOC = (Path(__file__).parents[2] / "docs" / "moving-from-dpo-and-kto.md").read_text()
ROWS = [line.split(" | ", 1) for line in DOC.splitlines() if line.startswith("| `")]
REFUSED_IN_DOC = {
    key
    for keys, meaning in ROWS
    if meaning.startswith("refused")
    for key in re.findall(r"`([\w.]+)`", keys)
}


def test_every_refused_key_is_in_the_table_and_no_other() -> None:
    refused = {*REFUSED, *REFUSED_IF_ON, *(f"trl.{key}" for key in REFUSED_OF_TRL)}
    assert refused | set(config._PARALLEL) | set(FOREIGN) == REFUSED_IN_DOC


@pytest.mark.parametrize(
    ("cfg", "begins"),
    [
        ({"rl": "dpo", "aot_penalty": "logistic"}, "`aot_penalty` is an option of `rl: aot`, but"),
        ({"rl": "aot", "aot_penalti": "logistic"}, "`aot_penalti` is not an option of aot-plugin"),
        ({"rl": "aot", "aot_sort_epsilon": 1.0}, "`aot_sort_epsilon` needs `aot_sort: soft`"),
        ({"rl": "aot", "rl_beta": 0}, "`rl_beta: 0` is wrong"),
        (
            {"rl": "aot", "dpo_beta": 0.1},
            "`dpo_beta` can't be used with `rl: aot`: write `rl_beta`",
        ),
    ],
)
def test_the_quoted_errors_are_the_real_ones(cfg: dict[str, Any], begins: str) -> None:
    assert begins in DOC
    with pytest.raises(ValueError, match="^" + re.escape(begins)):
        config.desugar(cfg)
