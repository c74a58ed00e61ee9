"""What people get who have only a distribution: its files, its commands, a training."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import Run
from host_process import Fork, forked_axolotl

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|aot_plugin\.egg-info/.*")


def run(*command: str | Path, cwd: Path, path: Path | str = "") -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), "PIP_NO_INDEX": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def links(markdown: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", markdown)


class Distributions(NamedTuple):
    """Names of files: of the clone, of the source distribution made from it, of the wheel made from
    that one. And a folder in which the wheel is installed, and nothing else."""

    clone: set[str]
    source: set[str]
    wheel: list[str]
    installed: Path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    tmp = tmp_path_factory.mktemp("distributions")
    # A build writes into the tree, and reads what an earlier one has left there.
    clone = tmp / "clone"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True)
    tracked = set(listed.stdout.decode().splitlines())
    for name in tracked:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run("-c", build, tmp, cwd=clone)
    with tarfile.open(*tmp.glob("*.tar.gz")) as archive:
        archive.extractall(tmp / "unpacked", filter="data")
    (source,) = (tmp / "unpacked").iterdir()
    unpacked = {name for name in files(source) if not GENERATED.fullmatch(name)}
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp, source, cwd=tmp)
    (wheel,) = tmp.glob("*.whl")
    installed = tmp / "installed"
    run("-m", "pip", "install", "--no-deps", "--target", installed, wheel, cwd=tmp)
    return Distributions(tracked, unpacked, zipfile.ZipFile(wheel).namelist(), installed)


def test_the_source_distribution_holds_the_clone(distributions: Distributions) -> None:
    assert distributions.source == distributions.clone


def test_the_wheel_holds_package_and_examples(distributions: Distributions) -> None:
    package = {name for name in distributions.clone if name.startswith("aot_plugin/")}
    examples = {name for name in distributions.clone if name.startswith("example_configs/")}
    assert "example_configs/deepspeed/zero2.json" in examples
    held = {name for name in distributions.wheel if ".dist-info/" not in name}
    assert held == package | {f"aot_plugin/{name}" for name in examples}
    (licence,) = [name for name in distributions.wheel if "LICENSE" in name]
    assert licence.endswith(".dist-info/licenses/LICENSE")


def test_the_long_description_has_no_dead_links(distributions: Distributions) -> None:
    """A package index shows the README. The repository has no public address that could be put in
    front of its links, so they name files of the source distribution."""
    (metadata,) = distributions.installed.glob("*.dist-info/METADATA")
    description = metadata.read_text().partition("\n\n")[2]
    assert description.strip() == (ROOT / "README.md").read_text().strip()
    relative = {link for link in links(description) if "://" not in link}
    assert "docs/choosing.md" in relative
    assert {link.partition("#")[0] for link in relative} <= distributions.source
    # `configs` writes no docs.
    assert links((ROOT / "example_configs" / "README.md").read_text()) == []


def test_a_training_with_the_wheel_alone(
    distributions: Distributions, tiny_model: Path, tmp_path: Path
) -> None:
    """Configs, training and report, each by its own command from a folder that was empty."""
    work = tmp_path / "work"
    work.mkdir()
    installed = distributions.installed
    where = "import aot_plugin; print(aot_plugin.__file__)"
    expected = str(installed / "aot_plugin" / "__init__.py")
    assert run("-c", where, cwd=work, path=installed).strip() == expected
    host = {"env": {"PYTHONPATH": str(installed)}, "cwd": work}
    log = tmp_path / "where.log"
    assert Fork("builtins:exec", where, log=log, **host).wait() == 0
    assert log.read_text().strip().endswith(expected)

    first = run("-m", "aot_plugin", "configs", "my/aot", cwd=work, path=installed)
    again = forked_axolotl("aot-configs", "my/aot", **host)
    assert again.endswith(first)
    assert (work / "my/aot/deepspeed/zero3.json").is_file()

    # The tiny model stands where prepare_model.py would write the quickstart's.
    (work / "outputs").mkdir()
    (work / "outputs/smollm2-135m-instruct").symlink_to(tiny_model)
    command = re.search("axolotl (train .*)", first)
    assert command
    forked_axolotl(*command[1].split(), **host)
    out = work / "outputs" / "quickstart"
    assert len(Run.last(out).logged("loss")) == 4

    page = run("-m", "aot_plugin", "report", "outputs/quickstart", cwd=work, path=installed)
    assert page.strip() == "report.html"
    forked_axolotl("aot-report", "outputs/quickstart", "--output", "host.html", **host)
    assert (work / "host.html").read_bytes() == (work / "report.html").read_bytes()


def test_the_hosts_help(distributions: Distributions, tmp_path: Path) -> None:
    host = {"env": {"PYTHONPATH": str(distributions.installed)}, "cwd": tmp_path}
    shown = forked_axolotl("--help", **host)
    assert re.search("aot-check +Show what", shown)
    assert re.search("aot-configs +Write AOT", shown) and re.search("aot-report +Compare", shown)
    assert "usage: axolotl aot-report [-h]" in forked_axolotl("aot-report", "--help", **host)
