"""Checks before the first step, on the scores of its first rows.

Two things must hold. Scoring and differentiating a step must see the same network; and before the
first step policy and reference must agree. Many things can break either (functional dropout, router
jitter, adapters that change the base model, another rope, added tokens), so the checks look at
behaviour: the rows are scored again, and a difference larger than rounding is refused.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..scoring.model_input import Batch
from ..scoring.scorer import Scorer
from ..step.engine import MicroBatch

TIMES_NOISE = 5
"""Times the measured rounding that two computations of the same number may differ."""

ROUNDING = 1 / 4
"""Lower bound of a token's rounding, in units of the dtype's eps: repeated passes of the same
kernels may agree to the bit, while the reference may be computed by other kernels."""

NEGLIGIBLE = 1e-3
"""Differences up to this many nats are never refused: their effect on a loss is negligible.
(Embeddings of new tokens are drawn separately for each loaded model, close to their mean.)"""

WIDER = 8
"""Columns of padding that are added for another layout."""


@dataclass(frozen=True)
class FirstScores:
    """The policy's log-probabilities of the first rows, each [sequences] float32, in nats.

    Attributes:
        scores: as the step will see them.
        again: the same rows with the random generators in the same state: what differs is noise.
        other: with the generators in another state.
        elsewhere: in another layout (more padding, prompts not shared), with the output of every
            module rounded at random: what differs is rounding.
        tokens: completion tokens of each sequence, [sequences].
        eps: of the coarsest floating-point type that takes part.
    """

    scores: Tensor
    again: Tensor
    other: Tensor
    elsewhere: Tensor
    tokens: Tensor
    eps: float


@dataclass(frozen=True)
class Difference:
    """The sequence on which two scores are furthest apart, compared with what rounding may do."""

    nats: float
    rounding: float
    tokens: float

    @classmethod
    def between(cls, a: Tensor, b: Tensor, noise: Tensor, tokens: Tensor, eps: float) -> Any:
        """Args: ``a``, ``b``, ``noise`` and ``tokens`` [sequences].

        Roundings of tokens have no common sign, so those of a sequence grow with the root of its
        length; a sum itself is known to float32's resolution.
        """
        tokens = tokens.clamp(min=1)
        per_token = (noise.double().square() / tokens).mean().sqrt().clamp(min=eps * ROUNDING)
        resolution = torch.finfo(torch.float32).eps * a.double().abs()
        rounding = TIMES_NOISE * (per_token * tokens.sqrt() + resolution) + NEGLIGIBLE
        difference = (a.double() - b.double()).abs()
        worst = int((difference / rounding).nan_to_num(0.0).argmax())
        return cls(difference[worst].item(), rounding[worst].item(), tokens[worst].item())

    @property
    def excess(self) -> float:
        """In units of what rounding may do; 0 for NaN, which the step itself refuses."""
        return self.nats / self.rounding if self.nats == self.nats else 0.0

    def __bool__(self) -> bool:
        """Whether it is more than rounding."""
        return self.excess > 1

    def __str__(self) -> str:
        return (
            f"{self.nats:.3g} nats on a completion of {self.tokens:.0f} tokens (rounding explains "
            f"{self.rounding:.2g})"
        )


def first_scores(
    policy: Callable[[Batch], Tensor],
    policy_elsewhere: Callable[[Batch], Tensor],
    batch: Batch,
    model: nn.Module,
    half: torch.dtype | None,
    widest: int | None = None,
) -> FirstScores:
    """Scores the batch in four passes; the random generators stay as they were.

    Args:
        policy: scores a batch as the step does.
        policy_elsewhere: does it without sharing prompts.
        batch: ``input_ids``, ``attention_mask``, ``completion_mask``, each [sequences, width].
        model: the policy, for its dtypes and its longest row.
        half: autocast's dtype.
        widest: tokens of the widest row that the model may be given; None if there is no limit.
    """
    device = batch["input_ids"].device
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtypes |= {half} if half else set()

    eps = max(torch.finfo(dtype).eps for dtype in dtypes)

    def seeded(score: Callable[[Batch], Tensor], batch: Batch, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return score(batch)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # The first pass of all may be more than one: how the model takes its rows is settled there.
        other = seeded(policy, batch, 1)
        scores, again = (seeded(policy, batch, 0) for _ in range(2))
        with _random_rounding(model, eps):
            elsewhere = seeded(policy_elsewhere, _wider(batch, _longest(model), widest), 0)
    tokens = batch["completion_mask"][:, 1:].sum(dim=1)
    return FirstScores(scores, again, other, elsewhere, tokens, eps)


@contextmanager
def _random_rounding(model: Any, eps: float) -> Iterator[None]:
    """Shifts the output of every module by up to a unit in the last place: another order of
    summation, or another kernel, does it no more harm."""

    def shift(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        units = 2 * torch.rand_like(output, dtype=torch.float32) - 1
        return (output * (1 + eps * units)).to(output.dtype)

    # The output of the head may be what stands in place of its logits.
    head = model.get_output_embeddings()
    leaves = (m for m in model.modules() if not any(m.children()) and m is not head)
    hooks = [module.register_forward_hook(shift) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_inexact(trainer: Any) -> None:
    """Raises ValueError for what is known, before any row is scored, not to be exact over a step.

    Args:
        trainer: one of ours, constructed.
    """
    if trainer._is_vision_dataset:
        raise ValueError("`rl: aot` trains on text; the data set has an image column")
    model, whole_step = trainer.model, trainer.args.aot_batch == "step"
    random = (
        "the network is random: {}, and the scores of a step and its gradient would come from two "
        "different networks; {}"
    )
    # Of a fresh adapter, whose output is 0, no score would show it.
    dropout = (n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p)
    if whole_step and (name := next(dropout, None)):
        raise ValueError(random.format(f"the dropout {name!r} is on", "set it to 0"))
    # One chance in twenty to leave out a layer is likely to pass the first micro-batch.
    if whole_step and (layerdrop := getattr(model.config, "layerdrop", None)):
        advice = "write `overrides_of_model_config: {layerdrop: 0.0}`"
        raise ValueError(random.format(f"`layerdrop: {layerdrop}` leaves out whole layers", advice))
    if trainer.aux_loss_enabled:
        raise ValueError(
            "the mixture-of-experts auxiliary loss (coefficient "
            f"{trainer.router_aux_loss_coef}) is a mean over micro-batches and can't be exact over "
            "a step; write `overrides_of_model_config: {router_aux_loss_coef: 0.0}`"
        )


def check_start(
    scorer: Scorer,
    batch: MicroBatch,
    model: nn.Module,
    settings: Any,
    *,
    several: bool,
    resumed: bool,
    widest: int | None,
    gather: Callable[[Tensor], Tensor],
) -> None:
    """Refuses a random network and a wrong reference, on every rank at once.

    Args:
        batch: the first micro-batch.
        model: the policy, not wrapped.
        settings: the training arguments.
        several: whether a step scores its rows in one pass and differentiates them in another.
        resumed: the policy has left its reference already.
        widest: tokens of the widest row that the model may be given; None if there is no limit.
        gather: numbers of this rank, [1, k] -> those of all ranks, [ranks, k].

    Raises:
        ValueError: naming what looks guilty.
    """
    half = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None
    first = first_scores(scorer.logps, scorer.logps_apart, batch.inputs, model, half, widest)

    def worst_of_ranks(found: Difference) -> Difference:
        numbers = torch.tensor([[*astuple(found)]], device=settings.device)
        ranks = (Difference(*rank) for rank in gather(numbers).tolist())
        return max(ranks, key=lambda found: found.excess)

    found = worst_of_ranks(randomness(first))
    if found and several:
        raise ValueError(random_network(found, model, settings))
    if resumed:
        return
    found = worst_of_ranks(reference_error(first, batch.reference_logps(scorer)))
    if found:
        raise ValueError(wrong_reference(found, model, settings))


def some_weights(model: nn.Module) -> list[Tensor]:
    """A copy of the first few elements of each trainable parameter."""
    parameters = (p.detach() for p in model.parameters() if p.requires_grad)
    return [p.reshape(-1)[:64].clone() for p in parameters if not isinstance(p, DTensor)]


def refuse_updates_within_a_step(before: list[Tensor], model: nn.Module) -> None:
    """Raises ValueError if the weights are others than those that the step was scored with."""
    pairs = zip(before, some_weights(model), strict=True)
    # ZeRO-3 leaves some parameters empty between passes.
    if any(a.shape == b.shape and not torch.equal(a, b) for a, b in pairs):
        raise ValueError(
            "the weights changed between two micro-batches of one step: this `optimizer` updates "
            "them in the backward pass, so a step over several micro-batches can't be exact; write "
            "another one, or `gradient_accumulation_steps: 1`"
        )


def randomness(first: FirstScores) -> Difference:
    """Between two scores of the same rows by the same network."""
    noise = first.scores - first.again
    return Difference.between(first.scores, first.other, noise, first.tokens, first.eps)


def reference_error(first: FirstScores, reference: Tensor) -> Difference:
    """Between policy and reference before the first step. ``reference``: [sequences]."""
    # Where randomness is allowed, it is part of the noise.
    noise = torch.maximum(
        (first.scores - first.elsewhere).abs(), (first.scores - first.other).abs()
    )
    return Difference.between(first.scores, reference, noise, first.tokens, first.eps)


def random_network(found: Difference, model: nn.Module, settings: Any) -> str:
    """What to say of ``randomness``. ``model`` is the policy, ``settings`` the training
    arguments."""
    suspects = _random_suspects(model, settings)
    advice = f"set to 0: {', '.join(suspects)}" if suspects else "no known key is the cause"
    return (
        f"the network is random: the same rows scored twice differ by {found}, and the scores of a "
        f"step and its gradient would come from two different networks; {advice}. Keys of the "
        "model's config go under `overrides_of_model_config`; `aot_batch: micro_batch` scores and "
        "differentiates in one pass and may keep them"
    )


def wrong_reference(found: Difference, model: nn.Module, settings: Any) -> str:
    """What to say of ``reference_error``; arguments as above."""
    advice = "look at what changes one of the two models after loading"
    if settings.precompute_ref_log_probs:
        advice = f"remove the cached log-probabilities in {settings.aot_reference_folder!r}"
    for config in getattr(model, "peft_config", {}).values():
        init = getattr(config, "init_lora_weights", True)
        if init not in (True, "gaussian"):
            advice = (
                f"remove `peft_init_lora_weights: {init}`, if it changes the base model, which "
            )
            advice += "is the reference"
    return (
        "before the first step the policy must be the reference, but their log-probabilities of "
        f"the first rows differ by {found}; {advice}"
    )


def _random_suspects(model: nn.Module, settings: Any) -> list[str]:
    """What may make the network random, as ``key: value``."""
    config = getattr(model, "config", None)
    found = {} if config is None else dict(_numbers(config.to_dict()))
    found["neftune_noise_alpha"] = getattr(settings, "neftune_noise_alpha", None) or 0
    named = [f"`{k}: {v}`" for k, v in found.items() if v and _RANDOM.search(k.lower())]
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return [*named, f"the dropout {name!r} ({module.p})"]
    return named


_RANDOM = re.compile("drop|jitter|noise")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def _longest(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    config = config.get_text_config() if config is not None else None
    return getattr(config, "max_position_embeddings", None)


def _wider(batch: Batch, *limits: int | None) -> Batch:
    """The batch with more padding, as far as positions and the run's rows reach."""
    names = ("input_ids", "attention_mask", "completion_mask")
    room = [limit - batch["input_ids"].shape[1] for limit in limits if limit is not None]
    more = max(min(WIDER, *room), 0) if room else WIDER
    return {name: F.pad(batch[name], (0, more)) for name in names}
