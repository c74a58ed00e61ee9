"""The statistics of one evaluation: dominance with intervals and tests, accuracy, length bias."""

from __future__ import annotations

import json
import os
import warnings
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..files import write_atomically
from ..ot.coupling import FloatArray, recoupled_fraction
from ..ot.dominance import (
    Sample,
    bootstrap_intervals,
    dominance_statistics,
    resampled,
    resampled_indices,
    with_masses,
)
from ..ot.dominance import statistics_of_sorted as of_first_order
from ..ot.order_tests import almost_dominance, dominance_test
from ..ot.second_order import second_order_statistics, second_order_test
from ..ot.second_order import statistics_of_sorted as of_second_order
from .scores import Scores

LEVEL = 0.95
"""Confidence level of every interval in a summary."""

NO_TEST = {"statistic": None, "p_value": None, "method": "none: rows have weights"}
"""In place of ``dominance_test``, whose distribution is known for rows that count alike."""


class _Options(TypedDict):
    paired: bool
    n_resamples: int
    seed: int


def summarize(scores: Scores, n_resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Computes all statistics of one evaluation.

    Args:
        scores: the evaluation.
        n_resamples: number of bootstrap resamples.
        seed: seed of the bootstrap and the tests.

    Returns:
        Plain JSON values, None where a number isn't defined:

        - ``mode``, ``beta``, ``step``, ``eval_set``, ``n_chosen``, ``n_rejected`` (completions,
          whatever their masses), ``weighted`` (whether masses differ), ``level``, ``n_resamples``
        - ``margins``: the comparison in AOT's loss, u with v (``Scores.u``, ``Scores.v``), and
          ``rewards``: that of chosen with rejected rewards. Each contains ``statistics`` (see
          ``dominance_statistics``; nats), ``intervals`` with the same keys, ``test`` (see
          ``dominance_test``; H0: the first sample dominates; ``NO_TEST`` if masses differ),
          ``violation_ratio`` and its limit
          ``violation_ratio_upper`` (see ``almost_dominance``), ``first_mean`` and ``second_mean``
          and ``second_order``: ``statistics`` (see ``second_order_statistics``), their
          ``intervals`` and ``test``, the outcome of ``second_order_test``
        - ``accuracy``, ``accuracy_interval``: probability that a chosen reward exceeds a rejected
          one, with ties counted as one half, and its bootstrap interval. Paired: within the pairs.
          Unpaired: over all pairs of a positive with a negative (Mann and Whitney's U / (n m))
        - ``levels``: for graded rows, the comparison of each level with the next lower one, highest
          first: as ``margins``, and ``high`` and ``low``, the levels. ``margins`` and ``rewards``
          compare the highest level with all others then
        - ``recoupled_fraction``: paired only, the share of rows whose u is compared with the v of
          another row, by rank (0: AOT's loss on these rows is the pairwise one)
        - ``length``: ``length_bias`` of chosen and of rejected completions separately, so that a
          difference in length *between* them isn't mistaken for a bias within; all completions
          count alike in it

    All else counts rows with their masses.

    Raises:
        ValueError: if a sample is empty or not finite; names it ("chosen rewards", ...).
    """
    chosen, rejected, u, v = samples_of(scores)
    options: _Options = {"paired": scores.is_paired, "n_resamples": n_resamples, "seed": seed}
    win_rate, win_rate_interval = accuracy(
        chosen.values, rejected.values, **options, masses=(chosen.mass, rejected.mass)
    )
    found = {
        "mode": scores.mode,
        "beta": scores.beta,
        "step": scores.step,
        "eval_set": scores.eval_set,
        "n_chosen": chosen.size,
        "n_rejected": rejected.size,
        "weighted": chosen.mass is not None or rejected.mass is not None,
        "level": LEVEL,
        "n_resamples": n_resamples,
        "margins": _comparison(u, v, **options),
        "rewards": _comparison(chosen, rejected, **options),
        "accuracy": win_rate,
        "accuracy_interval": win_rate_interval,
        "recoupled_fraction": (
            recoupled_fraction(u.values, v.values, u.mass) if scores.is_paired else None
        ),
        "levels": _levels(scores, options),
        "length": {
            "chosen": length_bias(chosen.values, scores.chosen_tokens),
            "rejected": length_bias(rejected.values, scores.rejected_tokens),
        },
    }
    return _plain(found)


def samples_of(scores: Scores) -> tuple[Sample, Sample, Sample, Sample]:
    """Chosen and rejected rewards, u and v.

    Raises:
        ValueError: if a sample is empty or not finite; names it.
    """
    u_mass, v_mass = scores.u_mass, scores.v_mass
    return (
        with_masses(scores.chosen_rewards, u_mass, "chosen rewards"),
        with_masses(scores.rejected_rewards, v_mass, "rejected rewards"),
        with_masses(scores.u, u_mass, "u"),
        with_masses(scores.v, v_mass, "v"),
    )


def save_summary(
    summary: dict[str, Any], scores: Scores, directory: str | os.PathLike[str]
) -> Path:
    """Writes ``directory``/dominance-<eval set>-step<step>.json and returns its path."""
    path = Path(directory) / f"dominance-{scores.stem}.json"
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    return path


def accuracy(
    chosen: FloatArray,
    rejected: FloatArray,
    paired: bool,
    n_resamples: int,
    seed: int,
    masses: tuple[FloatArray | None, FloatArray | None] = (None, None),
) -> tuple[float, tuple[float, float]]:
    """P(chosen > rejected) + P(chosen = rejected) / 2, with its percentile bootstrap interval.

    Args:
        chosen: rewards, [n].
        rejected: rewards, [m]; m = n if paired.
        paired: True to compare row by row. False to compare all n m pairs, which gives the area
            under the ROC curve; without masses it is computed from ranks (Mann and Whitney 1947).
        n_resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.
        masses: relative masses of both, [n] and [m], the same if paired; None if all are equal.

    Returns:
        The probability, and its interval as (low, high).
    """
    if paired:
        blocks = resampled_indices(chosen.size, rejected.size, paired, n_resamples, seed)
        wins = Sample((1.0 + np.sign(chosen - rejected)) / 2.0, masses[0])
        value = float(_means(wins))
        drawn = np.concatenate([_means(wins.take(i)) for i, _ in blocks])
    else:
        both = Sample(chosen, masses[0]), Sample(rejected, masses[1])
        value = float(_win_rates(*(sample.sorted() for sample in both)))
        pairs = resampled(*both, paired, n_resamples, seed)
        drawn = np.concatenate([np.atleast_1d(_win_rates(*pair)) for pair in pairs])
    low, high = np.quantile(drawn, ((1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0))
    return value, (float(low), float(high))


def _means(x: Sample) -> FloatArray:
    """Means along the last axis, with masses if there are any."""
    if x.mass is None:
        return np.asarray(x.values.mean(axis=-1))
    return np.asarray((x.mass * x.values).sum(axis=-1) / x.mass.sum(axis=-1))


def _win_rates(x: Sample, y: Sample) -> FloatArray:
    """P(x > y) + P(x = y) / 2 for sorted samples x (..., n) and y (..., m), shape (...)."""
    if x.mass is None and y.mass is None:
        return _mann_whitney(x.values, y.values)
    x_mass, y_mass = (np.ones(s.size) if s.mass is None else s.mass for s in (x, y))
    below = np.concatenate(([0.0], np.cumsum(y_mass)))
    less, at_most = (below[np.searchsorted(y.values, x.values, side)] for side in ("left", "right"))
    return np.asarray(x_mass @ (less + at_most) / (2.0 * x_mass.sum() * below[-1]))


def _mann_whitney(x: FloatArray, y: FloatArray) -> FloatArray:
    from scipy.stats import rankdata

    n, m = x.shape[-1], y.shape[-1]
    ranks = rankdata(np.concatenate([x, y], axis=-1), axis=-1)
    return np.asarray((ranks[..., :n].sum(axis=-1) - n * (n + 1) / 2) / (n * m))


def length_bias(rewards: FloatArray, tokens: NDArray[np.int64]) -> dict[str, Any]:
    """Measures how the reward of a completion depends on its length.

    Args:
        rewards: [n].
        tokens: numbers of completion tokens, [n].

    Returns:
        - ``spearman``: rank correlation; NaN if all rewards or all lengths are equal
        - ``quartiles``: ``tokens_from``, ``tokens_to``, ``n`` and ``mean_reward`` for each quarter
          of the lengths. A length belongs to one quarter only, so if many completions share a
          length, quarters differ in size and an empty one is left out
    """
    from scipy.stats import spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of constant input, for which it returns NaN
        spearman = float(spearmanr(rewards, tokens).statistic)
    edges = np.quantile(tokens, [0.25, 0.5, 0.75], method="inverted_cdf")
    quarter = np.searchsorted(edges, tokens, side="left")
    quartiles = [
        {
            "tokens_from": int(tokens[members].min()),
            "tokens_to": int(tokens[members].max()),
            "n": int(members.sum()),
            "mean_reward": float(rewards[members].mean()),
        }
        for members in (quarter == k for k in range(4))
        if members.any()
    ]
    return {"spearman": spearman, "quartiles": quartiles}


def _both_orders(u: Sample, v: Sample) -> dict[str, FloatArray]:
    return of_first_order(u, v) | of_second_order(u, v)


def _comparison(
    first: Sample, second: Sample, paired: bool, n_resamples: int, seed: int
) -> dict[str, Any]:
    options: _Options = {"paired": paired, "n_resamples": n_resamples, "seed": seed}
    values, masses = (first.values, second.values), (first.mass, second.mass)
    bootstrap: dict[str, Any] = {"level": LEVEL, "u_mass": masses[0], "v_mass": masses[1]}
    almost = almost_dominance(*values, **options, **bootstrap)
    alike = first.mass is None and second.mass is None
    statistics = dominance_statistics(*values, *masses)
    of_second = second_order_statistics(*values, *masses)
    # One bootstrap for both orders: training waits for it.
    intervals = bootstrap_intervals(*values, **options, **bootstrap, statistics=_both_orders)
    return {
        "first_mean": float(_means(first)),
        "second_mean": float(_means(second)),
        "statistics": statistics,
        "intervals": {key: intervals[key] for key in statistics},
        "test": dominance_test(*values, **options)._asdict() if alike else NO_TEST,
        "violation_ratio": almost.ratio,
        "violation_ratio_upper": almost.upper,
        "second_order": {
            "statistics": of_second,
            "intervals": {key: intervals[key] for key in of_second},
            "test": second_order_test(*values, **options)._asdict() if alike else NO_TEST,
        },
    }


def _levels(scores: Scores, options: _Options) -> list[dict[str, Any]]:
    samples = [
        (level.value, with_masses(level.logratios, level.mass, f"level {level.value:g}"))
        for level in reversed(scores.levels)
    ]
    return [
        {"high": high, "low": low, **_comparison(u, v, **options)}
        for (high, u), (low, v) in pairwise(samples)
    ]


def _plain(value: Any) -> Any:
    """``value`` with None in place of non-finite numbers, which JSON doesn't have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value
