"""docs/troubleshooting.md quotes what the code says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GAP = "…"


def spoken() -> list[str]:
    """Every string of the package, what is filled in written as a gap."""
    found = []
    for path in (ROOT / "aot_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    str(part.value) if isinstance(part, ast.Constant) else GAP
                    for part in node.values
                ]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(\.\d+)?[sdfg]|{}", GAP, node.value))
    return found


def quoted() -> list[str]:
    lines = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    return [line.removeprefix("### ") for line in lines if line.startswith("### ")]


@pytest.mark.parametrize("text", quoted())
def test_the_code_says_it(text: str):
    assert any(text.strip(GAP + " ") in said for said in spoken()), text
