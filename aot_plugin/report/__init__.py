"""Reports on dominance: statistics, quantile plots and comparisons of runs.

Importing this package needs only NumPy; SciPy, pyarrow, matplotlib and torch are imported where
they are used.
"""

from .loggers import log_figure_to_loggers, log_table_to_loggers
from .record import record_evaluation
from .samples import Samples, load_samples
from .scores import Scores, load_run

__all__ = [
    "Samples",
    "Scores",
    "load_run",
    "load_samples",
    "log_figure_to_loggers",
    "log_table_to_loggers",
    "record_evaluation",
]
