"""The key of cached reference log-probabilities: what changes it, and what does not."""

import copy
import hashlib
import types

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model

from aot_plugin import digests
from aot_plugin.host import provenance
from aot_plugin.host.reference_cache import Identity, identify, reference_file, reference_key

SETTINGS = {"max_length": 64, "bf16": False}
ROWS = {
    "prompt": ["a", "b", "c"],
    "prompt_ids": [[1, 2], [3], [4, 5]],
    "chosen_ids": [[6], [7, 8], [9]],
    "rejected_ids": [[6, 7], [8], [9]],
}


def key(model, rows=ROWS, ref_model=None, **settings):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_dict(rows)
    return reference_key([identify(dataset, model, ref_model, SETTINGS | settings)])


def lora(model, seed, **options):
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **options)
    return get_peft_model(copy.deepcopy(model), config)


def test_rows_of_the_same_tokens_have_one_key(tiny_llama):
    dataset = Dataset.from_dict(ROWS)
    parts = concatenate_datasets([dataset.select([0]), dataset.select([1, 2])])
    shuffled = concatenate_datasets([dataset.select([2]), dataset.select([0, 1])])
    expected = key(tiny_llama)
    assert len(expected) == 64
    assert expected == key(tiny_llama, parts) == key(tiny_llama, shuffled.select([1, 2, 0]))
    assert expected == key(tiny_llama, ROWS | {"prompt": ["d", "e", "f"]})
    assert expected != key(tiny_llama, shuffled)


@pytest.mark.parametrize(
    "change",
    [
        {"chosen_ids": [[6], [7, 8], [10]]},
        {"chosen_ids": [[6, 7], [8], [9]]},  # the same ids in other rows
        {"prompt_ids": ROWS["chosen_ids"], "chosen_ids": ROWS["prompt_ids"]},
    ],
)
def test_other_tokens_have_another_key(change, tiny_llama):
    assert key(tiny_llama) != key(tiny_llama, ROWS | change)


def test_other_settings_have_another_key(tiny_llama):
    assert len({key(tiny_llama), key(tiny_llama, bf16=True), key(tiny_llama, max_length=63)}) == 3


def test_one_weight_more_or_less(tiny_llama):
    expected = key(tiny_llama)
    with torch.no_grad():
        tiny_llama.model.norm.weight[3] += 1e-3
    assert key(tiny_llama) != expected
    assert key(tiny_llama) != key(copy.deepcopy(tiny_llama).bfloat16())


def test_the_adapter_in_training_does_not_count(tiny_llama):
    expected = key(lora(tiny_llama, 0, r=2))
    assert expected == key(lora(tiny_llama, 1, r=2))
    other = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    assert expected != key(lora(other, 0, r=2))


def test_a_frozen_copy_of_an_adapter_counts(tiny_llama):
    def trained_further(seed):
        model = lora(tiny_llama, seed, r=2)
        model.add_adapter("ref", model.peft_config["default"])
        return model

    assert key(trained_further(0)) == key(trained_further(0))
    assert key(trained_further(0)) != key(trained_further(1))
    assert key(trained_further(0)) != key(lora(tiny_llama, 0, r=2))


def test_a_reference_model_of_its_own(tiny_llama):
    other = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert key(tiny_llama, ref_model=other) == key(other)


def test_weights_that_are_elsewhere(tiny_llama):
    assert key(copy.deepcopy(tiny_llama).to("meta")) is None


def with_config(model, **keys):
    """The same weights in a model that was built from another config."""
    config = type(model.config)(**{**model.config.to_dict(), **keys})
    other = type(model)(config)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "override",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rms_norm_eps": 1e-3},
        {"attn_implementation": "eager"},
        {"sliding_window": 8},
        {"quantization_config": {"bnb_4bit_compute_dtype": "bfloat16"}},
    ],
)
def test_another_config_with_the_same_weights(override, tiny_llama):
    assert key(with_config(tiny_llama)) == key(with_config(tiny_llama))
    assert key(with_config(tiny_llama)) != key(with_config(tiny_llama, **override))


def test_where_a_config_comes_from_does_not_count(tiny_llama):
    expected = key(tiny_llama)
    tiny_llama.config._name_or_path = "/elsewhere"
    tiny_llama.config.use_cache = not tiny_llama.config.use_cache
    assert key(tiny_llama) == expected


def test_the_config_of_a_frozen_adapter_counts(tiny_llama):
    def scaled_by(alpha):
        model = lora(tiny_llama, 0, r=2, lora_alpha=alpha)
        model.add_adapter("ref", model.peft_config["default"])
        return model

    assert key(scaled_by(4)) == key(scaled_by(4)) != key(scaled_by(8))


def test_every_process_writes_a_description_in_the_same_order():
    described = {"targets": {"q_proj", "v_proj", "k_proj"}, 1: "one", "1": {2: ("a", "b")}}
    expected = '{"1": {"2": ["a", "b"]}, "targets": ["k_proj", "q_proj", "v_proj"]}'
    assert digests.digest(described) == hashlib.sha256(expected.encode()).hexdigest()


def test_a_frequency_of_the_positions_counts(tiny_llama):
    expected = key(tiny_llama)
    name, buffer = next(tiny_llama.named_buffers())
    assert name not in tiny_llama.state_dict()
    buffer[0] *= 1.001
    assert key(tiny_llama) != expected


def test_a_patched_forward_counts(tiny_llama):
    def forward(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    expected = key(tiny_llama)
    layer = tiny_llama.model.layers[0].mlp
    layer.forward = types.MethodType(forward, layer)
    assert key(tiny_llama) != expected


@pytest.mark.parametrize("package", ["torch", "transformers", "trl", "peft", "aot-plugin"])
def test_a_release_counts(package, tiny_llama, monkeypatch):
    expected, versions = key(tiny_llama), dict(provenance._versions())
    assert versions[package]
    monkeypatch.setattr(provenance, "_versions", lambda: iter({**versions, package: "0"}.items()))
    assert key(tiny_llama) != expected


def test_edited_code_counts(tiny_llama, monkeypatch, tmp_path):
    expected = key(tiny_llama)
    (tmp_path / "edited.py").write_text("1")
    monkeypatch.setattr(provenance, "_own_files", lambda: [tmp_path / "edited.py"])
    assert key(tiny_llama) != expected


def test_nodes(tiny_llama):
    one = identify(Dataset.from_dict(ROWS), tiny_llama, None, SETTINGS)
    assert reference_key([one, one]) == reference_key([one])
    # Half of the rows were computed by something else.
    other = one._replace(computation="other")
    assert reference_key([one, other]) == reference_key([other, one]) != reference_key([one])
    assert reference_key([one._replace(weights=None)] * 2) is None
    with pytest.raises(ValueError, match="the rows of node 1 are not those of node 0"):
        reference_key([one, one._replace(rows="others")])
    with pytest.raises(ValueError, match="the reference weights of node 1, 2 are not those"):
        reference_key([one, *[one._replace(weights="others")] * 2])


def test_a_file_is_found_again(tmp_path):
    def find(**parts):
        parts = {"rows": "r", "weights": "w", "computation": "c", **parts}
        return reference_file(tmp_path / "folder", lambda: Identity(**parts))

    file, is_there = find()
    assert not is_there and file.parent.is_dir()
    assert find()[0] != file  # of a run at the same time
    file.touch()
    assert find() == (file, True)
    assert not find(computation="d")[1]
    assert find(weights=None)[0].name.startswith("unshared-")
