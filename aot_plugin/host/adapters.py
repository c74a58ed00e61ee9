"""The adapter of a training run: initial policy, reference, and what is saved.

If the YAML names no adapter to start from, TRL builds one, and the reference is the base model with
the adapter disabled. With ``lora_model_dir`` the host's own loader reads the adapter, and the
reference is TRL's frozen copy of it, named "ref".
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import PluginManager
from axolotl.utils.logging import get_logger
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..report.saved_arguments import (
    ARGUMENTS,
    check_start,
    find_arguments,
    start_adapter,
    start_digest,
)
from .compat import saved_adapter_config
from .reference_cache import REFERENCE_ADAPTER

LOG = get_logger("axolotl.aot_plugin.host.adapters")

POLICY_ADAPTER = "default"
"""The name of the trained adapter in peft, the host and TRL."""


def policy_to_start_from(model: nn.Module, new_adapter: Any) -> tuple[nn.Module, Any]:
    """The arguments for TRL's trainer, from those that the host passes to ours.

    Args:
        model: the base model.
        new_adapter: the peft config of an adapter to build. The host's evaluation command passes
            None, even if the config has an adapter.

    Returns:
        The policy, and the peft config of the adapter that TRL has to build on it, if any.

    Raises:
        ValueError: if weights of the adapter to start from are missing, if the run would overwrite
            it, or if the host has built an adapter already (``merge_lora``).
    """
    cfg = PluginManager.get_instance().cfg
    if cfg is None or not cfg.adapter:
        return model, new_adapter
    if isinstance(model, PeftModel):
        raise ValueError("`merge_lora` is for the command `axolotl merge-lora`; remove it")
    if not cfg.lora_model_dir:
        if new_adapter is None:
            LOG.warning(
                "no adapter is evaluated, only the base model: name one, "
                "`--lora-model-dir %s` for what this config trained",
                cfg.output_dir,
            )
        return model, new_adapter
    if new_adapter is not None and Path(cfg.lora_model_dir).resolve() == (
        Path(cfg.output_dir).resolve()
    ):
        raise ValueError(
            f"`output_dir: {cfg.output_dir}` is the adapter that training begins with "
            "(`lora_model_dir`), and would be written over; write another `output_dir`"
        )
    return _load(model, cfg), None


def _load(model: nn.Module, cfg: Any) -> PeftModel:
    from axolotl.loaders import load_adapter

    with warnings.catch_warnings():
        # peft would continue with newly initialized weights in place of those that are missing.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            policy, _ = load_adapter(model, cfg, cfg.adapter)
        except UserWarning as warning:
            raise ValueError(
                f"`lora_model_dir: {cfg.lora_model_dir}` does not hold the weights that its "
                f"adapter_config.json asks for on `base_model: {cfg.base_model}`: {warning}"
            ) from None
    assert isinstance(policy, PeftModel)
    saved: Any = policy.peft_config[POLICY_ADAPTER]
    LOG.info(
        "the policy begins as the adapter %s: r %s, alpha %s, on %s",
        cfg.lora_model_dir,
        saved.r,
        saved.lora_alpha,
        saved.target_modules,
    )
    _warn_of_another_base(cfg.lora_model_dir, saved.base_model_name_or_path, cfg.base_model)
    return policy


def _warn_of_another_base(adapter: Any, trained_on: str | None, base_model: str) -> None:
    """The base model is the reference, or a part of it."""
    if trained_on not in (None, base_model):
        LOG.warning(
            "the adapter %s was trained on %s, and base_model is %s",
            *(adapter, trained_on, base_model),
        )


def refuse_another_start(checkpoint: Path, arguments: Any) -> None:
    """Checks that a resumed run keeps its reference, which may have another path by now.

    Args:
        checkpoint: the checkpoint from which the run is resumed.
        arguments: the training arguments of the resumed run.

    Raises:
        ValueError: if the run of the checkpoint started from another adapter than this one.
    """
    cfg = PluginManager.get_instance().cfg
    if cfg is not None and (saved := saved_adapter_config(checkpoint.absolute())):
        _warn_of_another_base(checkpoint, saved.get("base_model_name_or_path"), cfg.base_model)
    before, start = start_adapter(checkpoint) or "", arguments.aot_start_adapter
    if before and start:
        check_start(checkpoint, start)
    # If the digests are not known, they are None and "", which differ.
    same_weights = start_digest(checkpoint) == arguments.aot_start_digest
    if before != start and not same_weights:
        raise ValueError(
            f"the run of {checkpoint} began with "
            f"{f'`lora_model_dir: {before}`' if before else 'no `lora_model_dir`'}, which is its "
            f"reference, and this config says {f'`{start}`' if start else 'none'}; write the same, "
            "or start a new run"
        )


def settle_reference(policy: nn.Module, evaluating: bool) -> None:
    """Corrects TRL's frozen copy of the adapter, so that it is the reference. Call before training.

    TRL copies weights whose names contain ``.default.``. Adapters of embeddings are missed, since
    their names end there. And after the copy TRL casts the policy's adapter on quantized weights.

    Args:
        policy: the policy.
        evaluating: True if a saved adapter is evaluated, not trained further. Its reference is then
            what it was trained against: the adapter from which its training started, or the base
            model.
    """
    if not isinstance(policy, PeftModel):
        return
    cfg = PluginManager.get_instance().cfg
    if cfg is not None and cfg.lora_fp32_gradients and not cfg.deepspeed:
        from axolotl.utils.lora_precision import upcast_lora_parameters

        upcast_lora_parameters(policy)  # TRL has cast them to bfloat16 on quantized weights
    if REFERENCE_ADAPTER not in policy.peft_config:
        return
    if not evaluating:
        copy_adapter(policy)
        LOG.info("the reference is the base model with a frozen copy of that adapter")
        return
    policy.delete_adapter(REFERENCE_ADAPTER)
    saved = Path(cfg.lora_model_dir)
    start = start_adapter(saved)
    if find_arguments(saved)[0] is None:
        LOG.warning(
            "%s has no %s beside it, so nothing says whether its training began with another "
            "adapter; it is measured against the base model",
            saved,
            ARGUMENTS,
        )
    if start:
        check_start(saved, start)
        policy.load_adapter(start, REFERENCE_ADAPTER, is_trainable=False)
        policy.set_adapter(POLICY_ADAPTER)
    LOG.info("the reference is the base model%s", f" with the adapter {start}" if start else "")


@torch.no_grad()
def copy_adapter(policy: PeftModel) -> None:
    """Copies the current values and dtypes of the policy's adapter to the frozen copy."""
    parameters = dict(policy.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        parts = name.split(".")
        if POLICY_ADAPTER not in parts:
            continue
        frozen = parameters[".".join(_renamed(parts))]
        frozen.data = parameter.detach().clone()
        frozen.requires_grad_(False)


def _renamed(parts: list[str]) -> list[str]:
    return [REFERENCE_ADAPTER if part == POLICY_ADAPTER else part for part in parts]


def save_adapter_only(policy: Any, arguments: Any) -> None:
    """Makes every later save of the model write only the trained adapter.

    This includes the adapter's ``modules_to_save``.

    peft would save the frozen copy as well. And the host keeps the base model that it loaded, into
    which TRL has inserted its adapter. It saves that model to ``output_dir`` at the end, after an
    interrupt and when it fixes untrained tokens: all base weights, under names that no loader
    knows. There is no hook for that. So ``save_pretrained`` of both models is replaced, which all
    of these call. The training arguments are saved with the adapter, as in a checkpoint: they say
    what it was trained against.
    """
    if not isinstance(policy, PeftModel):
        return
    base: Any = policy.get_base_model()

    def save(*args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("selected_adapters", [POLICY_ADAPTER])
        type(policy).save_pretrained(policy, *args, **kwargs)
        if arguments.should_save:
            folder = args[0] if args else kwargs["save_directory"]
            torch.save(arguments, Path(folder) / ARGUMENTS)

    def save_base(*args: Any, **kwargs: Any) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            save(*args, **kwargs)
        else:  # merged in the meantime
            type(base).save_pretrained(base, *args, **kwargs)

    both: tuple[tuple[Any, Any], ...] = ((policy, save), (base, save_base))
    for model, function in both:
        model.save_pretrained = function
