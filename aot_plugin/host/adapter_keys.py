"""Checks the adapter keys of the YAML before a model is loaded.

Under RL the host passes the adapter's config to TRL, and TRL builds the adapter. So keys that only
the host's own adapter loading reads have no effect. Each of them either works here or is refused.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .compat import saved_adapter_config

SAFE_INITS = (None, True, "gaussian", "orthogonal")
"""Initializations that leave the base weights unchanged and make the product of the adapter's two
matrices 0. Only then is the base model with the adapter disabled the same as the initial policy."""

REFUSED_WITH_ADAPTER = {
    "relora": "it belongs to supervised training",
    "unfrozen_parameters": "only the adapter is trained; write `lora_modules_to_save`",
}
"""Keys that the host silently drops if TRL builds the adapter, and what to do instead."""

SAVED_AS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_trainable_token_indices": "trainable_token_indices",
}
"""Keys of the host, and their names in ``adapter_config.json``."""

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def adapter_updates(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the adapter keys of a raw config.

    Returns:
        The keys to set in the config.

    Raises:
        ValueError: naming the key, what is wrong with it, and what to write instead.
    """
    if cfg.get("merge_lora"):
        return _merged_adapter(cfg)
    if cfg.get("adapter"):
        _check_fresh(cfg)
    if cfg.get("lora_model_dir"):
        _check_start(cfg)
    return {}


def start_adapter(cfg: Mapping[str, Any]) -> str:
    """``lora_model_dir``, made absolute if it is a local folder; "" if it is not set."""
    start = str(cfg.get("lora_model_dir") or "")
    return os.path.realpath(start) if os.path.isdir(start) else start


def _merged_adapter(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Makes `axolotl merge-lora` merge the adapter that was trained.

    The command merges the adapter in ``lora_model_dir`` or, without that key, in ``output_dir``. In
    a YAML the key names the adapter from which training starts. Only on the command line does it
    name the adapter to merge.

    Returns:
        The keys to set in the config.
    """
    import yaml

    path = cfg.get("axolotl_config_path")
    start = cfg.get("lora_model_dir")
    if not start or not path or not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        written = yaml.safe_load(file).get("lora_model_dir")
    return {"lora_model_dir": None} if written == start and cfg.get("output_dir") else {}


def _check_fresh(cfg: Mapping[str, Any]) -> None:
    for key, advice in REFUSED_WITH_ADAPTER.items():
        if cfg.get(key):
            raise ValueError(
                f"`{key}` has no effect under `rl: aot` with an adapter: {advice}; remove it"
            )
    init = cfg.get("peft_init_lora_weights")
    loftq = ((cfg.get("peft") or {}).get("loftq_config") or {}).get("loftq_bits")
    key = "peft.loftq_config" if loftq else f"peft_init_lora_weights: {init}"
    if loftq or not _is_safe(init):
        raise ValueError(
            f"`{key}` begins the adapter with a change of the base weights, or of the policy; the "
            "base model with the adapter disabled, which is the reference, would not be what the "
            "policy begins as. Remove it, or write `gaussian` or `orthogonal`"
        )
    if cfg.get("peft_autocast_adapter_dtype") is False and not cfg.get("lora_model_dir"):
        raise ValueError(
            "`peft_autocast_adapter_dtype: false` has no effect on an adapter that is new: TRL "
            "builds it, in float32 (bfloat16 on quantized weights); remove it"
        )


def _is_safe(init: Any) -> bool:
    return any(init is safe or (isinstance(safe, str) and init == safe) for safe in SAFE_INITS)


def _check_start(cfg: Mapping[str, Any]) -> None:
    start = cfg["lora_model_dir"]
    said = f"`lora_model_dir: {start}`"
    if cfg.get("adapter") not in ("lora", "qlora"):
        raise ValueError(
            f"{said} needs `adapter: lora` or `adapter: qlora`, not `adapter: {cfg.get('adapter')}`"
        )
    saved = _saved_config(Path(start), said)
    if saved.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{said} holds an adapter of the type {saved['peft_type']}, not LoRA")
    unfit = {
        "bias": saved.get("bias", "none") != "none",
        "init_lora_weights": bool(saved.get("loftq_config"))
        or not _is_safe(saved.get("init_lora_weights")),
        "layer_replication": bool(saved.get("layer_replication")),
    }
    for name, is_unfit in unfit.items():
        if is_unfit:
            raise ValueError(
                f"{said} holds an adapter with `{name}: {saved.get(name)}`, which changes the base "
                "model itself, so that no frozen copy of the adapter can be the reference. Merge "
                "it (`axolotl merge-lora`), and write the merged model as `base_model`"
            )
    _check_contradictions(cfg, saved, said)


def _saved_config(start: Path, said: str) -> dict[str, Any]:
    saved = saved_adapter_config(start)
    if saved is None:
        found = "a folder without adapter_config.json" if start.is_dir() else "not a folder"
        if (start / "config.json").is_file():
            found = "a full model; write it as `base_model` and remove `lora_model_dir`"
        hub = "" if start.exists() or start.is_absolute() else ", nor an adapter on the hub"
        raise ValueError(f"{said} is not an adapter: {found}{hub}")
    if start.is_dir() and not any((start / name).is_file() for name in WEIGHTS):
        raise ValueError(f"{said} holds no weights: looked for {' and '.join(WEIGHTS)}")
    return saved


def _check_contradictions(cfg: Mapping[str, Any], saved: Mapping[str, Any], said: str) -> None:
    """Raises ValueError for keys that contradict the saved adapter.

    The adapter is trained as it was saved, so such keys would have no effect.
    """
    contradictions = []
    for key, name in SAVED_AS.items():
        written, is_saved = _plain(cfg.get(key)), _plain(saved.get(name))
        if cfg.get(key) is None or written == is_saved:
            continue
        if key == "lora_target_modules" and written in ("all-linear", ["all-linear"]):
            continue  # peft has saved the names that this stands for
        if (
            key == "lora_target_modules"
            and cfg.get("lora_target_linear")
            and set(written or ()) <= set(is_saved or ())
        ):
            continue
        contradictions.append(f"`{key}: {cfg[key]}` (the adapter: {saved.get(name)})")
    if contradictions:
        raise ValueError(
            f"{said} is trained on as it was saved, and the config says otherwise: "
            f"{', '.join(contradictions)}. Remove these keys"
        )


def _plain(value: Any) -> Any:
    """Normalizes a value for comparison: list order and kinds of empty values do not matter."""
    if isinstance(value, str) or not value:
        return value or None
    return sorted(value, key=str) if isinstance(value, list | tuple | set) else value
