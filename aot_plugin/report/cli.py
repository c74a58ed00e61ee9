"""The command ``python -m aot_plugin report``: its arguments and errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .comparison import Named
    from .scores import Scores

DESCRIPTION = """\
Compare runs by first-order stochastic dominance, as one HTML page.

A run is the output directory of a training. Runs of `rl: aot` hold their evaluations in RUN/aot.
Other runs (`rl: dpo`, `ipo`, `kto`), or all runs on rows of your choice, are scored here with
--eval-data."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command to ``parser``."""
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="output directory")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="default: %(default)s"
    )
    group = parser.add_argument_group("scoring rows with the runs' models")
    group.add_argument(
        "--eval-data",
        type=Path,
        metavar="FILE",
        help="JSON Lines; rows {prompt|messages, chosen, rejected} or {prompt|messages, "
        "completion, label}. Every run is scored on them, instead of reading RUN/aot",
    )
    group.add_argument(
        "--base-model",
        metavar="DIR",
        help="base model of LoRA runs (default: named by adapter_config.json)",
    )
    group.add_argument("--reference", metavar="DIR", help="reference of fully fine-tuned runs")
    group.add_argument(
        "--beta", type=float, help="of all runs; default: from each run's saved training arguments"
    )
    group.add_argument(
        "--plain",
        action="store_true",
        help="take prompt and completion as they are, without a chat template",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the model's weights (default: as saved); log-probabilities are float32 anyway",
    )
    group.add_argument("--batch-tokens", type=int, default=8192, help="default: %(default)s")
    group.add_argument("--max-tokens", type=int, help="leave out rows with longer sequences")


def main(arguments: argparse.Namespace) -> str:
    """Writes the report.

    Returns:
        The path of the HTML page.

    Raises:
        ValueError, OSError: with a message for the user.
    """
    from ..files import write_atomically
    from .curves import load_log
    from .page import comparison_page
    from .samples import load_samples

    page = comparison_page(
        _evaluations(arguments),
        answers=_of_each(arguments.runs, load_samples),
        logs=_of_each(arguments.runs, load_log),
    )
    output: Path = arguments.output
    write_atomically(output, lambda file: file.write_text(page, encoding="utf-8"))
    return str(output)


def _evaluations(arguments: argparse.Namespace) -> list[Named]:
    from .comparison import Named

    runs: list[Path] = arguments.runs
    for run in runs:
        if not run.is_dir():
            raise FileNotFoundError(f"{run}: no such directory")
    if arguments.eval_data is not None:
        from .scoring import find_model, read_beta

        for run in runs:  # what is missing is said before the first run is scored
            find_model(run)
            if arguments.beta is None:
                read_beta(run)
    names = run_names(runs)
    return [
        Named(name, scores)
        for name, run in zip(names, runs, strict=True)
        for scores in _scores_of(run, arguments)
    ]


def _of_each[Loaded](runs: list[Path], load: Callable[[Path], Loaded]) -> dict[str, Loaded]:
    """What ``load`` finds in each run, by the runs' names."""
    return dict(zip(run_names(runs), map(load, runs), strict=True))


def _scores_of(run: Path, arguments: argparse.Namespace) -> list[Scores]:
    from .scores import DIRECTORY, load_run

    if arguments.eval_data is not None:
        from .scoring import score_run

        options = ("base_model", "reference", "beta", "plain", "dtype", "batch_tokens")
        return [
            score_run(
                run,
                arguments.eval_data,
                max_tokens=arguments.max_tokens,
                **{name: getattr(arguments, name) for name in options},
            )
        ]
    found = load_run(run)
    if not found:
        raise FileNotFoundError(
            f"{run}: no evaluations; looked for {run / DIRECTORY / 'scores-*.parquet'}. Runs of "
            "`rl: aot` write them at every evaluation (eval_steps, val_set_size or test_datasets); "
            "give --eval-data FILE to score any run now"
        )
    return found


def run_names(runs: list[Path]) -> list[str]:
    """Names of runs: the last parts of their paths, as many as are needed to tell them apart.

    Raises:
        ValueError: if two paths are the same.
    """
    paths = [run.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError("a run is given twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
