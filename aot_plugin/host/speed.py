"""Which of the features that make a step faster are on in a run, and why the others are not."""

from typing import Any

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from ..ot.losses import PairedLogps
from ..scoring.model_head import why_head_is_not_chunked
from ..scoring.settle import Settled
from ..step.budget import Permits, gradients_that_fit, graphs_come_first


def why_graph_is_not_kept(trainer: Any) -> str | None:
    """What forbids to score a micro-batch with gradient, so that it needs no second forward pass;
    None if nothing does.

    A wrapper forbids it if every backward pass must follow its forward pass (ZeRO-3, FSDP), and so
    does a training step of the host's that offloads activations.
    """
    args: Any = trainer.args
    if getattr(args, "activation_offloading", False):
        return "`activation_offloading` is on"
    # FSDP2 changes the model itself, so there is no wrapper to see.
    if getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP gathers weights in the order of the passes"
    if trainer.model_wrapped is trainer.model:
        return None
    if getattr(trainer, "is_deepspeed_enabled", False):
        # ZeRO-1 and 2 do all their work in backward passes, one for each output of the wrapper.
        sharded = trainer.model_wrapped.zero_optimization_stage() == 3
        return "ZeRO-3 gathers weights in the order of the passes" if sharded else None
    if args.torch_compile:
        return "`torch_compile` is on"
    wrapper = in_ddp(trainer)
    if wrapper is None:
        return f"the model is wrapped in {type(trainer.model_wrapped).__name__}"
    return "`ddp_static_graph` counts the model's passes" if wrapper.static_graph else None


def in_ddp(trainer: Trainer) -> DistributedDataParallel | None:
    """The DDP wrapper, if that is all that is around the model."""
    wrapper = trainer.model_wrapped
    if isinstance(wrapper, DistributedDataParallel) and wrapper.module is trainer.model:
        return wrapper
    return None


def permits(trainer: Trainer) -> Permits:
    """What this run's wrapper and settings allow a step to do."""
    return Permits(
        why_graph_is_not_kept(trainer),
        why_gradients_are_not_held(trainer),
        synchronizes=in_ddp(trainer) is not None,
        may_retry=may_retry(trainer),
    )


def may_retry(trainer: Any) -> bool:
    """Whether this rank may cut what does not fit into its memory.

    Not where weights are sharded, since all ranks must make the same passes; with offloading, which
    keeps count of what a failed pass has saved; in a random network, where a second pass is another
    network; and if the optimizer updates weights in each backward pass.
    """
    args: Any = trainer.args
    sharded = getattr(trainer, "is_deepspeed_enabled", False) or trainer.is_fsdp_enabled
    offloads = getattr(args, "activation_offloading", False)
    return not (sharded or offloads or trainer._is_random or "layerwise" in str(args.optim))


def why_gradients_are_not_held(trainer: Any) -> str | None:
    """What forbids to take the gradient of a row's score along with the score, so that the row
    needs no second forward pass; None if nothing does."""
    args: Any = trainer.args
    if args.aot_sft_weight and trainer._step_class is PairedLogps:
        return "with `aot_sft_weight` the loss depends on more than a pair's margin"
    if args.aot_score == "mean" and trainer._step_class is PairedLogps:
        return "with `aot_score: mean` the loss depends on more than a pair's margin"
    if args.per_device_train_batch_size > 1:
        return "`micro_batch_size` is not 1"
    if why := why_no_gradient_aside(trainer):
        return why
    if gradients_that_fit(trainer.model) == 0:
        return "full fine-tuning" if not _has_adapter(trainer.model) else "the adapter is too large"
    return None


def why_no_gradient_aside(trainer: Any) -> str | None:
    """What forbids to take a gradient that is not added to the step's; None if nothing does.

    In fp16 it would lack the scale of the loss; reentrant checkpointing can't give a gradient
    without adding it.
    """
    args: Any = trainer.args
    checkpointing = args.gradient_checkpointing_kwargs or {}
    if why := why_graph_is_not_kept(trainer):
        return why
    if getattr(trainer, "is_deepspeed_enabled", False):
        return "DeepSpeed takes every gradient of its model for one of the step's"
    if args.fp16:
        return "`fp16` is on"
    if args.gradient_checkpointing and checkpointing.get("use_reentrant") is not False:
        return "`gradient_checkpointing_kwargs: {use_reentrant: false}` is missing"
    return None


def _has_adapter(model: Any) -> bool:
    return getattr(model, "peft_config", None) is not None


def speed_features(trainer: Trainer, settled: Settled) -> str:
    """All features, for the log: those that are on, and those that are off with the reason."""
    args: Any = trainer.args
    model: Any = trainer.model
    alone = None
    if args.aot_batch == "micro_batch":
        alone = "`aot_batch: micro_batch` takes one pass anyway"
    elif args.gradient_accumulation_steps == 1:
        alone = "a step of one micro-batch takes one pass anyway"
    why_not_held = alone or why_gradients_are_not_held(trainer)
    held, steps = "held gradients", args.gradient_accumulation_steps
    fit = 0 if why_not_held else gradients_that_fit(model)
    if 0 < fit < steps:
        held += f" of {fit} of {steps} micro-batches"
    all_held = None
    if fit >= steps and not graphs_come_first(args.device):
        all_held = "the gradients of all micro-batches are held"
    reasons = {
        "shared prompts": settled.why_not_shared,
        "packed rows": settled.why_not_packed,
        held: why_not_held,
        "kept graphs": alone or all_held or why_graph_is_not_kept(trainer),
        "chunked LM head": why_head_is_not_chunked(model.get_output_embeddings()),
    }
    return "; ".join(
        f"{name} on" if why is None else f"{name} off ({why})" for name, why in reasons.items()
    )
