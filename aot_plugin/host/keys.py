"""Which top-level keys have an effect under ``rl: aot``, and the messages on those that have none.

The host silently drops keys that it does not know, and reads many known ones only in supervised
fine-tuning. So every key of an ``rl: aot`` config either has an effect, is refused with advice on
what to write instead, or is named in a single warning (``without_effect``).
"""

import dataclasses
import difflib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_SIDES = (
    "positives and negatives each have total mass 1, so a factor on one side changes nothing; "
    "weigh rows with `field_weight` in their `datasets:` entry"
)
_SFT = "Axolotl does it in supervised fine-tuning only; remove it"

REFUSED: dict[str, str] = {
    "dpo_loss_type": "the loss is AOT's; choose it with `aot_penalty`",
    "dpo_loss_weights": "choose the loss with `aot_penalty`, and add an SFT loss with "
    "`aot_sft_weight`",
    "dpo_label_smoothing": "write `aot_label_smoothing`",
    "dpo_use_weighting": "sorted rows have no pair to weigh; remove it",
    "dpo_padding_free": "the step is regrouped by length anyway; remove it",
    "dpo_use_liger_kernel": "the LM head runs at completion tokens only anyway; remove it",
    "dpo_beta": "write `rl_beta`",
    "kto_desirable_weight": _SIDES,
    "kto_undesirable_weight": _SIDES,
    "orpo_alpha": "it belongs to `rl: orpo`; remove it",
    "simpo_gamma": "it belongs to `rl: simpo`; remove it",
    "cpo_alpha": "it belongs to `rl: simpo`; remove it",
    "trainer_cls": "`rl: aot` brings its own trainer; remove it",
}
"""Host keys that contradict ``rl: aot`` whatever their value, and what to do instead."""

REFUSED_IF_ON: dict[str, str] = {
    "neftune_noise_alpha": "with noise the passes of a step would see different networks; remove "
    "it (Axolotl applies it in supervised fine-tuning only)",
    "noisy_embedding_alpha": "with noise the passes of a step would see different networks; remove "
    "it (Axolotl applies it in supervised fine-tuning only)",
    "streaming": "preference rows are prepared before training; remove it",
    "pretraining_dataset": "its rows would not be read; write `datasets`",
    "reward_model": "it is another method; remove it",
    "process_reward_model": "it is another method; remove it",
    "use_dft": _SFT,
    "use_eaft": _SFT,
    "use_pose": _SFT,
    "relora": _SFT,
    "jagged_restart_steps": _SFT,
    "lisa_n_layers": _SFT,
    "lisa_step_interval": _SFT,
    "auto_find_batch_size": f"the effective batch is what is sorted together; {_SFT}",
    "tiled_mlp": "its backward pass takes all rows of a micro-batch for one long row, so their "
    "gradients are mixed up; remove it",
}
"""Host keys that change what is trained, but that the host does not read under ``rl`` or does not
do right there, and what to do instead. A value that switches them off is accepted."""

UPDATES_IN_BACKWARD = ("lomo", "adalomo")
"""Values of ``optimizer`` that update weights in the backward pass, so that the micro-batches of a
step are not differentiated at the same weights."""

REFUSED_OF_TRL: dict[str, str] = dict.fromkeys(
    ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    "Axolotl hands it to GRPO only, and AOT's reference stays as it is; remove it",
)
"""Keys under ``trl:`` that are refused, and what to do instead."""

_NO_CROSS_ENTROPY = "AOT computes no cross entropy"
_REGROUPED = "a step is regrouped by length anyway"
_FINE_TUNING = "read in supervised fine-tuning only"
_PACKING = "preference rows are not packed"

WITHOUT_EFFECT: dict[str, str] = {
    **dict.fromkeys(
        ("lora_dropout", "mixlora_expert_lora_dropout"),
        "dropout is off: all passes of a step see one network",
    ),
    **dict.fromkeys(("group_by_length", "pad_to_sequence_len"), _REGROUPED),
    "max_prompt_len": "a row counts as a whole against `sequence_len`; see "
    "`excess_length_strategy`",
    **dict.fromkeys(
        (
            *("chunked_cross_entropy", "chunked_cross_entropy_num_chunks"),
            *("flash_attn_cross_entropy", "cut_cross_entropy", "liger_cross_entropy"),
            "liger_fused_linear_cross_entropy",
        ),
        _NO_CROSS_ENTROPY,
    ),
    **dict.fromkeys(
        (
            *("sample_packing_group_size", "sample_packing_bin_size", "sample_packing_eff_est"),
            *("sample_packing_sequentially", "sample_packing_mp_start_method"),
            *("eval_sample_packing", "batch_flattening", "multipack_real_batches"),
            *("pretrain_multipack_buffer_size", "pretrain_multipack_attn"),
            *("pretraining_sample_concatenation", "streaming_multipack_buffer_size"),
            "fa_varlen_kwargs_in_collator",
        ),
        _PACKING,
    ),
    "default_system_message": "no chat template of Axolotl has a place for it; write a system turn "
    "in the rows, or `system_prompt` in the entry",
    "dataloader_drop_last": "the shorter last step of an epoch is as exact as the others",
    **dict.fromkeys(
        (
            *("train_on_inputs", "eval_sequence_len", "min_sample_len", "balance_labels"),
            *("label_balance_window_optim_steps", "eot_tokens", "role_boundaries"),
            *("dataset_shard_num", "dataset_shard_idx", "dataset_keep_in_memory"),
            *("pose_split_on_token_ids", "pose_max_context_len", "pose_num_chunks"),
            *("eaft_alpha", "eaft_k", "relora_prune_ratio", "relora_prune_method"),
            *("relora_cpu_offload", "jagged_restart_warmup_steps", "jagged_restart_anneal_steps"),
            *("lisa_layers_attribute", "layer_offloading", "include_tkps", "num_labels"),
            *("center_rewards_coefficient", "do_causal_lm_eval", "eval_causal_lm_metrics"),
            *("do_bench_eval", "bench_dataset", "bench_split", "generate_samples"),
            *("num_generation_samples", "generation_max_new_tokens", "generation_temperature"),
            *("generation_top_p", "generation_top_k", "generation_prompt_ratio"),
            *("generation_do_sample", "eval_table_size", "eval_max_new_tokens"),
            *("total_num_tokens", "total_supervised_tokens"),
        ),
        _FINE_TUNING,
    ),
    **dict.fromkeys(("vllm", "ebft"), "it belongs to another `rl`"),
    **dict.fromkeys(
        (
            *("swanlab_log_completions", "swanlab_completion_log_interval"),
            "swanlab_completion_max_buffer",
        ),
        "no trainer logs the completions that it waits for; `aot_samples` writes the policy's own",
    ),
    **dict.fromkeys(("heads_k_stride", "ring_attn_func"), "it belongs to `context_parallel_size`"),
    **dict.fromkeys(
        ("lr_div_factor", "preprocess_iterable", "fsdp_final_state_dict_type"),
        "Axolotl reads it nowhere",
    ),
}
"""Keys of the host, and of some of its own plugins, that have no effect with ``rl: aot``, and
why."""

FORWARDED = (
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters"),
    "lr_quadratic_warmup",
)
"""Host keys that the host passes to the trainer only in supervised fine-tuning, and that we pass to
ours."""

_ROW_LENGTHS = (
    "write `sequence_len` for a whole row; a longer one is dropped, or cut with "
    "`excess_length_strategy: truncate`"
)
_REFERENCE = "the reference is what the policy was before training; remove it"

FOREIGN: dict[str, str] = {
    "beta": "write `rl_beta`",
    "max_length": "write `sequence_len`",
    "max_seq_length": "write `sequence_len`",
    "max_prompt_length": _ROW_LENGTHS,
    "max_completion_length": _ROW_LENGTHS,
    "max_target_length": _ROW_LENGTHS,
    "truncation_mode": "write `excess_length_strategy: drop`, `truncate` or `raise`",
    "loss_type": "choose the loss with `aot_penalty`",
    "loss_weights": "there is one loss; choose it with `aot_penalty`",
    "label_smoothing": "write `aot_label_smoothing`",
    "label_smoothing_factor": "write `aot_label_smoothing`",
    "f_divergence_type": "AOT compares log-ratios, which is its reverse_kl; remove it",
    "f_alpha_divergence_coef": "AOT compares log-ratios, which is its reverse_kl; remove it",
    "discopop_tau": "it belongs to another loss; remove it",
    "reference_free": "AOT compares with a reference; remove it",
    "force_use_ref_model": _REFERENCE,
    "ref_model": _REFERENCE,
    "ref_adapter_name": _REFERENCE,
    "rl_adapter_ref_model": _REFERENCE,
    "sync_ref_model": _REFERENCE,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "desirable_weight": _SIDES,
    "undesirable_weight": _SIDES,
    "use_weighting": "sorted rows have no pair to weigh; remove it",
    "ld_alpha": "write `dpo_ld_alpha`",
    "padding_free": "the step is regrouped by length anyway; remove it",
    "use_liger_kernel": "the LM head runs at completion tokens only anyway; remove it",
    "use_liger_loss": "the LM head runs at completion tokens only anyway; remove it",
    "use_logits_to_keep": "the LM head runs at completion tokens only anyway; remove it",
    "disable_dropout": "dropout is off; remove it",
    "precompute_ref_batch_size": "it is `micro_batch_size`, or `eval_batch_size`; remove it",
    "generate_during_eval": "evaluations compare log-probabilities; remove it",
    "router_aux_loss_coef": "write `overrides_of_model_config: {router_aux_loss_coef: 0.0}`",
    "model_init_kwargs": "write `overrides_of_model_kwargs`",
    "pad_token": "write `special_tokens: {pad_token: ...}`",
    "eos_token": "write `special_tokens: {eos_token: ...}`",
    "model_name_or_path": "write `base_model`",
    "tokenizer_name_or_path": "write `tokenizer_config`",
    "dataset_name": "write `datasets`",
    "train_dataset": "write `datasets`",
    "eval_dataset": "write `test_datasets`",
    "per_device_train_batch_size": "write `micro_batch_size`",
    "per_device_eval_batch_size": "write `eval_batch_size`",
    "num_train_epochs": "write `num_epochs`",
    "optim": "write `optimizer`",
    "lr_scheduler_type": "write `lr_scheduler`",
    "report_to": "write `use_wandb`, `use_mlflow`, `use_tensorboard` or `use_comet`",
    "run_name": "write `wandb_name` or `mlflow_run_name`",
    "push_to_hub": "write `hub_model_id`",
    "data_seed": "write `seed`",
    "train_sampling_strategy": "write `curriculum_sampling: true` for rows in their order",
    "torch_dtype": "write `bf16: true` or `fp16: true`",
    "dtype": "write `bf16: true` or `fp16: true`",
    "use_peft": "write `adapter: lora`",
    "lora_rank": "write `lora_r`",
}
"""Keys of TRL and Transformers that have another name in Axolotl, or that it does not pass on, and
what to do instead."""

_LEFT_TO_HOST = ("fsdp", "relora_steps", "inference")
"""Keys outside the host's schema that it reads before it drops them."""

_TEMPLATE = ("x-", ".", "_")
"""Prefixes of keys that only hold YAML anchors."""


def known_keys() -> set[str]:
    """All top-level keys that can appear in a config.

    These are the keys that the host or a registered plugin declares, with their aliases, and the
    flags of the host's commands, which ``load_cfg`` writes into the config.
    """
    from axolotl.cli import args as flags
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.schemas.config import AxolotlConfigWCapabilities, AxolotlInputConfig

    known = set(_LEFT_TO_HOST)
    # One by one: to merge them into a schema, as the host does to validate, takes half a second.
    of_plugins = map(pkgutil.resolve_name, PluginManager.get_instance().get_input_args())
    for schema in (AxolotlConfigWCapabilities, AxolotlInputConfig, *of_plugins):
        for name, field in schema.model_fields.items():
            choices = getattr(field.validation_alias, "choices", [field.validation_alias])
            known |= {name, *(a for a in (field.alias, *choices) if isinstance(a, str))}
    for command in ("TrainerCliArgs", "PreprocessCliArgs", "EvaluateCliArgs", "InferenceCliArgs"):
        known |= {field.name for field in dataclasses.fields(getattr(flags, command))}
    return known


def check_known(cfg: Mapping[str, Any]) -> None:
    """Checks that the host or a plugin in use knows every key of a raw config.

    Raises:
        ValueError: naming the unknown keys, each with what to write instead.
    """
    known = known_keys()
    unknown = [
        key
        for key, value in cfg.items()
        if value is not None and key not in known and not key.startswith(_TEMPLATE)
    ]
    problems: list[str] = []
    of_plugins: dict[str, list[str]] = {}
    for key in unknown:
        plugin = None if key in FOREIGN else next(_declaring(key), None)
        if plugin is None:
            problems.append(_instead(key, known))
        elif _on(cfg[key]):
            of_plugins.setdefault(plugin, []).append(f"`{key}`")
    problems += [
        f"{', '.join(keys)}: keys of Axolotl's plugin {plugin}, which `plugins` does not name; "
        "list it there, or remove them"
        for plugin, keys in of_plugins.items()
    ]
    trl = {str(key): value for key, value in (cfg.get("trl") or {}).items() if value is not None}
    if trl:
        from axolotl.utils.schemas.trl import TRLConfig

        known = set(TRLConfig.model_fields)
        problems += [_misspelt(f"trl.{key}", key, known, "trl.") for key in trl if key not in known]
    if problems:
        raise ValueError("; ".join(problems))


def refusals(cfg: Mapping[str, Any]) -> list[str]:
    """Error messages for the host keys in a config that contradict ``rl: aot``."""
    trl = cfg.get("trl") or {}
    refused = REFUSED | _sft_instead(cfg)
    found = [(key, advice) for key, advice in refused.items() if cfg.get(key) is not None]
    found += [(key, advice) for key, advice in REFUSED_IF_ON.items() if _on(cfg.get(key))]
    found += [(f"trl.{k}", advice) for k, advice in REFUSED_OF_TRL.items() if _on(trl.get(k))]
    if (optimizer := str(cfg.get("optimizer")).lower()) in UPDATES_IN_BACKWARD:
        advice = "it updates the weights in each backward pass, in the middle of a step"
        found.append((f"optimizer: {optimizer}", f"{advice}; write another one"))
    return [f"`{key}` can't be used with `rl: aot`: {advice}" for key, advice in found]


def _sft_instead(cfg: Mapping[str, Any]) -> dict[str, str]:
    """What to write instead of TRL's ``dpo_loss_type: [aot, sft]``, with its weights if any."""
    types, weights = cfg.get("dpo_loss_type"), cfg.get("dpo_loss_weights") or [1.0, 1.0]
    if types not in (["aot", "sft"], ["sft", "aot"]):
        return {}
    try:
        weight = dict(zip(types, map(float, weights), strict=True))
        ratio = weight["sft"] / weight["aot"]
    except (TypeError, ValueError, ZeroDivisionError):
        return {}
    advice = f"write `aot_sft_weight: {ratio:g}` (AOT's own weight is 1)"
    return dict.fromkeys(("dpo_loss_type", "dpo_loss_weights"), advice)


def without_effect(cfg: Mapping[str, Any]) -> str | None:
    """One line that names the keys of a raw config that have no effect; None if all have one."""
    reasons: dict[str, list[str]] = {}
    for key, reason in WITHOUT_EFFECT.items():
        if _on(cfg.get(key)):
            reasons.setdefault(reason, []).append(f"`{key}`")
    if cfg.get("save_safetensors") is False:
        reasons["Transformers saves nothing else"] = ["`save_safetensors: false`"]
    grpo = [f"`trl.{key}`" for key, value in (cfg.get("trl") or {}).items() if _on(value)]
    if grpo := [key for key in grpo if key != "`trl.beta`"]:
        reasons["it belongs to `rl: grpo`"] = grpo
    if not reasons:
        return None
    parts = (f"{', '.join(keys)} ({reason})" for reason, keys in reasons.items())
    return f"without effect under `rl: aot`: {'; '.join(parts)}"


def _on(value: Any) -> bool:
    return value not in (None, False, 0, "", [], {})


def _instead(key: str, known: set[str]) -> str:
    if key in FOREIGN:
        return f"`{key}` is no key of Axolotl, which would drop it: {FOREIGN[key]}"
    return _misspelt(key, key, known)


def _misspelt(written: str, key: str, known: set[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(
        key.lower().replace("-", "_"), sorted(known), n=1, cutoff=0.75
    )
    nearest = f"write `{prefix}{close[0]}`, or " if close else ""
    return f"`{written}` is no key of Axolotl or of a plugin in use: {nearest}remove it"


def _declaring(key: str) -> Iterator[str]:
    """Yields the host's own integrations that declare a key, without importing them."""
    import axolotl.integrations

    for folder in axolotl.integrations.__path__:
        for path in sorted(Path(folder).glob("*/args.py")):
            if re.search(rf"^    {re.escape(key)}\s*:", path.read_text(), re.MULTILINE):
                yield f"axolotl.integrations.{path.parent.name}"
