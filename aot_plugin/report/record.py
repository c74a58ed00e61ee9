"""Writes the files of one evaluation; called by the trainer."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from .plots import save_quantile_plot
from .scores import DIRECTORY, Scores
from .summary import save_summary, summarize

LOG = logging.getLogger(__name__)


def record_evaluation(scores: Scores, output_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Writes one evaluation to ``output_dir``/aot. Call it on the main process only.

    If summary or plot can't be made (an evaluation set with negatives only, NaN log-probabilities,
    no matplotlib), this is logged and never ends a training.

    Returns:
        The paths of what was written, without what could not be made:

        - "scores": scores-<eval set>-step<step>.parquet, always
        - "summary": dominance-<eval set>-step<step>.json, see ``summarize``
        - "plot": quantiles-<eval set>-step<step>.png, see ``quantile_figure``

    Raises:
        OSError: if the data can't be written.
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
        # A failing plot, because of a font or the backend for instance, must not end a training.
        LOG.warning("no plot of %s: %r", written["scores"].name, error)
        return written
    if plot is not None:
        written["plot"] = plot
    return written


def _resamples_within_seconds(scores: Scores) -> int:
    """Number of bootstrap resamples: 1000, fewer beyond 20,000 completions (4,000 with weights,
    whose resamples can't be computed together).

    Training waits for these intervals.
    """
    completions = len(scores.chosen_tokens) + len(scores.rejected_tokens)
    drawn = 20_000_000 if scores.u_mass is None else 4_000_000
    return max(100, min(1000, drawn // max(1, completions)))
