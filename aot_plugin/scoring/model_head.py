"""Whether a model's logits can be computed in chunks of tokens, examined once per model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .lm_head import Head, linear_head, module_head
from .model_input import ModelInput
from .tail import IDENTITY, Tail, fitted_tail, known_logits

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Examined:
    """What is known of a model and its LM head.

    Attributes:
        vocabulary: logits that the model gives a token.
        tail: what it does to what the LM head gives.
        why_not_chunked: what keeps all logits of a micro-batch's completion tokens in memory at
            once; None if they exist for a chunk of tokens at a time. ``tail`` is void otherwise.
    """

    vocabulary: int
    tail: Tail = IDENTITY
    why_not_chunked: str | None = None


def examined(model: nn.Module, head: nn.Module, inputs: ModelInput) -> Examined:
    """Examines the model on first use, in one forward pass of the first tokens of these rows. All
    ranks make this pass and come to the same result."""
    if not hasattr(head, _EXAMINED):
        setattr(head, _EXAMINED, _examine(model, head, inputs.input_ids[:1, :8]))
    return getattr(head, _EXAMINED)


def vocabulary(model: nn.Module, head: nn.Module, inputs: ModelInput) -> int:
    """Tokens that the model gives logits for."""
    return examined(model, head, inputs).vocabulary


def why_head_is_not_chunked(head: nn.Module) -> str | None:
    """What keeps all logits of a micro-batch's completion tokens in memory at once; None if they
    exist for a chunk of tokens at a time. Known after the model's first forward pass."""
    found: Examined | None = getattr(head, _EXAMINED, None)
    return None if found is None else found.why_not_chunked


def chunk_no_more(head: nn.Module, why: str) -> None:
    """Switches chunks off for the rest of the run. To be called on all ranks."""
    found: Examined = getattr(head, _EXAMINED)
    setattr(head, _EXAMINED, replace(found, why_not_chunked=why))


def chunkable_head(head: nn.Module, forward: Forward, found: Examined) -> Head:
    """The LM head with its current weights, to be called inside the hooks that gather them.

    Args:
        forward: the head's own forward pass, which another function replaces at the moment.
    """
    if _is_linear(head, forward):
        assert isinstance(head, nn.Linear)
        return linear_head(head.weight, head.bias, found.tail)
    return module_head(head, forward, found.vocabulary, found.tail)


@contextmanager
def replaced_forward(head: nn.Module, forward: Forward) -> Iterator[None]:
    """Replaces what the head computes. Its hooks, where DeepSpeed and FSDP gather weights, stay."""
    exchanged = vars(head).get("forward")  # by another package
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if exchanged is not None:
            head.forward = exchanged


_EXAMINED = "_aot_plugin_examined"


@torch.no_grad()
def _examine(model: nn.Module, head: nn.Module, ids: Tensor) -> Examined:
    """Replaces the head's logits by known ones, and looks at what the model returns for them."""
    forward: Forward = head.forward
    given: list[Tensor] = []
    own = set(head.parameters())
    foreign: list[Tensor] = []

    def give_known_logits(hidden: Tensor) -> Tensor:
        with torch.enable_grad():
            logits = forward(hidden)
        foreign.extend(p for p in parameters_behind(logits.grad_fn) if p not in own)
        given.append(known_logits(logits.detach()))
        return given[-1].clone()  # the model may change it in place

    with replaced_forward(head, give_known_logits):
        returned = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    width = returned.shape[-1]
    if len(given) != 1 or given[0].shape[:-1] != ids.shape:
        return Examined(width, why_not_chunked="the model does not call its LM head once per token")
    tail = fitted_tail(given[0], returned)
    if tail is None:
        why = "what the model does to its logits is neither scaling nor soft-capping"
        return Examined(width, why_not_chunked=why)
    if _is_linear(head, forward):
        return Examined(width, tail)
    if foreign:  # chunks give gradients to the head's own parameters only
        return Examined(width, why_not_chunked="the LM head uses trained weights of another module")
    return Examined(width, tail, _why_not(model, head))


def parameters_behind(node: Any, ends: Iterable[Any] = ()) -> Iterator[Tensor]:
    """The parameters that paths of a graph lead to from ``node``, other than over ``ends``."""
    todo, seen = [node], {None, *ends}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            todo.extend(before for before, _ in node.next_functions)


def _is_linear(head: nn.Module, forward: Forward) -> bool:
    """Whether the head does nothing but multiply by its weight and add its bias."""
    return type(head) is nn.Linear and getattr(forward, "__func__", None) is nn.Linear.forward


def _why_not(model: nn.Module, head: nn.Module) -> str | None:
    """Why a head that is not a plain linear layer can't be called on chunks; None if it can."""
    name = f"{type(head).__module__.split('.')[0]} {type(head).__name__}"
    if any(isinstance(part, _DropoutNd) and part.p > 0 for part in head.modules()):
        return f"the LM head is a {name} with dropout"
    # The weights of its parts are gathered each time that one is called, by all ranks together,
    # and a rank with more completion tokens would call them more often.
    if any(True for _ in head.children()) and is_sharded(model):
        return f"the LM head is a {name} whose parts are sharded"
    return None


def is_sharded(model: nn.Module) -> bool:
    """By ZeRO-3, FSDP2 or FSDP1."""

    def is_shard(parameter: Any) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "placements")

    return any(map(is_shard, model.parameters())) or any(
        hasattr(module, "_fsdp_wrapped_module") for module in model.modules()
    )
