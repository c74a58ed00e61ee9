"""The package runs nothing that it is given as text or data, and asks nobody on a network."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import aot_plugin
from aot_plugin.config import desugar
from aot_plugin.data.host_schema import schema

PACKAGE = Path(aot_plugin.__file__).parent

MODULES = set(
    "pickle dill cloudpickle joblib marshal shelve subprocess pty socket ssl ftplib http urllib "
    "smtplib telnetlib xmlrpc asyncio requests httpx aiohttp urllib3 websockets huggingface_hub "
    "ctypes code codeop runpy".split()
)
CALLS = set(
    "eval exec compile __import__ breakpoint input torch.load pd.read_pickle os.system os.popen "
    "os.execv os.execvp os.spawnv os.fork yaml.load yaml.unsafe_load".split()
)
IMPORTERS = {"config.py", "data/entries.py"}
"""Where a module may be imported by name: `type: module.function` in the YAML is the host's."""


ALLOWED = {("host/model_card.py", "imports huggingface_hub.repocard")}
"""Reads and writes the header of a local file."""


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        else:
            names = []
        yield from (f"imports {name}" for name in names if name.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in CALLS:
            yield f"calls {called}"
        if called.rpartition(".")[2] == "import_module":
            yield "imports by name"
        for keyword in node.keywords:
            if keyword.arg in ("trust_remote_code", "allow_pickle", "shell"):
                yield f"passes {keyword.arg}"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_module_runs_and_fetches_nothing(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    allowed = {"imports by name"} if name in IMPORTERS else set()
    found = [o for o in offences(path.read_text()) if o not in allowed and (name, o) not in ALLOWED]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "def f():\n    import subprocess",
        "eval(text)",
        "torch.load(path)",
        "importlib.import_module(name)",
        "load(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_code_of_a_model_or_data_set_is_run_only_where_the_user_says_so(mode: str) -> None:
    cfg = {"rl": "aot", "aot_mode": mode, "datasets": [{"path": "rows", "ds_type": "json"}]}
    written = desugar(cfg)
    assert "trust_remote_code" not in written
    entry = written["datasets"][0]
    assert not getattr(entry, "trust_remote_code", False)
    assert entry.path == "rows"
    for own_module in (True, False):
        assert schema(mode, own_module).model_fields["trust_remote_code"].default is False
