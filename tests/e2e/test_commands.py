"""The host's own commands, from preprocessing to inference, on a tiny model."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cuts import assert_same
from harness import (
    ENV,
    Run,
    axolotl,
    config,
    paired_rows,
    train,
    unpaired_rows,
    write_config,
    write_rows,
)
from host_process import forked_axolotl

from aot_plugin.host import callbacks, evaluation, steps

pytestmark = pytest.mark.slow

LORA = {
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "learning_rate": 0.01,
}


def chat_rows(n: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [{"role": "user", "content": row["prompt"]}],
            "completion": row["completion"],
            "label": "good" if row["label"] else "bad",
        }
        for row in unpaired_rows(n)
    ]


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_the_life_of_an_adapter(mode: str, tiny_model: Path, tmp_path: Path) -> None:
    """Each command in a process of its own; those that train are the installed script itself."""
    rows = paired_rows(48) if mode == "paired" else chat_rows(48)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    held_out = write_rows(tmp_path / "held_out.jsonl", rows[:9])
    out = tmp_path / "out"
    cfg = config(
        tiny_model,
        data,
        out,
        aot_mode=mode,
        max_steps=3,
        evals_per_epoch=2,
        eval_batch_size=2,
        gradient_checkpointing=True,
        optimizer="paged_adamw_32bit",
        **LORA,
    )
    entry = {**cfg["datasets"][0], "type": "chat_template.default"}
    cfg["datasets"] = [entry]
    cfg["test_datasets"] = [{**entry, "path": str(held_out)}]
    path = write_config(tmp_path / "cfg.yml", cfg)

    forked_axolotl("preprocess", path)
    # By accelerate, the default launcher, or in the script's own process.
    launcher = [] if mode == "paired" else ["--launcher", "python"]
    log = axolotl("train", path, *launcher)
    assert ("rows of the unpaired datasets" in log) == (mode == "unpaired")

    run = Run.last(out)
    assert len(run.logged("loss")) == 3
    assert run.logged("aot/recoupled_fraction" if mode == "paired" else "aot/sorted_v")
    assert run.logged("eval_loss")
    assert (out / "adapter_model.safetensors").exists()
    assert {path.suffix for path in (out / "aot").iterdir()} == {".json", ".parquet", ".png"}
    card = (out / "README.md").read_text()
    assert "AOT" in card and "2406.05882" in card
    assert "Direct Preference" not in card and "KTO" not in card

    in_process = ["--launcher", "python", "--lora-model-dir", out]
    evaluated = forked_axolotl("evaluate", path, *in_process)
    assert "eval_loss" in evaluated or "eval_aot/w1" in evaluated

    forked_axolotl("merge-lora", path)
    assert (out / "merged" / "model.safetensors").exists()

    # The host's LoRA kernels, which it switches on by itself, need a GPU.
    no_kernels = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}
    path = write_config(tmp_path / "inference.yml", cfg | no_kernels)
    answer = forked_axolotl("inference", path, *in_process, stdin="apple river\n")
    assert answer.count("Give me an instruction") == 2  # again after the answer


def test_resuming_continues_the_unbroken_run(tiny_model: Path, tmp_path: Path) -> None:
    for mode in ("paired", "unpaired"):
        rows = paired_rows(20) if mode == "paired" else unpaired_rows(20)
        data = write_rows(tmp_path / f"{mode}.jsonl", rows)
        # 20 rows, 8 per step: the run is broken inside the second epoch.
        keys = {"aot_mode": mode, "max_steps": 8, "save_steps": 4, "num_epochs": 10}
        whole = train(config(tiny_model, data, tmp_path / f"{mode}-whole", **keys))
        resumed = train(
            config(
                tiny_model,
                data,
                tmp_path / f"{mode}-resumed",
                **keys,
                resume_from_checkpoint=str(tmp_path / f"{mode}-whole" / "checkpoint-4"),
            )
        )
        assert_same(resumed, whole, tolerance=1e-6)


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_ways_to_the_same_run(mode: str, tiny_model: Path, tmp_path: Path) -> None:
    """Cached reference log-probabilities and gradient checkpointing change nothing."""
    rows = paired_rows(32) if mode == "paired" else unpaired_rows(32)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    plain = train(config(tiny_model, data, tmp_path / "plain", aot_mode=mode, **LORA))
    variants: dict[str, dict[str, Any]] = {
        "precomputed": {"precompute_ref_log_probs": True},
        "checkpointed": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
        "reentrant": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    }
    for name, keys in variants.items():
        run = train(config(tiny_model, data, tmp_path / name, aot_mode=mode, **LORA, **keys))
        assert_same(run, plain)


def test_qlora(tiny_model: Path, tmp_path: Path) -> None:
    """4-bit base weights and bf16 adapters: the cuts agree within bf16's rounding."""
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(32))
    keys = {
        **LORA,
        "adapter": "qlora",
        "load_in_4bit": True,
        "optimizer": "paged_adamw_32bit",
        "learning_rate": 0.001,
    }
    one = train(config(tiny_model, data, tmp_path / "one", **keys))
    cut = train(
        config(
            tiny_model,
            data,
            tmp_path / "cut",
            **keys,
            micro_batch_size=8,
            gradient_accumulation_steps=1,
        )
    )
    for a, b in zip(one.logged("loss"), cut.logged("loss"), strict=True):
        assert abs(a - b) < 0.02 * b


def test_evaluation_does_not_depend_on_its_batches(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(40))
    found = []
    for size in (1, 3, 16):
        run = train(
            config(
                tiny_model,
                data,
                tmp_path / f"eval{size}",
                max_steps=3,
                val_set_size=0.325,
                eval_steps=3,
                eval_batch_size=size,
            )
        )
        found.append({k: v for entry in run.history for k, v in entry.items() if "eval_" in k})
    for other in found[1:]:
        for key, value in found[0].items():
            if not key.endswith(("runtime", "per_second")):
                assert other[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_rows_that_are_never_evaluated(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host holds them back, and evaluates only if it is told when."""
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(24))
    keys = {"max_steps": 1, "val_set_size": 8}
    said: list[str] = []
    monkeypatch.setattr(callbacks.LOG, "warning", lambda text, *args: said.append(text % args))
    for name, more in {"once": {"eval_steps": 1}, "never": {}}.items():
        run = train(config(tiny_model, data, tmp_path / name, **keys, **more))
        warned = any(
            "are not evaluated in this run; set `evals_per_epoch`" in text for text in said
        )
        assert warned == (name == "never") == (run.logged("eval_loss") == [])


def test_one_label_only_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": True} for row in unpaired_rows(16)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match="all 16 rows are positive"):
        train(config(tiny_model, data, tmp_path / "out", aot_mode="unpaired"))


def test_steps_with_one_label_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    rows = unpaired_rows(64, positive_every=16)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run = train(config(tiny_model, data, tmp_path / "out", aot_mode="unpaired", max_steps=8))
    one_sided = [positives == 0 for positives in run.logged("aot/sorted_u")]
    assert 0 < sum(one_sided) < len(one_sided)
    assert run.logged("aot/one_sided_steps")[-1] == sum(one_sided)
    for loss, skipped in zip(run.logged("loss"), one_sided, strict=True):
        assert (loss == 0) == skipped


def test_micro_batches_that_are_sorted_alone_hold_both_labels(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them that holds one label trains nothing. Drawn by step, every second one would."""
    said: list[str] = []
    monkeypatch.setattr(steps.LOG, "warning", lambda text, *args: said.append(text % args))
    keys = {"aot_mode": "unpaired", "aot_batch": "micro_batch", "max_steps": 4}
    sizes = {"micro_batch_size": 2, "gradient_accumulation_steps": 8}
    for every, expected in ((2, 0), (4, 16)):
        data = write_rows(tmp_path / f"{every}.jsonl", unpaired_rows(64, positive_every=every))
        run = train(config(tiny_model, data, tmp_path / f"{every}", **keys, **sizes))
        assert run.logged("aot/one_sided_steps")[-1] == expected
        texts = [text for text in said if "a micro-batch of step 1 holds no positive" in text]
        assert bool(texts) == bool(expected)


def test_each_step_holds_both_labels_in_proportion(tiny_model: Path, tmp_path: Path) -> None:
    rows = sorted(unpaired_rows(48, positive_every=4), key=lambda row: row["label"])
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run = train(config(tiny_model, data, tmp_path / "out", aot_mode="unpaired", max_steps=6))
    assert run.logged("aot/sorted_u") == [2] * 6
    assert run.logged("aot/sorted_v") == [6] * 6


def test_the_report_command_reads_a_run(tiny_model: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    data = write_rows(tmp_path / "rows.jsonl", paired_rows(40))
    out = tmp_path / "out"
    train(config(tiny_model, data, out, max_steps=3, val_set_size=0.325, eval_steps=3))
    report = tmp_path / "report.html"
    subprocess.run(
        [sys.executable, "-m", "aot_plugin", "report", str(out), "--output", str(report)],
        check=True,
        timeout=300,
        env=ENV,
    )
    assert "<svg" in report.read_text() or "data:image/png" in report.read_text()
    summary = json.loads((out / "aot" / "dominance-eval-step3.json").read_text())
    assert summary["n_chosen"] == 13


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_one_begin_of_sequence_token(
    mode: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Llama-3-like tokenizer adds the token that the host's strategies have rendered already."""
    import shutil

    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from aot_plugin.step.record import watched_steps

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = "<|begin_of_text|>"
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    assert AutoTokenizer.from_pretrained(model)("x")["input_ids"][0] == bos_id

    rows = paired_rows(16)
    if mode == "unpaired":
        rows = [
            {"instruction": bos + row["prompt"], **row, "prompt": bos + row["prompt"]}
            for row in unpaired_rows(16)
        ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    cfg = config(model, data, tmp_path / "out", aot_mode=mode, max_steps=1)
    if mode == "unpaired":
        cfg["datasets"][0]["type"] = {"field_prompt": "prompt", "field_completion": "completion"}
    with watched_steps() as steps:
        train(cfg)
    seen = [ids for step in steps for ids in step.sequences]
    assert seen
    for ids in seen:
        assert ids[:2].count(bos_id) == 1, ids[:5]


def test_an_evaluation_reads_its_rows_as_a_training_does(tiny_model: Path, tmp_path: Path) -> None:
    """Also by the command, after a file was edited, and of which only a part is read."""
    from axolotl.cli.evaluate import do_cli

    data = write_rows(tmp_path / "rows.jsonl", paired_rows(8))
    held_out = write_rows(tmp_path / "held_out.jsonl", paired_rows(4, seed=1))
    cfg = config(tiny_model, data, tmp_path / "out", max_steps=1, **LORA)
    cfg["test_datasets"] = [{**cfg["datasets"][0], "path": str(held_out), "weight": 0.5}]
    path = write_config(tmp_path / "cfg.yml", cfg)
    for pairs in (12, 20):
        write_rows(held_out, paired_rows(pairs, seed=2))
        with (
            mock.patch.object(sys, "argv", ["evaluate"]),
            mock.patch.object(evaluation.LOG, "warning") as warned,
        ):
            do_cli(config=str(path))
        # No adapter is named, so the base model is compared with itself.
        assert "gave the same log-probabilities" in warned.call_args.args[0]
        (written,) = (tmp_path / "out" / "aot").glob("dominance-evaluate-*.json")
        assert json.loads(written.read_text())["n_chosen"] == pairs // 2
