"""Logged metrics of a step or an evaluation."""

from ..ot.coupling import recoupled_fraction
from ..ot.dominance import dominance_statistics
from ..ot.losses import PairedLogps, StepLogps, negative_log_likelihood


def step_metrics(step: StepLogps, beta: float) -> dict[str, float]:
    """Dominance of U over V (in nats), the negative log-likelihood per token of chosen or positive
    responses, and the reward metrics that TRL's trainers log.

    Raises:
        ValueError: if U or V is empty.
    """
    u, v = step.u.detach(), step.v.detach()
    arrays = u.cpu().numpy(), v.cpu().numpy()
    stats = dominance_statistics(*arrays)
    metrics = {f"aot/{name}": value for name, value in stats.items()}
    metrics["aot/nll"] = negative_log_likelihood(step).item()
    if isinstance(step, PairedLogps):
        metrics["aot/recoupled_fraction"] = recoupled_fraction(*arrays)
        chosen = (step.chosen - step.ref_chosen).detach() * beta
        rejected = (step.rejected - step.ref_rejected).detach() * beta
        metrics["rewards/accuracies"] = (chosen > rejected).double().mean().item()
        metrics["logps/chosen"] = step.chosen.mean().item()
        metrics["logps/rejected"] = step.rejected.mean().item()
    else:
        chosen, rejected = u * beta, v * beta
        metrics["logps/chosen"] = step.logps[step.is_positive].mean().item()
        metrics["logps/rejected"] = step.logps[~step.is_positive].mean().item()
    metrics["rewards/chosen"] = chosen.mean().item()
    metrics["rewards/rejected"] = rejected.mean().item()
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics
