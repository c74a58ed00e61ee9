"""The host's own tests and example configs, with this plugin and without it.

    python tests/config/host_suite.py tests CHECKOUT [PATH ...]
    python tests/config/host_suite.py examples CHECKOUT

CHECKOUT is a clone of the host's public repository (its ``tests`` and ``examples`` are not part of
the installed package, and none of them is part of this one). The tests run against the installed
host, offline and on the CPU, twice: as it is, and with the distribution hidden from Python as if
``pip uninstall aot-plugin`` had run. Many fail either way, for want of a network or a GPU; what
counts is that the two sets of outcomes are equal. What was seen is in docs/compatibility.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATHS = (
    "tests/test_validation_dataset.py",
    "tests/test_normalize_config.py",
    "tests/test_data.py",
    "tests/test_dict.py",
    "tests/utils/schemas",
    "tests/utils/data",
    "tests/utils/lora",
    "tests/patched/test_validation.py",
    "tests/prompt_strategies/test_dpo_chat_templates.py",
    "tests/prompt_strategies/test_dpo_chatml.py",
    "tests/prompt_strategies/test_dpo_user_defined.py",
    "tests/prompt_strategies/test_kto_chatml.py",
    "tests/prompt_strategies/test_kto_user_defined.py",
    "tests/core/test_builders.py",
    "tests/core/test_builders_rl.py",
)
"""Config validation, RL data and trainer builders."""

HIDE = """
import sys
from importlib import metadata

class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "aot_plugin":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden)
found = metadata.MetadataPathFinder.find_distributions
metadata.MetadataPathFinder.find_distributions = classmethod(
    lambda cls, *args, **kwargs: (
        d for d in found(*args, **kwargs) if d.metadata["Name"] != "aot-plugin"
    )
)
"""
"""A ``sitecustomize`` that hides the distribution, from subprocesses of the tests as well."""

OFFLINE = """
import huggingface_hub, pathlib, tempfile

real = huggingface_hub.snapshot_download

def snapshot_download(repo_id, *args, **kwargs):
    try:
        return real(repo_id, *args, **kwargs)
    except Exception:  # the host's test session asks for everything at its start
        return tempfile.mkdtemp()

huggingface_hub.snapshot_download = snapshot_download
"""
"""A pytest plugin: what can't be downloaded fails the tests that need it, not all of them."""

CHECK = (
    "from axolotl.integrations.base import get_builtin_plugins; "
    "print('HIDDEN', not any('aot_plugin' in name for name in get_builtin_plugins()))"
)


def environment(folder: Path, hidden: bool) -> dict[str, str]:
    env = {
        **os.environ,
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "TRL_EXPERIMENTAL_SILENCE": "1",  # one of the tests makes every warning an error
    }
    (folder / "offline_hub.py").write_text(OFFLINE)
    provide_model(folder / "hub")
    if hidden:
        (folder / "sitecustomize.py").write_text(HIDE)
    seen = subprocess.run(
        [sys.executable, "-c", CHECK], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert f"HIDDEN {hidden}" in seen, "the plugin is not where this script takes it to be"
    return env


def provide_model(hub: Path) -> None:
    """The one model of the host's tests that is at hand (with our tests' weights: its Instruct
    variant), as the hub's cache holds it."""
    model = Path(__file__).parents[2] / "outputs" / "smollm2-135m-instruct"
    if model.is_dir():
        repository = hub / "hub" / "models--HuggingFaceTB--SmolLM2-135M"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / ("0" * 40)).symlink_to(model.resolve())


def outcomes(checkout: Path, paths: list[str], hidden: bool) -> dict[str, str]:
    """Test -> passed, skipped, or the first words of what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = folder / "report.xml"
        env = environment(folder, hidden)
        options = ["-q", "-p", "no:cacheprovider", "-p", "offline_hub", "-o", "addopts="]
        options += ["--timeout", "120", "--continue-on-collection-errors"]
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *paths],
            cwd=checkout,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return dict(_cases(report))


def _cases(report: Path) -> Iterator[tuple[str, str]]:
    for case in ET.parse(report).iter("testcase"):
        problem = case.find("failure") if case.find("error") is None else case.find("error")
        kind = "skipped" if case.find("skipped") is not None else "passed"
        if problem is not None:
            kind = f"{problem.tag}: {(problem.get('message') or '').split(':')[0][:60]}"
        yield f"{case.get('classname')}::{case.get('name')}", kind


def compare_tests(checkout: Path, paths: list[str]) -> bool:
    found = {}
    for hidden in (False, True):
        found[hidden] = outcomes(checkout, paths, hidden)
        label = "without the plugin" if hidden else "with the plugin"
        counts = Counter(kind.partition(":")[0] for kind in found[hidden].values())
        print(f"{label}: {len(found[hidden])} tests, {dict(counts)}", flush=True)
    failed = sorted(test for test, kind in found[True].items() if ":" in kind)
    print(f"\nfail without the plugin ({len(failed)}):")
    for kind, number in Counter(found[True][test] for test in failed).most_common():
        print(f"  {number:4d}  {kind}")
    differing = [
        test
        for test in sorted(found[False].keys() | found[True].keys())
        if found[False].get(test) != found[True].get(test)
    ]
    print(f"\ndiffering outcomes: {len(differing)}")
    for test in differing:
        print(f"  {test}: with {found[False].get(test)}, without {found[True].get(test)}")
    return not differing


def compare_examples(checkout: Path) -> bool:
    """Validate every example with `rl: dpo`, `ipo` or `kto` as `rl: aot`; a table for the docs."""
    import yaml

    print("| example | `rl` | outcome |\n|---|---|---|")
    understood = True
    for path in sorted((checkout / "examples").rglob("*.y*ml")):
        cfg = yaml.safe_load(path.read_text())
        if not isinstance(cfg, dict) or cfg.get("rl") not in MODES:
            continue
        host = validation(cfg)
        ours = validation({**cfg, "rl": "aot", "aot_mode": MODES[cfg["rl"]]})
        understood &= ours == "validates" or ours == host or "`" in ours
        if ours != "validates" and ours == host:
            ours = f"refused by the host, with `rl: {cfg['rl']}` as well: {ours}"
        print(f"| {path.relative_to(checkout)} | {cfg['rl']} | {ours} |", flush=True)
    return understood


MODES = {"dpo": "paired", "ipo": "paired", "kto": "unpaired"}


def validation(cfg: dict[str, Any]) -> str:
    """What the host says of a config on a machine with an Ampere GPU."""
    import copy

    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    capabilities = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1}
    environment = {"torch_version": "2.9.0"}
    loaded = DictDefault(copy.deepcopy(cfg))
    try:
        prepare_plugins(loaded)
        validate_config(
            loaded,
            capabilities={**capabilities, "compute_capability": "sm_80"},
            env_capabilities=environment,
        )
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "validates"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tests", "examples"))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("paths", nargs="*", default=PATHS)
    args = parser.parse_args()
    if args.what == "examples":
        equal = compare_examples(args.checkout)
    else:
        equal = compare_tests(args.checkout.resolve(), list(args.paths))
    sys.exit(not equal)


if __name__ == "__main__":
    main()
