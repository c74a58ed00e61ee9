"""Configs whose sizes differ from layer to layer."""

from types import SimpleNamespace

from transformers import LlamaConfig

from aot_plugin.scoring.cost import Cost


class PerLayer(SimpleNamespace):
    @property
    def head_dim(self) -> int:
        raise ValueError("ambiguous")


def test_sizes_that_differ_from_layer_to_layer() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = Cost.of(LlamaConfig(**sizes, intermediate_size=256), 4, checkpointing=False)
    lists = PerLayer(**sizes, num_key_value_heads=4, intermediate_size=[128, 256])
    assert Cost.of(lists, 4, checkpointing=False) == plain
