"""Seeing the dominance: statistics, quantile plots and comparisons of runs.

Importing this needs numpy only; SciPy, pyarrow, matplotlib and torch are imported where used.
"""

from .loggers import log_figure_to_loggers
from .record import record_evaluation
from .scores import Scores, load_run

__all__ = ["Scores", "load_run", "log_figure_to_loggers", "record_evaluation"]
