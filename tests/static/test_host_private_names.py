"""What aot_plugin takes for granted about the installed host: after an upgrade of axolotl, TRL,
transformers, accelerate or datasets, a failure here names what moved.

Two lists are read off the package itself, so that a new dependence shows up without being added by
hand: its imports, and the private attributes that it touches and doesn't define.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from axolotl.core.trainers import AxolotlDPOTrainer, AxolotlKTOTrainer
from axolotl.integrations.base import BasePlugin, PluginManager
from packaging.version import Version

import aot_plugin
from aot_plugin import trainer as ours
from aot_plugin.config import AOTOptions, AOTTrainingArgs, training_args
from aot_plugin.data.freshness import SETTINGS
from aot_plugin.host.adapter_keys import REFUSED_WITH_ADAPTER, SAVED_AS
from aot_plugin.host.keys import FORWARDED, REFUSED, REFUSED_IF_ON
from aot_plugin.plugin import AOTPlugin

PACKAGE = Path(aot_plugin.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
HOSTS = ("axolotl", "trl", "transformers", "accelerate", "datasets", "peft")
TRAINERS = {
    ours.AOTPairedTrainer: AxolotlDPOTrainer,
    ours.AOTUnpairedTrainer: AxolotlKTOTrainer,
}


def nodes(kind: type[ast.AST]) -> Iterator[Any]:
    for tree in TREES.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, kind))


def imports() -> list[tuple[str, str]]:
    return sorted(
        {
            (node.module, alias.name)
            for node in nodes(ast.ImportFrom)
            if node.level == 0 and node.module.split(".")[0] in HOSTS
            for alias in node.names
        }
    )


OLD = Version(version("axolotl")) < Version("0.20")
NOT_IN_OLD = {"read_saved_adapter_config", "upcast_lora_parameters"}
"""Asked for (`host/compat.py`), and behind a key that the old schema lacks."""


@pytest.mark.parametrize(("module", "name"), imports(), ids=lambda part: part)
def test_what_is_imported_is_there(module: str, name: str) -> None:
    if OLD and name in NOT_IN_OLD:
        pytest.skip("not in this release")
    found = importlib.import_module(module)
    if not hasattr(found, name):
        importlib.import_module(f"{module}.{name}")


def test_no_other_private_names() -> None:
    """Those that the package touches without defining, annotating or overriding them."""
    touched = {node.attr for node in nodes(ast.Attribute) if is_private(node.attr)}
    defined = {node.name for kind in (ast.FunctionDef, ast.ClassDef) for node in nodes(kind)}
    defined |= {node.id for node in nodes(ast.Name) if isinstance(node.ctx, ast.Store)}
    defined |= {node.attr for node in nodes(ast.Attribute) if isinstance(node.ctx, ast.Store)}
    python = {"_asdict", "_replace"}
    foreign = {"_get_cache_file_path", "_attn_implementation", "_indices"}
    assert touched - defined - python | {"_get_cache_file_path"} == foreign


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_bases(trainer: type) -> list[type]:
    return [base for base in trainer.__mro__ if base.__module__.startswith("aot_plugin.")]


def overridden() -> list[tuple[type, type, str]]:
    return [
        (mine, host, name)
        for mine, host in TRAINERS.items()
        for name in sorted({name for base in own_bases(mine) for name in vars(base)})
        if inspect.isfunction(getattr(mine, name)) and hasattr(host, name) and name != "__init__"
    ]


OVERRIDDEN = {
    *("compute_ref_log_probs", "_precompute_ref_logps", "_prepare_dataset", "compute_loss"),
    *("_prepare_inputs", "evaluation_loop", "get_batch_samples", "prediction_step"),
    *("training_step", "_set_signature_columns_if_needed"),
    *("log", "create_model_card", "train", "save_model"),
}


@pytest.mark.parametrize("mine", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_the_trainers_override_what_they_mean_to(mine: type) -> None:
    """A method that the host has renamed would never be called, without a word."""
    sampler = {"_get_train_sampler"} if mine is ours.AOTUnpairedTrainer else set()
    assert {name for m, _, name in overridden() if m is mine} == OVERRIDDEN | sampler


@pytest.mark.parametrize(("mine", "host", "name"), overridden(), ids=lambda part: str(part)[:40])
def test_an_override_takes_what_the_host_passes(mine: type, host: type, name: str) -> None:
    def parameters(function: Callable[..., Any]) -> list[str]:
        found = inspect.signature(function).parameters.values()
        return [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]

    function = getattr(mine, name)
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        assert parameters(function) == parameters(getattr(host, name))


def assigned(cls: type) -> set[str]:
    """The attributes that the methods of a class and its bases give an instance."""
    trees = [ast.parse(textwrap.dedent(inspect.getsource(base))) for base in cls.__mro__[:-1]]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


OURS = {"_mode", "_only_evaluates", "_reference", "_scored_with", "_step", "_step_class"}
OURS |= {"hub_datasets", "_epoch_rows", "_resumed_from", "_said_of_random_rows"}


@pytest.mark.parametrize("host", TRAINERS.values(), ids=lambda trainer: trainer.__name__)
def test_the_trainers_attributes(host: type) -> None:
    bases = own_bases(ours.AOTTrainerMixin)
    annotated = {name for base in bases for name in inspect.get_annotations(base)} - OURS
    further = {"compute_metrics", "data_collator", "model_wrapped", "accelerator", "state"}
    further |= {"callback_handler", "train_dataset"}
    assert {"_metrics", "_tokenizer", "_is_vision_dataset", "ref_model", "beta"} <= annotated
    assert sorted((annotated | further) - assigned(host)) == []
    methods = ("compute_loss_context_manager", "_prepare_inputs", "is_world_process_zero")
    tags = ("tag_names", "_tag_names", "_name", "_paper")  # for the model card
    assert [name for name in (*methods, *tags) if not hasattr(host, name)] == []


@pytest.mark.parametrize("host", TRAINERS.values(), ids=lambda trainer: trainer.__name__)
def test_trl_precomputes_through_what_we_replace(host: type) -> None:
    source = inspect.getsource(host._precompute_ref_logps)
    assert "dataset._get_cache_file_path(" in source
    assert "if self.accelerator.is_main_process:" in source  # of each node, by nodes.py
    assert "self.compute_ref_log_probs(model, " in source
    from datasets import Dataset

    assert list(inspect.signature(Dataset._get_cache_file_path).parameters) == [
        "self",
        "fingerprint",
    ]


def test_trl_reads_the_tokens_by_our_names() -> None:
    from trl.trainer import dpo_trainer, kto_trainer

    for module, columns in (
        (dpo_trainer, ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps")),
        (kto_trainer, ("prompt_ids", "completion_ids", "label", "ref_logps")),
    ):
        source = inspect.getsource(module)
        names = (*columns, "input_ids", "attention_mask", "completion_mask")
        assert [name for name in names if f'"{name}"' not in source] == []


def test_models_say_how_they_attend() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(attn_implementation="sdpa")
    assert config._attn_implementation == "sdpa"
    assert config.get_text_config() is config


def binds(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    inspect.signature(function).bind(*args, **kwargs)


def test_functions_take_our_calls() -> None:
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list
    from axolotl.cli import evaluate
    from axolotl.common import datasets as common
    from axolotl.loaders import load_adapter, load_tokenizer
    from axolotl.utils.chat_templates import extract_chat_template_args, get_chat_template
    from axolotl.utils.data import rl, shared
    from axolotl.utils.tokenization import check_dataset_labels, check_example_labels
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import use_adapter

    binds(broadcast_object_list, [""], from_process=0)
    binds(use_adapter, None, adapter_name=None)
    binds(disable_gradient_checkpointing, None, {})
    binds(Accelerator.pad_across_processes, None, None, dim=0)
    binds(load_tokenizer, {})
    binds(load_adapter, None, {}, "lora")
    if not OLD:
        from axolotl.loaders.adapter import read_saved_adapter_config

        binds(read_saved_adapter_config, "folder", from_hub=True)
    binds(extract_chat_template_args, cfg={}, ds_cfg={})
    binds(get_chat_template, "chatml", jinja_template=None, tokenizer=None)
    binds(common.load_preference_datasets, cfg={}, cli_args=None)
    binds(shared.load_dataset_with_config, {}, False)
    binds(shared.generate_dataset_hash_from_config, {}, [], "name")
    binds(shared.get_prepared_dataset_path, {}, "hash")
    binds(check_example_labels, {}, None, text_only=True)
    binds(check_dataset_labels, None, tokenizer=None, num_examples=1, text_only=True, rl_mode=True)
    # Both are replaced by name in the module that calls them.
    assert "load_dataset_with_config(" in inspect.getsource(rl._load_split)
    evaluating = inspect.getsource(evaluate.do_evaluate)
    assert "load_preference_datasets(cfg=cfg, cli_args=cli_args)" in evaluating
    called = inspect.getsource(common.load_preference_datasets)
    assert "check_dataset_labels(" in called
    assert all(f"{name}=" in called for name in ("dataset", "tokenizer", "num_examples"))


def test_adapters_go_the_ways_that_we_know() -> None:
    from axolotl import evaluate
    from axolotl import train as host
    from peft import PeftModel
    from trl.trainer import dpo_trainer, kto_trainer

    # What is given to the trainer tells training from evaluation; what is saved at the end.
    assert "peft_config=" in inspect.getsource(host.setup_model_and_trainer)
    assert "peft_config" not in inspect.getsource(evaluate.evaluate)
    assert "model.save_pretrained(cfg.output_dir)" in inspect.getsource(host.save_trained_model)
    for module in (dpo_trainer, kto_trainer):
        assert 'model.add_adapter("ref", default_config)' in inspect.getsource(module)
    binds(PeftModel.save_pretrained, None, "folder", selected_adapters=["default"])
    binds(PeftModel.load_adapter, None, "folder", "ref", is_trainable=False)


def test_the_plugin_api() -> None:
    for name, method in vars(AOTPlugin).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            host = getattr(BasePlugin, name)
            assert [*inspect.signature(method).parameters] == [*inspect.signature(host).parameters]
    assert {"register", "get_input_args", "get_training_args_mixin", "load_datasets"} <= vars(
        AOTPlugin
    ).keys()
    assert hasattr(PluginManager.get_instance(), "plugins")


def test_config_keys_that_we_write_or_read() -> None:
    from axolotl.utils.schemas.config import AxolotlInputConfig

    read = set(
        "rl rl_beta trl trainer_cls datasets test_datasets remove_unused_columns sequence_len seed "
        "curriculum_sampling precompute_ref_log_probs chat_template chat_template_jinja "
        "chat_template_kwargs dataset_exact_deduplication excess_length_strategy val_set_size "
        "skip_prepare_dataset is_preprocess hf_use_auth_token "
        "context_parallel_size tensor_parallel_size sequence_parallel_degree "
        "adapter lora_model_dir lora_fp32_gradients merge_lora peft "
        "output_dir base_model deepspeed peft_init_lora_weights peft_autocast_adapter_dtype".split()
    )
    read |= {"early_stopping_patience", "loss_watchdog_threshold", "shuffle_merged_datasets"}
    read |= {*SETTINGS, *FORWARDED, "tokenizer_config", "base_model", "dataset_prepared_path"}
    # `sequence_parallel_degree` and a few of the refused ones are read raw, before validation.
    known = set(AxolotlInputConfig.model_fields)
    if Version(version("axolotl")) < Version("0.21"):  # not in older schemas, and read raw
        read -= {"eval_on_start"}
    if OLD:
        known |= {"lora_fp32_gradients", "use_dft"}
    adapter_keys = SAVED_AS.keys() | REFUSED_WITH_ADAPTER.keys()
    refused = REFUSED.keys() | REFUSED_IF_ON.keys()
    assert sorted((read | adapter_keys | refused) - known) == []


def test_training_arguments_that_we_write() -> None:
    from axolotl.core.training_args import AxolotlKTOConfig as KTOConfig

    cfg = dict.fromkeys(vars(AOTOptions())) | {"aot_mode": "unpaired", "sequence_len": 8}
    cfg |= dict.fromkeys((*FORWARDED, "curriculum_sampling", "early_stopping_patience"), 1)
    written = training_args(cfg).keys() - vars(AOTTrainingArgs()).keys()
    assert written <= KTOConfig.__dataclass_fields__.keys()
    loss_type = KTOConfig.__dataclass_fields__["loss_type"].metadata
    assert "apo_zero_unpaired" in str(loss_type)
