"""The package of docs/extending.md, installed as anyone's, trains by the host's own command."""

import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from math import exp
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import ENV, Run, config, paired_rows, sentence, write_config, write_rows
from host_process import forked_axolotl
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.slow

DOC = Path(__file__).parents[2] / "docs" / "extending.md"
BETA, ROWS = 0.1, 4


def files_in_doc() -> dict[str, str]:
    """The code blocks whose first line names a file; blocks of one file are joined."""
    files: dict[str, str] = defaultdict(str)
    for name, code in re.findall(r"```\w+\n# (\S+)\n(.*?)```", DOC.read_text(), re.DOTALL):
        files[name] += code
    return files


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The doc's package, built and installed into a folder of its own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    files = files_in_doc()
    for name in ("pyproject.toml", "my_aot.py"):
        (source / name).write_text(files[name])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    options = ["--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, *options, str(source)], check=True, timeout=120)
    return target


@pytest.fixture
def model(
    tiny_llama: LlamaForCausalLM, word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    path = tmp_path / "model"
    tiny_llama.save_pretrained(path)
    word_tokenizer.save_pretrained(path)
    return path


def train(package: Path, model: Path, data: Path, written: dict[str, Any]) -> Run:
    """Three steps of four rows, with the doc's YAML on top of a tiny config."""
    cfg = config(
        model,
        data,
        model.parent / "out",
        **{"max_steps": 3, "gradient_accumulation_steps": ROWS // 2, "rl_beta": BETA, **written},
    )
    path = write_config(model.parent / "train.yml", cfg)
    installed = {"PYTHONPATH": str(package)}
    forked_axolotl("train", path, "--launcher", "python", env=installed)
    run = Run.last(model.parent / "out")
    assert len(run.logged("loss")) == 3
    assert run.logged("aot/w1")[-1] > 0.1  # it trained: the policy has left the reference
    return run


def expected_transport(run: Run) -> list[float]:
    """OT_h for h = exp(-beta z). With 4 rows the logged gaps at levels 0.25, 0.5, 0.75 and 0.95 are
    the gaps of all four sorted rows."""
    gaps = [run.logged(f"aot/gap_q{level}") for level in (25, 50, 75, 95)]
    return [sum(exp(-BETA * gap) for gap in step) / ROWS for step in zip(*gaps, strict=True)]


def test_the_command_in_the_doc_lists_the_penalty(package: Path):
    command = re.search(r'python -c "(.*registered.*)"', DOC.read_text()).group(1)
    for path, there in ((str(package), True), ("", False)):
        output = subprocess.run(
            [sys.executable, "-c", command],
            env={**ENV, "PYTHONPATH": path},
            cwd=os.sep,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        assert ("exponential" in output.split()) == there


def test_penalty(package: Path, model: Path, tmp_path: Path):
    data = write_rows(tmp_path / "paired.jsonl", paired_rows(16))
    run = train(package, model, data, yaml.safe_load(files_in_doc()["penalty.yml"]))
    assert run.logged("loss")[0] == pytest.approx(1.0, abs=1e-6)  # u = v, and h(0) = 1
    assert run.logged("loss") == pytest.approx(expected_transport(run), rel=1e-5)


def test_loss(package: Path, model: Path, tmp_path: Path):
    data = write_rows(tmp_path / "paired.jsonl", paired_rows(16))
    run = train(package, model, data, yaml.safe_load(files_in_doc()["loss.yml"]))
    expected = [
        value - 0.01 * chosen
        for value, chosen in zip(expected_transport(run), run.logged("logps/chosen"), strict=True)
    ]
    assert run.logged("loss")[0] > 1.05  # the anchor's share
    assert run.logged("loss") == pytest.approx(expected, rel=1e-5)


def test_prompt_strategy(package: Path, model: Path, tmp_path: Path):
    rng = random.Random(0)
    rows = [
        {"question": sentence(rng, 5), "answer": sentence(rng, 6), "up": up, "down": 3}
        for up in (5, 0, 4, 2) * 5  # good, bad, and two that the lead of 2 leaves out
    ]
    data = write_rows(tmp_path / "answers.jsonl", rows)
    written = yaml.safe_load(files_in_doc()["votes.yml"])
    written["datasets"][0]["path"] = str(data)
    run = train(package, model, data, written)
    assert run.logged("aot/sorted_u") == run.logged("aot/sorted_v") == [2.0, 2.0, 1.0]
