"""Logged metrics of a step or an evaluation."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ot.coupling import recoupled_fraction
from ..ot.dominance import dominance_statistics
from ..ot.losses import (
    PairedLogps,
    ScoreKind,
    StepLogps,
    compared,
    negative_log_likelihood,
)
from ..ot.second_order import second_order_statistics
from ..ot.transport import OrderKind


def step_metrics(
    step: StepLogps, beta: float, score: ScoreKind = "sum", order: OrderKind = "first"
) -> dict[str, float]:
    """Dominance of U over V, the negative log-likelihood per token of chosen or positive responses,
    and the reward metrics that TRL's trainers log, all with the rows' masses.

    Of graded rows, dominance is the mean over the comparisons of neighbouring levels, and rewards
    are those of the highest level and of all others.

    Args:
        step: log-probabilities of whole responses, in nats.
        beta: reward = beta x logratio.
        score: what is compared, and so what dominance and rewards refer to: whole responses (nats)
            or their means (nats per token). ``logps/*`` are of whole responses in any case.
        order: of dominance; "second" adds the statistics of second order.

    Raises:
        ValueError: if the step has no ``comparisons``.
    """
    whole, step = step, compared(step, score)
    compare: list[Callable[..., dict[str, float]]] = [dominance_statistics]
    if order == "second":
        compare.append(second_order_statistics)
    comparisons = [_samples(part) for part in step.comparisons]
    if not comparisons:
        raise ValueError("all rows of the step have one label")
    metrics = {
        f"aot/{name}": sum(values) / len(values)
        for statistics in compare
        for name, values in _by_name([statistics(*samples) for samples in comparisons]).items()
    }
    if isinstance(step, PairedLogps):
        u, v, mass, _ = comparisons[0]
        metrics["aot/recoupled_fraction"] = recoupled_fraction(u, v, mass)
        chosen = (step.chosen - step.ref_chosen).detach() * beta
        rejected = (step.rejected - step.ref_rejected).detach() * beta
        metrics["rewards/accuracies"] = _mean((chosen > rejected).double(), step.mass)
    else:
        chosen, rejected = step.u.detach() * beta, step.v.detach() * beta
    if isinstance(whole, PairedLogps):
        good, bad = whole.chosen, whole.rejected
    else:
        good, bad = whole.logps[whole.is_positive], whole.logps[~whole.is_positive]
    if len(good) == 0 or len(bad) == 0:
        return metrics  # of graded rows, none of the highest level
    metrics["aot/nll"] = negative_log_likelihood(whole).item()
    metrics["logps/chosen"] = _mean(good, step.u_mass)
    metrics["logps/rejected"] = _mean(bad, step.v_mass)
    metrics["rewards/chosen"] = _mean(chosen, step.u_mass)
    metrics["rewards/rejected"] = _mean(rejected, step.v_mass)
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def prediction_metrics(
    watched: Tensor, is_positive: Tensor, tokens: Tensor, mass: Tensor
) -> dict[str, float]:
    """What TRL's trainers log of the policy's predictions, as means over completion tokens, each of
    which counts with the mass of its row.

    Args:
        watched: [sequences, 2]; how many completion tokens are the most probable ones, and the sum
            of the entropies at completion tokens, in nats.
        is_positive: [sequences] bool.
        tokens: [sequences]; completion tokens.
        mass: [sequences]; relative masses.

    Returns:
        ``mean_token_accuracy`` of chosen or positive responses and ``entropy`` of all responses;
        without one that has no tokens to be the mean of.
    """
    found = {}
    (hits, entropies), tokens = (watched * mass[:, None]).unbind(dim=1), tokens * mass
    if (positive := tokens[is_positive].sum()) > 0:
        found["mean_token_accuracy"] = (hits[is_positive].sum() / positive).item()
    if (of_all := tokens.sum()) > 0:
        found["entropy"] = (entropies.sum() / of_all).item()
    return found


def _samples(step: StepLogps) -> tuple[Any, ...]:
    """U, V and their masses, None if all are equal, as arrays."""
    tensors = (step.u, step.v, step.u_mass, step.v_mass)
    return tuple(None if x is None else x.detach().cpu().numpy() for x in tensors)


def _by_name(found: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [each[name] for each in found] for name in found[0]}


def _mean(x: Tensor, mass: Tensor | None) -> float:
    """The mean of x [n], with masses [n] if there are any."""
    return (x.mean() if mass is None else (mass * x).sum() / mass.sum()).item()
