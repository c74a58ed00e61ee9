"""Logged metrics of a step or an evaluation."""

from ..ot.coupling import recoupled_fraction
from ..ot.dominance import dominance_statistics
from ..ot.losses import (
    PairedLogps,
    ScoreKind,
    StepLogps,
    compared,
    negative_log_likelihood,
)


def step_metrics(step: StepLogps, beta: float, score: ScoreKind = "sum") -> dict[str, float]:
    """Dominance of U over V, the negative log-likelihood per token of chosen or positive responses,
    and the reward metrics that TRL's trainers log.

    Args:
        step: log-probabilities of whole responses, in nats.
        beta: reward = beta x logratio.
        score: what is compared, and so what dominance and rewards refer to: whole responses (nats)
            or their means (nats per token). ``logps/*`` are of whole responses in any case.

    Raises:
        ValueError: if U or V is empty.
    """
    whole, step = step, compared(step, score)
    u, v = step.u.detach(), step.v.detach()
    arrays = u.cpu().numpy(), v.cpu().numpy()
    stats = dominance_statistics(*arrays)
    metrics = {f"aot/{name}": value for name, value in stats.items()}
    metrics["aot/nll"] = negative_log_likelihood(whole).item()
    if isinstance(step, PairedLogps):
        metrics["aot/recoupled_fraction"] = recoupled_fraction(*arrays)
        chosen = (step.chosen - step.ref_chosen).detach() * beta
        rejected = (step.rejected - step.ref_rejected).detach() * beta
        metrics["rewards/accuracies"] = (chosen > rejected).double().mean().item()
    else:
        chosen, rejected = u * beta, v * beta
    if isinstance(whole, PairedLogps):
        good, bad = whole.chosen, whole.rejected
    else:
        good, bad = whole.logps[whole.is_positive], whole.logps[~whole.is_positive]
    metrics["logps/chosen"], metrics["logps/rejected"] = good.mean().item(), bad.mean().item()
    metrics["rewards/chosen"] = chosen.mean().item()
    metrics["rewards/rejected"] = rejected.mean().item()
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics
