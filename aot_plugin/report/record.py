"""What the trainer calls after an evaluation."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from .plots import save_quantile_plot
from .scores import DIRECTORY, Scores
from .summary import save_summary, summarize

LOG = logging.getLogger(__name__)


def record_evaluation(scores: Scores, output_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Writes one evaluation under `output_dir`/aot and returns what was written where.

    - "scores": scores-<eval set>-step<step>.parquet, always
    - "summary": dominance-....json, see `summarize`
    - "plot": quantiles-....png, see `quantile_figure`

    Call it on the main process only. A summary or plot that can't be made (an evaluation set with
    negatives only, NaN log-probabilities, no matplotlib) is missing from the result and logged;
    it never ends a training. Raises OSError if the data can't be written.
    """
    directory = Path(output_dir) / DIRECTORY
    written = {"scores": scores.save(directory)}
    try:
        summary = summarize(scores, n_resamples=_resamples_within_seconds(scores))
    except ValueError as error:
        LOG.warning("no summary and no plot of %s: %s", written["scores"].name, error)
        return written
    written["summary"] = save_summary(summary, scores, directory)
    try:
        plot = save_quantile_plot(scores, directory)
    except Exception as error:
        # A picture is never worth a training, whatever a font or a plotting backend stumbles over.
        LOG.warning("no plot of %s: %r", written["scores"].name, error)
        return written
    if plot is not None:
        written["plot"] = plot
    return written


def _resamples_within_seconds(scores: Scores) -> int:
    """1000, and fewer beyond 20,000 completions: training waits for these intervals."""
    completions = len(scores.chosen_tokens) + len(scores.rejected_tokens)
    return max(100, min(1000, 20_000_000 // max(1, completions)))
