"""What the host does to a batch before we read it."""

from types import SimpleNamespace

import torch
from transformers import Trainer

from aot_plugin.trainer import AOTPairedTrainer


def test_deepspeed_rounds_no_cached_scores() -> None:
    """Under DeepSpeed the host casts the floats of a batch to the dtype of the network."""
    exact = torch.tensor([-90.123])
    batch = {"input_ids": torch.tensor([[1, 2]]), "ref_chosen_logps": exact}
    trainer = object.__new__(AOTPairedTrainer)
    trainer.args = SimpleNamespace(device=torch.device("cpu"))
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    assert Trainer._prepare_inputs(trainer, batch)["ref_chosen_logps"].item() == -90.0
    found = trainer._prepare_inputs(batch)
    assert found.keys() == batch.keys()
    assert all(torch.equal(found[name], values) for name, values in batch.items())
