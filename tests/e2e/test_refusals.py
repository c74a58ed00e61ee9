"""What can't be exact is refused, with what to write instead."""

from pathlib import Path

import pytest
from harness import config, paired_rows, random_model, train, write_rows

pytestmark = pytest.mark.slow


def test_a_mixture_of_experts_trains_without_its_auxiliary_loss_only(
    tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = random_model(
        tokenizer, "Mixtral", scale=1.0, num_local_experts=4, router_aux_loss_coef=0.001
    )
    path = tmp_path / "mixtral"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(16))
    cfg = config(path, data, tmp_path / "out", max_steps=1)
    with pytest.raises(ValueError, match="overrides_of_model_config"):
        train(cfg)
    cfg["overrides_of_model_config"] = {"router_aux_loss_coef": 0.0}
    assert len(train(cfg).logged("loss")) == 1


def test_dropout_that_is_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's YAML can't leave dropout on; a caller of the trainer can."""
    from trl.trainer import dpo_trainer

    monkeypatch.setattr(dpo_trainer, "disable_dropout_in_model", lambda model: None)
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(16))
    keys = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
    keys |= {"lora_dropout": 0.1, "max_steps": 1}
    with pytest.raises(ValueError, match=r"the network is random.*the dropout '.*lora_dropout"):
        train(config(tiny_model, data, tmp_path / "out", **keys))
