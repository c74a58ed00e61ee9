"""Adapter keys that can't work, or would do nothing, are refused before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from aot_plugin.config import desugar
from aot_plugin.host.adapter_keys import adapter_updates, start_adapter

LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj"]}
SAVED = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["v_proj", "q_proj"],
    "bias": "none",
    "init_lora_weights": True,
    "use_dora": False,
    "modules_to_save": None,
}


def saved_adapter(path: Path, **keys: Any) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(SAVED | keys))
    (path / "adapter_model.safetensors").write_bytes(b"")
    return path


def test_it_is_called_for_every_config_of_ours(tmp_path: Path) -> None:
    cfg = {"adapter": "lora", "lora_model_dir": str(tmp_path / "gone"), "datasets": []}
    with pytest.raises(ValueError, match="is not an adapter"):
        desugar({"rl": "aot", **cfg})
    assert desugar({"rl": "dpo", **cfg}) == {}


@pytest.mark.parametrize(
    "key, value, advice",
    [
        ("relora", True, "supervised"),
        ("unfrozen_parameters", ["lm_head"], "lora_modules_to_save"),
        ("peft_init_lora_weights", "pissa", "the reference"),
        ("peft_init_lora_weights", "pissa_niter_16", "the reference"),
        ("peft_init_lora_weights", "olora", "the reference"),
        ("peft_init_lora_weights", False, "the reference"),
        ("peft", {"loftq_config": {"loftq_bits": 4}}, "loftq"),
        ("peft_autocast_adapter_dtype", False, "float32"),
    ],
)
def test_what_a_new_adapter_does_not_have(key: str, value: Any, advice: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)`{key}.*{advice}"):
        adapter_updates(LORA | {key: value})


@pytest.mark.parametrize("init", [None, True, "gaussian", "orthogonal"])
def test_what_a_new_adapter_has(init: Any) -> None:
    keys = {"lora_modules_to_save": ["lm_head"], "peft_use_dora": True, "peft": {}}
    assert adapter_updates(LORA | keys | {"peft_init_lora_weights": init}) == {}
    assert adapter_updates({"unfrozen_parameters": ["lm_head"]}) == {}  # no adapter


@pytest.mark.parametrize("adapter", [None, "llama-adapter"])
def test_a_start_needs_an_adapter(adapter: str | None, tmp_path: Path) -> None:
    start = saved_adapter(tmp_path / "sft")
    with pytest.raises(ValueError, match="needs `adapter: lora`"):
        adapter_updates({"adapter": adapter, "lora_model_dir": str(start)})


def test_a_start_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refusal(start: Any) -> str:
        with pytest.raises(ValueError, match="lora_model_dir") as error:
            adapter_updates({"adapter": "lora", "lora_model_dir": str(start)})
        return str(error.value)

    assert "is not an adapter: not a folder" in refusal(tmp_path / "gone")
    assert "nor an adapter on the hub" in refusal("gone/too")
    (tmp_path / "empty").mkdir()
    assert "without adapter_config.json" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "write it as `base_model`" in refusal(tmp_path / "empty")
    start = saved_adapter(tmp_path / "sft")
    (start / "adapter_model.safetensors").unlink()
    assert "holds no weights" in refusal(start)


@pytest.mark.parametrize(
    "saved",
    [
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"loftq_config": {"loftq_bits": 4}},
        {"layer_replication": [[0, 1]]},
    ],
)
def test_a_start_that_changes_the_base(saved: dict[str, Any], tmp_path: Path) -> None:
    start = saved_adapter(tmp_path / "sft", **saved)
    with pytest.raises(ValueError, match="merge-lora"):
        adapter_updates({"adapter": "lora", "lora_model_dir": str(start)})


def test_a_start_of_another_kind(tmp_path: Path) -> None:
    start = saved_adapter(tmp_path / "sft", peft_type="IA3")
    with pytest.raises(ValueError, match="IA3, not LoRA"):
        adapter_updates({"adapter": "lora", "lora_model_dir": str(start)})


@pytest.mark.parametrize(
    "key, value",
    [
        ("lora_r", 16),
        ("lora_alpha", 8),
        ("lora_target_modules", ["q_proj"]),
        ("peft_use_dora", True),
        ("lora_modules_to_save", ["lm_head"]),
        ("peft_layers_to_transform", [0]),
    ],
)
def test_a_key_that_contradicts_the_start(key: str, value: Any, tmp_path: Path) -> None:
    start = saved_adapter(tmp_path / "sft")
    cfg = {"adapter": "lora", "lora_model_dir": str(start), "lora_r": 8, key: value}
    with pytest.raises(ValueError, match=f"`{key}: .*Remove these keys"):
        adapter_updates(cfg)


def test_keys_that_agree_with_the_start(tmp_path: Path) -> None:
    start = saved_adapter(tmp_path / "sft")
    cfg = {"adapter": "qlora", "lora_model_dir": str(start)}
    agreeing = {"lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj"]}
    agreeing |= {"peft_use_dora": False, "lora_modules_to_save": [], "lora_dropout": 0.1}
    linear = {"lora_target_linear": True, "lora_target_modules": ["q_proj"]}
    for keys in ({}, agreeing, linear):
        assert adapter_updates(cfg | keys) == {}


def test_merging_is_of_what_was_trained(tmp_path: Path) -> None:
    """In the YAML, `lora_model_dir` is where training starts; only a flag says what to merge."""
    path = tmp_path / "cfg.yml"
    cfg = {"output_dir": "out", "lora_model_dir": "sft"}
    path.write_text(yaml.safe_dump(cfg))
    cfg |= {"merge_lora": True, "axolotl_config_path": str(path)}
    assert adapter_updates(cfg) == {"lora_model_dir": None}
    assert adapter_updates(cfg | {"lora_model_dir": "out/checkpoint-4"}) == {}
    assert adapter_updates(cfg | {"lora_model_dir": None}) == {}


def test_the_start_is_written_down_as_a_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_adapter(tmp_path / "sft")
    monkeypatch.chdir(tmp_path)
    assert start_adapter({"lora_model_dir": "./sft"}) == str((tmp_path / "sft").resolve())
    assert start_adapter({"lora_model_dir": "somebody/sft"}) == "somebody/sft"
    assert start_adapter({}) == ""
