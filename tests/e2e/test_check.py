"""`python -m aot_plugin check` as a user runs it, and beside the training that it announces."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vision
from harness import (
    ENV,
    config,
    paired_rows,
    train,
    unpaired_rows,
    write_config,
    write_rows,
)

from aot_plugin.__main__ import main
from aot_plugin.check.loading import load_facts

pytestmark = pytest.mark.slow

CHAT = "chat_template.default"


def graded_rows(n: int) -> list[dict[str, Any]]:
    return [row | {"label": i % 5} for i, row in enumerate(unpaired_rows(n))]


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "paired": (paired_rows, {"aot_mode": "paired"}),
    "unpaired": (unpaired_rows, {"aot_mode": "unpaired"}),
    "graded": (graded_rows, {"aot_mode": "unpaired", "aot_grades": [2, 4]}),
}


def configured(kind: str, model: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    make, own = KINDS[kind]
    data = write_rows(folder / "rows.jsonl", make(32))
    cfg = config(model, data, folder / "out", **own, **keys)
    cfg["datasets"][0]["type"] = CHAT
    return cfg


def run(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aot_plugin", "check", str(path)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)


def test_the_command(tiny_model: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "cfg.yml", configured("paired", tiny_model, tmp_path))
    before = set(tmp_path.iterdir())
    done = run(path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "== Config"
    assert "2 (micro_batch_size) x 4 (gradient_accumulation_steps)" in done.stdout
    assert done.stdout.count("chosen, trained") == 3
    assert "\x1b" not in done.stdout and "%|" not in done.stdout
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rl": "dpo"}, "says `rl: dpo`, and this command checks trainings with `rl: aot`"),
        ({"rl": None}, "has no `rl`, and this command"),
        ({"rl": "aot_pair"}, "write `rl: aot` and `aot_mode: paired`"),
        ({"aot_penalti": "logistic"}, "`aot_penalti` is not an option of aot-plugin"),
        ({"sequence_len": "many"}, "`sequence_len`"),
        ({"datasets": [{"path": "none.jsonl", "type": CHAT}]}, "none.jsonl can't be read"),
        ({"base_model": "nobody/nothing"}, "nobody/nothing"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else None,
)
def test_errors_are_one_line(
    keys: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path, capsys: Any
) -> None:
    cfg = configured("paired", tiny_model, tmp_path) | keys
    cfg = {key: value for key, value in cfg.items() if value is not None}
    path = write_config(tmp_path / "cfg.yml", cfg)
    assert main(["check", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [
        line for line in err.splitlines() if line.startswith("python -m aot_plugin check: error")
    ]
    assert said in line and "\n" not in line.strip()


def test_rows_that_fail_are_shown_before_the_error(
    tiny_model: Path, tmp_path: Path, capsys: Any
) -> None:
    cfg = configured("unpaired", tiny_model, tmp_path)
    write_rows(tmp_path / "rows.jsonl", [row | {"label": True} for row in unpaired_rows(8)])
    assert main(["check", str(write_config(tmp_path / "cfg.yml", cfg))]) == 1
    out, err = capsys.readouterr()
    assert "positive, trained" in out
    # A progress bar that is collected late wipes its line, with blanks and without a line's end.
    assert [line.strip() for line in err.splitlines() if line.strip()][-1].startswith(
        "python -m aot_plugin check: error: `datasets`: all 8 rows are positive"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_does_what_is_announced(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    keys = {"eval_steps": 2, "max_steps": 2, "val_set_size": 8, "micro_batch_size": 3}
    cfg = configured(kind, tiny_model, tmp_path, gradient_accumulation_steps=4, **keys)
    facts = load_facts(write_config(tmp_path / "cfg.yml", cfg), 200)
    trained = train(cfg)

    def ours(names: Any, prefix: str = "") -> set[str]:
        rooms = tuple(prefix + room for room in ("aot/", "rewards/", "logps/"))
        return {name for name in names if name.startswith(rooms)}

    logged = {name for log in trained.history for name in log}
    levels = {"aot/levels"} if kind == "graded" else set()
    assert ours(facts.logged.train) == ours(logged)
    assert {f"eval_{name}" for name in ours(facts.logged.evaluation)} == ours(logged, "eval_")
    assert levels <= ours(facts.logged.train)
    others = set(facts.logged.train) - ours(facts.logged.train)
    assert others <= logged
    files = [path.name for path in (tmp_path / "out/aot").iterdir()]
    written = {re.sub(r"step\d+", "step…", name) for name in files}
    assert written == {name.removeprefix("aot/") for name in facts.logged.files[1:]}
    sorted_u, sorted_v = trained.logged("aot/sorted_u")[0], trained.logged("aot/sorted_v")[0]
    assert facts.step.rows == 12
    assert sorted_u + sorted_v == (24 if kind == "paired" else 12)


def test_rows_with_images(tmp_path: Path, capsys: Any) -> None:
    model = vision.save_model(tmp_path / "Llava", "Llava")
    data = write_rows(tmp_path / "rows.jsonl", vision.image_pairs(5, tmp_path / "images"))
    cfg = config(model, data, tmp_path / "out", processor_type="LlavaProcessor")
    cfg["datasets"][0]["type"] = CHAT
    assert main(["check", str(write_config(tmp_path / "cfg.yml", cfg))]) == 0
    out, _ = capsys.readouterr()
    assert "rows with images" in out and "    | user: " in out
    assert "no row of the training set has known lengths" in out
