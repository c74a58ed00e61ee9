"""The key of cached reference log-probabilities: what changes it, and what does not."""

import copy

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model

from aot_plugin.reference import reference_key

SETTINGS = {"max_length": 64, "bf16": False}
ROWS = {
    "prompt": ["a", "b", "c"],
    "prompt_ids": [[1, 2], [3], [4, 5]],
    "chosen_ids": [[6], [7, 8], [9]],
    "rejected_ids": [[6, 7], [8], [9]],
}


def key(model, rows=ROWS, ref_model=None, **settings):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_dict(rows)
    return reference_key(dataset, model, ref_model, SETTINGS | settings)


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
