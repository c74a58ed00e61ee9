"""Evaluation: one transport problem over the whole evaluation set."""

import json
from typing import Any

import numpy as np
import torch
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from transformers.trainer_utils import EvalPrediction

from ..ot.losses import PairedLogps, StepLogps
from ..report import Scores, log_figure_to_loggers, record_evaluation
from ..step.engine import Objective, check_finite
from ..step.metrics import prediction_metrics, step_metrics
from .samples import SamplesMixin
from .throughput import ThroughputMixin

LOG = get_logger("axolotl.aot_plugin.evaluation")


class EvaluationMixin(SamplesMixin, ThroughputMixin):
    """Evaluates with the host's loop, which gathers our columns over batches and ranks.

    The loop drops the rows that it repeated to fill the last batch. One transport problem is solved
    on all rows, so the result does not depend on the batch size.
    """

    beta: float
    _eval_name = "eval"

    @property
    def _objective(self) -> Objective:
        raise NotImplementedError

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        # In `axolotl evaluate` the step is 0. It must not overwrite the evaluation before step 1.
        self._eval_name = metric_key_prefix if self.is_in_train else "evaluate"
        self.compute_metrics = self._evaluate_columns
        output = super().evaluation_loop(
            dataloader, description, False, ignore_keys, metric_key_prefix
        )
        if self.args.aot_samples:
            self._sample(dataloader.dataset, self._eval_name)
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Scores a batch.

        Returns:
            None; (logp, reference logp, label, completion tokens, mass, and what is watched: see
            ``Scorer.watched_logps``) of each sequence by data row, [rows, sequences per row, 7]
            float64; ones in place of the host's labels, [rows].
        """
        batch = self._micro_batch(self._prepare_inputs(inputs))
        logps, watched = self._scorer.watched_logps(batch.inputs, model)
        ref_logps = batch.reference_logps(self._scorer, model)
        columns = [logps, ref_logps, batch.label, batch.tokens, batch.mass]
        columns += watched.unbind(dim=1)
        row = self._objective.step_class.sequences_per_row
        per_row = torch.stack(columns, dim=1).double().unflatten(0, (row, -1)).transpose(0, 1)
        return None, per_row.contiguous(), torch.ones(len(per_row), device=per_row.device)

    def _step_metrics(self, step: StepLogps) -> dict[str, float]:
        found = step_metrics(step, self.beta, self.args.aot_score, self.args.aot_order)
        if self._excess_weight != 1:
            del found["aot/nll"]  # some tokens count less
        return found

    def _evaluate_columns(self, prediction: EvalPrediction) -> dict[str, float]:
        columns = np.asarray(prediction.predictions, dtype=np.float64)
        rows = torch.from_numpy(columns).flatten(0, 1)
        check_finite(rows[:, :2], f"the evaluation after step {self.state.global_step}")
        logps, ref_logps, label, tokens, mass = rows[:, :5].unbind(dim=1)
        if (self.state.global_step or not self.is_in_train) and torch.equal(logps, ref_logps):
            LOG.warning(
                "policy and reference gave the same log-probabilities: nothing is trained yet, or "
                "`axolotl evaluate` compares `base_model` with itself. It evaluates an adapter "
                "(`--lora-model-dir`); for a model that was trained as a whole there is "
                "`python -m aot_plugin report`"
            )
        step, loss = self._objective(logps, ref_logps, label, tokens, mass)
        metrics = {"loss": loss.item(), "num_tokens": float(self._tokens)}
        metrics |= prediction_metrics(rows[:, 5:], label == 1, tokens, mass)
        if not step.comparisons:
            LOG.warning("the evaluation set holds one label only: there is nothing to compare")
            return metrics
        metrics |= self._step_metrics(step)
        if self.args.aot_report and self.is_world_process_zero():
            metrics |= self._record(columns, None if step.mass is None else step.mass.numpy())
        return metrics

    def _record(self, columns: np.ndarray, weight: np.ndarray | None) -> dict[str, float]:
        """Writes the evaluation and its plot to the output directory.

        The plot is also sent to the loggers that accept images.

        Args:
            columns: as from ``prediction_step``, for all rows.
            weight: the rows' masses, [rows]; None if all are equal.

        Returns:
            Bootstrap intervals for the log; none for graded rows.
        """
        step = self.state.global_step
        make = _paired if self._objective.step_class is PairedLogps else _unpaired
        common = {"beta": self.beta, "step": step, "eval_set": self._eval_name}
        scores = make(columns, score=self.args.aot_score, weight=weight, **common)
        written = record_evaluation(scores, self.args.output_dir)
        if "plot" in written:
            log_figure_to_loggers(
                written["plot"], step, self.args.report_to, self.callback_handler.callbacks
            )
        if "summary" not in written:
            return {}
        summary = json.loads(written["summary"].read_text())
        if summary["levels"]:
            return {}  # what is logged is the mean over the levels, whose interval is not known
        intervals = summary["margins"]["intervals"]
        return {
            f"aot/{name}_{end}": value
            for name in ("violation_fraction", "violation_amount")
            for end, value in zip(("low", "high"), intervals[name], strict=True)
        }


def _paired(columns: np.ndarray, **common: Any) -> Scores:
    """Scores of pairs from the rows of ``prediction_step``, [rows, 2, 7]."""
    chosen, rejected = columns[:, 0], columns[:, 1]
    return Scores.paired(
        chosen_logps=chosen[:, 0],
        rejected_logps=rejected[:, 0],
        ref_chosen_logps=chosen[:, 1],
        ref_rejected_logps=rejected[:, 1],
        chosen_tokens=chosen[:, 3],
        rejected_tokens=rejected[:, 3],
        **common,
    )


def _unpaired(columns: np.ndarray, **common: Any) -> Scores:
    """Scores of labelled rows from the rows of ``prediction_step``, [rows, 1, 7]."""
    logps, ref_logps, label, tokens = columns[:, 0, :4].T
    graded = ((label != 0) & (label != 1)).any()
    highest = label.max() if graded else 1  # a small evaluation set may lack level 1
    return Scores.unpaired(
        logps=logps,
        ref_logps=ref_logps,
        label=label == highest,
        tokens=tokens,
        level=label if graded else None,
        **common,
    )
