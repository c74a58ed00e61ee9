"""Models of some thousand weights with real tokenizers, and the host's own loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axolotl.cli.config import load_cfg
from axolotl.utils.dict import DictDefault
from data_helpers import SMOLLM2, make_tokenizer
from datasets import Dataset
from harness import SMALLEST, random_model
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """``model_dir(family)``: a directory with a tokenizer and a model of some thousand weights."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family == "smollm2" and not SMOLLM2.is_dir():
            pytest.skip("outputs/smollm2-135m-instruct is missing: see example_configs/quickstart")
        if family not in made:
            folder = made[family] = tmp_path_factory.mktemp(family)
            make_tokenizer(folder, family)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            random_model(tokenizer, **SMALLEST).save_pretrained(folder)
        return made[family]

    return make


@pytest.fixture
def tokenizer(model_dir):
    """A tokenizer with a chat template, where any will do."""
    return AutoTokenizer.from_pretrained(model_dir("chatml"))


@pytest.fixture
def raw_config(model_dir, tmp_path):
    """``raw_config(datasets, **keys)``: the config of an unpaired run, as a user writes it."""

    def make(datasets: list[dict[str, Any]], family: str = "chatml", **keys: Any) -> dict[str, Any]:
        raw = {
            "base_model": str(model_dir(family)),
            "rl": "aot",
            "aot_mode": "unpaired",
            "plugins": ["aot_plugin.AOTPlugin"],
            "datasets": datasets,
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "sequence_len": 256,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "learning_rate": 1e-4,
            "dataset_num_proc": 0,  # no worker process per map
            "shuffle_merged_datasets": False,
        }
        return raw | keys

    return make


@pytest.fixture
def config(raw_config):
    """``config(datasets, **keys)``: the same, loaded by the host."""

    def make(*args: Any, **keys: Any) -> DictDefault:
        return load_cfg(DictDefault(raw_config(*args, **keys)))

    return make


@pytest.fixture
def trl_prepare(model_dir, tmp_path):
    """``trl_prepare(family)``: how TRL's KTO trainer (or, ``paired``, its DPO trainer) prepares a
    dataset."""

    def prepare(
        family: str, paired: bool = False, eos_token: str | None = None
    ) -> Callable[[Dataset], Dataset]:
        folder = model_dir(family)
        common = {
            "output_dir": str(tmp_path / "trl"),
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
        }

        def run(dataset: Dataset) -> Dataset:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            if eos_token:
                tokenizer.eos_token = eos_token
            make, args = DPOTrainer, DPOConfig(**common)
            if not paired:
                make, args = KTOTrainer, KTOConfig(loss_type="apo_zero_unpaired", **common)
            return make(
                model=LlamaForCausalLM.from_pretrained(folder),
                processing_class=tokenizer,
                args=args,
                train_dataset=dataset,
            ).train_dataset

        return run

    return prepare
