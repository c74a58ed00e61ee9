"""`aot_samples`: the policy answers held-out prompts, and the training is the same to the bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Run, config, paired_rows, train, unpaired_rows, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from aot_plugin.__main__ import main

pytestmark = pytest.mark.slow

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
SAMPLES = 3


def run(tmp_path: Path, model: Path, name: str, mode: str = "paired", **keys: Any) -> Run:
    """Two epochs of steps and three evaluations of rows that share prompts."""
    rows = paired_rows(24) if mode == "paired" else unpaired_rows(24)
    data = write_rows(tmp_path / f"{mode}.jsonl", rows[:16])
    held_out = write_rows(tmp_path / f"{mode}-eval.jsonl", [row for row in rows[16:] for _ in "ab"])
    keys = {"max_steps": 4, "num_epochs": 2, "eval_steps": 2, "eval_batch_size": 2, **keys}
    cfg = config(model, data, tmp_path / name, aot_mode=mode, **keys)
    cfg["test_datasets"] = [{**cfg["datasets"][0], "path": str(held_out)}]
    return train(cfg)


def samples(run: Run) -> dict[int, list[dict[str, Any]]]:
    files = run.checkpoint.parent.glob("aot/samples-*.jsonl")
    found = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return {rows[0]["step"]: rows for rows in found}


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """Token by token, the most probable one, without a cache and without padding."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    while ids.shape[1] < start + 64:
        with torch.no_grad():
            best = model(input_ids=ids).logits[:, -1:].argmax(dim=-1)
        if best.item() == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best], dim=1)
    return tokenizer.decode(ids[0, start:])


@pytest.mark.parametrize("kind", ["full", "lora", "unpaired"])
def test_answers_are_the_policys_and_training_does_not_notice(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    keys = {"full": {}, "lora": {**LORA, "gradient_checkpointing": True}, "unpaired": LORA}[kind]
    mode = "unpaired" if kind == "unpaired" else "paired"
    keys = {"learning_rate": 0.01, **keys}
    without = run(tmp_path, tiny_model, "without", mode, **keys)
    sampled = run(tmp_path, tiny_model, "with", mode, aot_samples=SAMPLES, **keys)
    assert sampled.logged("loss") == without.logged("loss")
    assert sampled.logged("eval_loss") == without.logged("eval_loss")
    for name, parameter in without.parameters.items():
        assert torch.equal(sampled.parameters[name], parameter), name

    assert samples(without) == {}
    found = samples(sampled)
    assert sorted(found) == [0, 2, 4]
    assert all(
        len({row["prompt"] for row in rows}) == len(rows) == SAMPLES for rows in found.values()
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    answers = [[answer(model, tokenizer, row["prompt"]) for row in found[0]]]
    if "adapter" in keys:
        model.load_adapter(str(sampled.checkpoint))
    else:
        model.load_state_dict(load_file(sampled.checkpoint / "model.safetensors"), strict=False)
        model.tie_weights()
    answers.append([answer(model, tokenizer, row["prompt"]) for row in found[4]])
    assert [[row["answer"] for row in found[step]] for step in (0, 4)] == answers
    assert answers[0] != answers[1]

    report = tmp_path / "report.html"
    main(["report", str(sampled.checkpoint.parent), "--output", str(report)])
    assert (
        "answer after step 0" in report.read_text() and "answer after step 4" in report.read_text()
    )


@pytest.mark.parametrize("keys", [{}, LORA], ids=["full", "lora"])
def test_answers_are_greedy_whatever_the_model_comes_with(
    keys: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    own = tmp_path / "model"
    shutil.copytree(tiny_model, own)
    GenerationConfig(num_beams=2, repetition_penalty=5.0).save_pretrained(own)
    found = run(tmp_path, own, "out", aot_samples=SAMPLES, max_steps=1, eval_steps=1, **keys)
    tokenizer = AutoTokenizer.from_pretrained(own)
    model = AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32)
    for row in samples(found)[0]:
        assert row["answer"] == answer(model, tokenizer, row["prompt"])
    if not keys:  # it is saved as it came
        saved = GenerationConfig.from_pretrained(found.checkpoint)
        assert (saved.num_beams, saved.repetition_penalty) == (2, 5.0)


def test_what_fails_is_said_once_and_training_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from transformers import GenerationMixin

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room for a cache")

    monkeypatch.setattr(GenerationMixin, "generate", fail)
    found = run(tmp_path, tiny_model, "out", aot_samples=SAMPLES)
    assert len(found.logged("loss")) == 4 and samples(found) == {}
    said = [record for record in caplog.records if "no answers for `aot_samples`" in record.message]
    assert len(said) == 1 and "no room for a cache" in said[0].getMessage()
