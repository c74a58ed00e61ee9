"""Configs with the key sets of the host's own preference examples, with `rl` changed to `aot`.

The examples themselves are not part of the installed host; ``host_suite.py examples`` runs on a
checkout of its repository.
"""

from pathlib import Path
from typing import Any

import pytest
from axolotl.cli.config import load_cfg
from harness import write_config

COMMON: dict[str, Any] = {
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_epochs": 1,
    "learning_rate": 2e-4,
    "lr_scheduler": "cosine",
    "sequence_len": 512,
    "pad_to_sequence_len": True,
    "bf16": "auto",
    "tf32": False,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "warmup_ratio": 0.1,
    "saves_per_epoch": 1,
    "weight_decay": 0.0,
}
LORA = {"adapter": "lora", "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True}
QLORA = {**LORA, "adapter": "qlora", "load_in_4bit": True, "optimizer": "paged_adamw_32bit"}

DPO_ENTRY = {
    "path": "someone/pairs",
    "type": "chat_template.default",
    "field_messages": "conversation",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "message_property_mappings": {"role": "role", "content": "content"},
    "roles": {"system": ["system"], "user": ["user"], "assistant": ["assistant"]},
}
KTO_ENTRY = {"path": "someone/labels", "type": "llama3.ultra", "split": "train"}

EXAMPLES: dict[str, dict[str, Any]] = {
    "lora": {
        **LORA,
        "load_in_8bit": True,
        "chat_template": "llama3",
        "datasets": [DPO_ENTRY],
        "optimizer": "adamw_8bit",
        "evals_per_epoch": 4,
        "dataset_prepared_path": None,
        "val_set_size": 0.05,
    },
    "duplicates": {
        **LORA,
        "chat_template": "llama3",
        "datasets": [DPO_ENTRY, DPO_ENTRY],
        "dataset_exact_deduplication": True,
    },
    "qlora": {
        **QLORA,
        "chat_template": "chatml",
        "datasets": [{"path": "someone/pairs", "split": "train", "type": "chatml.intel"}],
        "special_tokens": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    },
    "full": {"datasets": [DPO_ENTRY], "optimizer": "adamw_torch_fused", "chat_template": "qwen_25"},
}


@pytest.fixture
def validated(tiny_model: Path, tmp_path: Path) -> Any:
    def run(**keys: Any) -> Any:
        cfg = {"base_model": str(tiny_model), "output_dir": str(tmp_path / "out"), **COMMON, **keys}
        return load_cfg(str(write_config(tmp_path / "config.yml", cfg)))

    return run


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_dpo_example_validates_as_paired(name: str, validated: Any) -> None:
    cfg = validated(rl="aot", aot_mode="paired", **EXAMPLES[name])
    assert cfg.trainer_cls == "aot_plugin.trainer.AOTPairedTrainer"
    kind = cfg.datasets[0]["type"]
    resolved = (cfg.aot_datasets or {}).get(kind.removeprefix("aot_plugin.paired_"))
    assert (resolved["strategy"] if resolved else kind) == EXAMPLES[name]["datasets"][0]["type"]


def test_a_kto_example_says_all_that_is_to_change(validated: Any) -> None:
    weights = {"kto_desirable_weight": 0.2, "kto_undesirable_weight": 1.0}
    keys = {**QLORA, "datasets": [KTO_ENTRY], "remove_unused_columns": False, "rl_beta": 0.5}
    with pytest.raises(ValueError, match=r"`kto_desirable_weight`.*`kto_undesirable_weight`"):
        validated(rl="aot", aot_mode="unpaired", **keys, **weights)
    assert validated(rl="aot", aot_mode="unpaired", **keys).rl_beta == 0.5
