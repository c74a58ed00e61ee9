"""The work of an optimizer step in figures that no noise touches: forward passes, and the tokens
that they take.

A pass takes rows x width tokens of the model's input, padding included. A forward pass with its
backward pass counts as the forward pass, and what gradient checkpointing computes again does not
count: both are the same for everybody. The *limit* is one pass of the policy per micro-batch, and
one of the reference unless its log-probabilities are cached, in which each distinct prompt stands
once, each completion once, and no padding.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch


class Forward(NamedTuple):
    """A forward pass: of "policy" or "reference", with gradient or not, on [rows, width] tokens."""

    model: str
    gradient: bool
    rows: int
    width: int


@contextlib.contextmanager
def watched_passes(trainer: Any) -> Iterator[list[Forward]]:
    """Yields a list to which each forward pass of a trainer's models is appended.

    The hook sits on the decoder below the LM head, because TRL's chunked path calls that.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    policy = trainer.accelerator.unwrap_model(trainer.model)
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    found: list[Forward] = []

    def watch(model: Any, reference: bool) -> Any:
        def count(decoder: Any, args: Any, kwargs: Any) -> None:
            off = any(layer.disable_adapters for layer in layers)
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            name = "reference" if reference or off else "policy"
            found.append(Forward(name, torch.is_grad_enabled(), *ids.shape))

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return base.get_decoder().register_forward_pre_hook(count, with_kwargs=True)

    with contextlib.ExitStack() as stack:
        stack.callback(watch(policy, False).remove)
        if trainer.ref_model is not None:
            unwrapped = trainer.accelerator.unwrap_model(trainer.ref_model)
            stack.callback(watch(unwrapped, True).remove)
        yield found


def fewest_tokens(batches: Iterable[dict[str, Any]]) -> int:
    """Tokens of the rows of some collated batches: each distinct prompt and each completion once.

    A row's prompt is what stands before its first completion token.
    """
    prompts, completions = set(), 0
    for batch in batches:
        columns = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
        for ids, attention, completion in zip(*columns, strict=True):
            kept = attention.bool()
            ids, completion = ids[kept], completion[kept]
            first = int(completion.argmax())
            prompts.add(tuple(ids[:first].tolist()))
            completions += len(ids) - first
    return sum(map(len, prompts)) + completions


def figures(passes: Iterable[Forward]) -> dict[str, int]:
    """Tokens over all passes, and passes of each model."""
    passes = list(passes)
    return {
        "tokens": sum(taken.rows * taken.width for taken in passes),
        "policy": sum(taken.model == "policy" for taken in passes),
        "reference": sum(taken.model == "reference" for taken in passes),
    }
