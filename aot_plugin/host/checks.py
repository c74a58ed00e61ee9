"""Checks before the first step, on the scores of its first rows.

Two things must hold. Scoring and differentiating a step must use the same network; and before the
first step policy and reference must agree. Many things can break either (functional dropout, router
jitter, adapters that change the base model, another RoPE, added tokens). So the checks compare
behaviour: the rows are scored again, and a difference larger than rounding is refused.

In a resumed run the policy has been trained. There the reference is compared with what it said at
the beginning, of random rows, which each checkpoint holds (``save_reference``).
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..files import write_atomically
from ..ot.losses import LOSSES
from ..scoring.gradients import gradient_error
from ..scoring.model_input import FIELDS, MORE, Batch
from ..scoring.probe import batch_of, probe_rows, rounding_error
from ..scoring.scorer import Scorer, free_memory
from ..step.engine import MicroBatch

LOG = get_logger("axolotl.aot_plugin.checks")

TIMES_NOISE = 5
"""How many times the measured rounding two computations of the same number may differ."""

ROUNDING = 1 / 4
"""Lower bound of a token's rounding, in units of the dtype's eps: repeated passes of the same
kernels may agree to the bit, while the reference may be computed by other kernels."""

NEGLIGIBLE = 1e-3
"""Differences up to this many nats are never refused: their effect on a loss is negligible.
(Embeddings of new tokens are drawn separately for each loaded model, close to their mean.)"""

SAVED_REFERENCE = "aot_reference.json"
"""File of a checkpoint with the reference's log-probabilities of random rows."""

RANDOM_TOKENS = 64
"""Length of the longest of them."""

NEWEST_TOKENS = 16
"""Number of tokens with the highest ids, which have a row of their own: there are those with which
the run extends the vocabulary, whose embeddings the host draws at random."""

WIDER = 8
"""Columns of padding that are added to get another layout."""


@dataclass(frozen=True)
class FirstScores:
    """The policy's log-probabilities of the first rows, each [sequences] float32, in nats.

    Attributes:
        scores: as the step computes them.
        again: with the random generators in the same state; any difference is noise.
        other: with the random generators in another state.
        elsewhere: in another layout (more padding unless there are images, prompts not shared),
            with the output of every module perturbed at random; any difference is rounding.
        tokens: numbers of completion tokens, [sequences].
        eps: machine epsilon of the coarsest floating-point type in use.
    """

    scores: Tensor
    again: Tensor
    other: Tensor
    elsewhere: Tensor
    tokens: Tensor
    eps: float


@dataclass(frozen=True)
class Difference:
    """The largest difference of two scores of a sequence, relative to what rounding explains.

    Attributes:
        nats: the difference.
        rounding: the difference that rounding explains, in nats.
        tokens: number of completion tokens of the sequence.
    """

    nats: float
    rounding: float
    tokens: float

    @classmethod
    def between(cls, a: Tensor, b: Tensor, noise: Tensor, tokens: Tensor, eps: float) -> Any:
        """Compares two scores of each sequence.

        The rounding errors of tokens have no common sign, so that of a sequence grows with the
        square root of its length. The sum itself has the resolution of float32.

        Args:
            a, b: the scores, [sequences].
            noise: differences due to rounding (and to randomness, if allowed), [sequences].
            tokens: numbers of completion tokens, [sequences].
            eps: machine epsilon of the coarsest floating-point type in use.
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
        """The difference in units of ``rounding``; 0 for NaN, which the step itself refuses."""
        return self.nats / self.rounding if self.nats == self.nats else 0.0

    def __bool__(self) -> bool:
        """Whether the difference is larger than rounding explains."""
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
    """Scores the batch in four passes. The state of the random generators is preserved.

    Args:
        policy: scores a batch as the step does.
        policy_elsewhere: scores a batch without sharing prompts.
        batch: ``input_ids``, ``attention_mask``, ``completion_mask``, each [sequences, width].
        model: the policy, for its dtypes and its number of positions.
        half: autocast's dtype.
        widest: number of tokens of the widest row in the run; None if there is no limit.
    """
    device = batch["input_ids"].device
    eps = _coarsest_eps(model, half)

    def seeded(score: Callable[[Batch], Tensor], batch: Batch, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return score(batch)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # The very first call may run several forward passes, since it decides the layout.
        other = seeded(policy, batch, 1)
        scores, again = (seeded(policy, batch, 0) for _ in range(2))
        with _random_rounding(model, eps):
            elsewhere = seeded(policy_elsewhere, _wider(batch, _longest(model), widest), 0)
    tokens = batch["completion_mask"][:, 1:].bool().sum(dim=1)
    return FirstScores(scores, again, other, elsewhere, tokens, eps)


def _coarsest_eps(model: nn.Module, half: torch.dtype | None) -> float:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtypes |= {half} if half else set()
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _half(settings: Any) -> torch.dtype | None:
    """Autocast's dtype."""
    return torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None


@contextmanager
def _random_rounding(model: Any, eps: float) -> Iterator[None]:
    """Shifts the output of every module by up to one unit in the last place.

    Another order of summation, or another kernel, changes it by no more than that.
    """

    def shift(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        units = 2 * torch.rand_like(output, dtype=torch.float32) - 1
        return (output * (1 + eps * units)).to(output.dtype)

    # The output of the head may be a stand-in for its logits.
    head = model.get_output_embeddings()
    leaves = (m for m in model.modules() if not any(m.children()) and m is not head)
    hooks = [module.register_forward_hook(shift) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_inexact(trainer: Any) -> None:
    """Raises ValueError for settings that are known not to be exact, before any row is scored.

    Args:
        trainer: one of our trainers, after its construction.
    """
    model, whole_step = trainer.model, trainer.args.aot_batch == "step"
    if whole_step and (part := random_part(model)):
        what, advice = part
        raise ValueError(
            f"the network is random: {what}, and the scores of a step and its gradient would come "
            f"from two different networks; {advice}"
        )
    if trainer.aux_loss_enabled:
        raise ValueError(
            "the mixture-of-experts auxiliary loss (coefficient "
            f"{trainer.router_aux_loss_coef}) is a mean over micro-batches and can't be exact over "
            "a step; write `overrides_of_model_config: {router_aux_loss_coef: 0.0}`"
        )


def warn_of_unread_options(args: Any, weighted: bool) -> None:
    """Says what a loss of another package must read itself, since only it knows whether it does.

    Args:
        args: the training arguments.
        weighted: whether the rows have weights.
    """
    if args.aot_loss in LOSSES:
        return
    asked = {
        "`field_weight`, as `step.u_mass` and `step.v_mass`": weighted,
        f"`aot_order: {args.aot_order}`, as `options.order`": args.aot_order != "first",
        f"`aot_sort: {args.aot_sort}`, as `options.sort`": args.aot_sort != "hard",
        "`aot_label_smoothing`, as `options.label_smoothing`": args.aot_label_smoothing,
    }
    if unread := [key for key, holds in asked.items() if holds]:
        LOG.warning(
            "`aot_loss: %s` is of another package: it must read %s; if it does not, the run trains "
            "without (docs/extending.md)",
            args.aot_loss,
            ", and ".join(unread),
        )


def random_part(model: Any) -> tuple[str, str] | None:
    """What is known to make the policy random although its first scores may not show it, and what
    to do about it; None if nothing is."""
    # The output of a new adapter is 0, so dropout in it does not change any score.
    dropout = (n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p)
    if name := next(dropout, None):
        return f"the dropout {name!r} is on", "set it to 0"
    # Layers that are skipped with a probability of 1/20, say, are likely to go unnoticed in the
    # first micro-batch.
    if layerdrop := getattr(getattr(model, "config", None), "layerdrop", None):
        what = f"`layerdrop: {layerdrop}` leaves out whole layers"
        return what, "write `overrides_of_model_config: {layerdrop: 0.0}`"
    return None


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
) -> bool:
    """Refuses a random network and a wrong reference, on all ranks together.

    Args:
        scorer: scores batches under policy and reference.
        batch: the first micro-batch.
        model: the unwrapped policy.
        settings: the training arguments.
        several: True if a step scores its rows in one pass and differentiates them in another.
        resumed: True if the policy already differs from its reference.
        widest: number of tokens of the widest row in the run; None if there is no limit.
        gather: maps numbers of this rank, [1, k], to those of all ranks, [ranks, k].

    Returns:
        True if the network is random, which is refused only if ``several``.

    Raises:
        ValueError: naming the likely cause.
    """
    score, elsewhere = scorer.logps, scorer.logps_apart
    first = first_scores(score, elsewhere, batch.inputs, model, _half(settings), widest)
    found = _worst(randomness(first), settings, gather)
    if found and several:
        raise ValueError(random_network(found, model, settings))
    is_random = bool(found) or random_part(model) is not None
    if resumed:
        return is_random
    found = _worst(reference_error(first, batch.reference_logps(scorer)), settings, gather)
    if found:
        raise ValueError(wrong_reference(found, model, settings))
    return is_random


def _worst(found: Difference, settings: Any, gather: Callable[[Tensor], Tensor]) -> Difference:
    """Of all ranks."""
    numbers = torch.tensor([[*astuple(found)]], device=settings.device)
    ranks = (Difference(*rank) for rank in gather(numbers).tolist())
    return max(ranks, key=lambda found: found.excess)


def reference_of_random_rows(
    scorer: Scorer,
    model: Any,
    vocabulary: int,
    settings: Any,
    checkpoint: Path | None,
    gather: Callable[[Tensor], Tensor],
    bits: dict[str, list[int]] | None,
) -> dict[str, Any]:
    """What the reference says of random rows and of the newest tokens: log-probabilities of
    sequences, in nats, the vocabulary that the rows were drawn from, and the bits of its weights,
    for ``SAVED_REFERENCE``.

    Args:
        scorer: scores batches under policy and reference.
        model: the unwrapped policy.
        vocabulary: number of tokens that the tokenizer knows; a model may have further ones that it
            does not score.
        settings: the training arguments.
        checkpoint: the one from which the run is resumed; None in a new run.
        gather: as in ``check_start``.
        bits: those of its weights (``bits_of_reference``).

    Raises:
        ValueError: on all ranks, if the checkpoint holds others than rounding explains.
    """
    before = None if checkpoint is None else saved_reference(checkpoint)
    vocabulary = min(vocabulary, model.config.get_text_config().vocab_size)
    if before is not None:
        vocabulary = before["vocabulary"]
    rows = probe_rows(vocabulary, RANDOM_TOKENS)
    rows.append((rows[0][0], list(range(max(vocabulary - NEWEST_TOKENS, 0), vocabulary))))
    batch = {name: values.to(settings.device) for name, values in batch_of(rows).items()}
    reference = scorer.reference_logps(batch)
    if checkpoint is not None:
        # Whether or not this rank finds the file: all ranks make the same passes.
        first = first_scores(scorer.logps, scorer.logps_apart, batch, model, _half(settings))
        then = reference if before is None else reference.new_tensor(before["logps"])
        noise = first.scores - first.elsewhere
        eps = max(first.eps, rounding_error(model, reference.device))  # that of tf32, too
        found = Difference.between(reference, then, noise, first.tokens, eps)
        if found := _worst(found, settings, gather):
            raise ValueError(
                "the reference is not the one with which this run began: its log-probabilities of "
                f"random rows differ from those in {checkpoint / SAVED_REFERENCE} by {found}. "
                "`base_model` has other weights than then, or another precision or quantization, "
                "or the embeddings of new tokens were drawn with another `seed`: write what it "
                "was, or start a new run. To go on with this reference all the same, "
                "remove that file"
            )
    known = None if before is None else before.get("bits")
    if bits and known and bits != known:
        LOG.warning(
            "the weights of the reference are not those with which this run began, although its "
            "log-probabilities of random rows are the same within rounding; by dtype there were "
            "%s elements and are %s. Has `base_model` changed, or its precision or quantization?",
            *(
                ", ".join(f"{n:,} {dtype}" for dtype, (n, _) in each.items())
                for each in (known, bits)
            ),
        )
    return {"vocabulary": vocabulary, "logps": reference.tolist(), "bits": bits}


def saved_reference(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint holds of it; None if it holds nothing, as those of earlier releases."""
    file = checkpoint / SAVED_REFERENCE
    return json.loads(file.read_text()) if file.is_file() else None


def save_reference(checkpoint: Path, said: dict[str, Any] | None) -> None:
    """Writes what ``reference_of_random_rows`` returned into a checkpoint."""
    if said is not None:
        file = checkpoint / SAVED_REFERENCE
        write_atomically(file, lambda file: file.write_text(json.dumps(said)))


def check_gradient(
    scorer: Scorer,
    batch: MicroBatch,
    model: nn.Module,
    settings: Any,
    gather: Callable[[Tensor], Tensor],
) -> None:
    """Refuses a model in which the gradient of rows depends on the rows beside them, on all ranks
    together. Arguments as of ``check_start``.

    Raises:
        ValueError: naming likely causes.
    """
    device = batch.inputs["input_ids"].device
    eps = _coarsest_eps(model, _half(settings))
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            error = gradient_error(
                scorer, batch.inputs, model, lambda: _random_rounding(model, eps)
            )
    except torch.OutOfMemoryError:
        error = 0.0  # the step itself can cut its micro-batches
    free_memory()
    found = gather(torch.tensor([[error]], device=device)).max().item()
    if found:
        raise ValueError(
            f"the gradient of rows together is not the sum of their gradients (it is off by "
            f"{found:.0%}), although their log-probabilities agree: a kernel or a patched layer "
            "has a wrong backward pass for several rows. Look for keys that replace layers "
            "(`lora_mlp_kernel`, `lora_qkv_kernel`, `lora_o_kernel`, `tiled_mlp`, a kernel of a "
            "plugin), or write another `attn_implementation`"
        )


def some_weights(model: nn.Module) -> list[Tensor]:
    """A copy of the first few elements of each trainable parameter."""
    parameters = (p.detach() for p in model.parameters() if p.requires_grad)
    return [p.reshape(-1)[:64].clone() for p in parameters if not isinstance(p, DTensor)]


def refuse_updates_within_a_step(before: list[Tensor], model: nn.Module) -> None:
    """Raises ValueError if the weights differ from those that the step was scored with.

    Args:
        before: ``some_weights`` when the step was scored.
        model: the policy.
    """
    pairs = zip(before, some_weights(model), strict=True)
    # ZeRO-3 leaves some parameters empty between passes.
    if any(a.shape == b.shape and not torch.equal(a, b) for a, b in pairs):
        raise ValueError(
            "the weights changed between two micro-batches of one step: this `optimizer` updates "
            "them in the backward pass, so a step over several micro-batches can't be exact; write "
            "another one, or `gradient_accumulation_steps: 1`"
        )


def randomness(first: FirstScores) -> Difference:
    """The difference between two scores of the same rows by the same network."""
    noise = first.scores - first.again
    return Difference.between(first.scores, first.other, noise, first.tokens, first.eps)


def reference_error(first: FirstScores, reference: Tensor) -> Difference:
    """The difference between policy and reference before the first step.

    Args:
        first: scores of the policy.
        reference: scores of the reference, [sequences].
    """
    # If randomness is allowed, it is part of the noise.
    noise = torch.maximum(
        (first.scores - first.elsewhere).abs(), (first.scores - first.other).abs()
    )
    return Difference.between(first.scores, reference, noise, first.tokens, first.eps)


def random_network(found: Difference, model: nn.Module, settings: Any) -> str:
    """The error message for ``randomness``.

    Args:
        found: the difference.
        model: the policy.
        settings: the training arguments.
    """
    suspects = _random_suspects(model, settings)
    advice = f"set to 0: {', '.join(suspects)}" if suspects else "no known key is the cause"
    return (
        f"the network is random: the same rows scored twice differ by {found}, and the scores of a "
        f"step and its gradient would come from two different networks; {advice}. Keys of the "
        "model's config go under `overrides_of_model_config`; `aot_batch: micro_batch` scores and "
        "differentiates in one pass and may keep them"
    )


def wrong_reference(found: Difference, model: nn.Module, settings: Any) -> str:
    """The error message for ``reference_error``, with arguments as in ``random_network``."""
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
    """Settings that may make the network random, as ``key: value``."""
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
    """The batch with more padding, up to the widths in ``limits``; as it is, if it has images."""
    if MORE in batch:
        return batch
    room = [limit - batch["input_ids"].shape[1] for limit in limits if limit is not None]
    more = max(min(WIDER, *room), 0) if room else WIDER
    return {name: F.pad(batch[name], (0, more)) for name in FIELDS}
