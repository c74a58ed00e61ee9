import json
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from aot_plugin.ot.dominance import bootstrap_intervals, dominance_statistics
from aot_plugin.ot.order_tests import almost_dominance, dominance_test
from aot_plugin.ot.second_order import second_order_statistics, second_order_test
from aot_plugin.report.scores import Scores
from aot_plugin.report.summary import (
    accuracy,
    length_bias,
    save_summary,
    summarize,
)

few = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=8)


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_every_number_is_the_one_of_its_function(mode, make_paired, make_unpaired):
    scores = make_paired() if mode == "paired" else make_unpaired()
    options = {"paired": mode == "paired", "n_resamples": 50, "seed": 3}
    found = summarize(scores, n_resamples=50, seed=3)
    for key, first, other in [
        ("margins", scores.u, scores.v),
        ("rewards", scores.chosen_rewards, scores.rejected_rewards),
    ]:
        part = found[key]
        assert part["statistics"] == dominance_statistics(first, other)
        intervals = bootstrap_intervals(first, other, **options)
        assert {name: tuple(ends) for name, ends in part["intervals"].items()} == intervals
        assert tuple(part["test"].values()) == dominance_test(first, other, **options)
        almost = almost_dominance(first, other, **options)
        assert (part["violation_ratio"], part["violation_ratio_upper"]) == almost
        second = part["second_order"]
        assert second["statistics"] == second_order_statistics(first, other)
        assert tuple(second["test"].values()) == second_order_test(first, other, **options)
        for name, (low, high) in second["intervals"].items():
            assert low <= high and name in second["statistics"]
        assert (part["first_mean"], part["second_mean"]) == (first.mean(), other.mean())
    assert found["n_chosen"] + found["n_rejected"] == (120 if mode == "paired" else 60)
    assert (found["recoupled_fraction"] is None) == (mode == "unpaired")
    assert found["length"]["chosen"] == length_bias(scores.chosen_rewards, scores.chosen_tokens)


def test_what_is_not_defined_is_null_and_the_file_is_json(make_paired, tmp_path):
    columns = dict(make_paired().columns)
    columns["chosen_logps"] = columns["ref_chosen_logps"]
    columns["rejected_logps"] = columns["ref_rejected_logps"]
    scores = Scores("paired", 0.1, 0, "eval", columns)  # before the first step: policy = reference
    found = summarize(scores, n_resamples=20)
    assert found["margins"]["violation_ratio"] is None
    assert found["length"]["chosen"]["spearman"] is None
    assert found["margins"]["statistics"]["w1"] == 0
    assert found["accuracy"] == 0.5
    path = save_summary(found, scores, tmp_path)
    assert path.name == "dominance-eval-step0.json"
    assert json.loads(path.read_text()) == found


@pytest.mark.parametrize(("positives", "name"), [(0, "chosen"), (60, "rejected")])
def test_a_one_sided_evaluation_is_named(positives, name, make_unpaired):
    with pytest.raises(ValueError, match=f"^{name} rewards: the sample is empty"):
        summarize(make_unpaired(positives=positives))


@given(few, few)
def test_unpaired_accuracy_counts_all_pairs(chosen, rejected):
    pairs = list(product(chosen, rejected))
    wins = sum((c > r) + 0.5 * (c == r) for c, r in pairs)
    value, _ = accuracy(np.array(chosen), np.array(rejected), False, n_resamples=2, seed=0)
    assert value == pytest.approx(wins / len(pairs))
    u = mannwhitneyu(chosen, rejected).statistic
    assert value == pytest.approx(u / len(pairs))


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 30)), min_size=1, max_size=40))
def test_quartiles_partition_the_completions(rows):
    rewards, tokens = np.array([r for r, _ in rows], float), np.array([t for _, t in rows])
    quartiles = length_bias(rewards, tokens)["quartiles"]
    assert sum(quarter["n"] for quarter in quartiles) == len(rows)
    assert all(a["tokens_to"] < b["tokens_from"] for a, b in pairwise(quartiles))
    for quarter in quartiles:
        members = (tokens >= quarter["tokens_from"]) & (tokens <= quarter["tokens_to"])
        assert quarter["n"] == members.sum()
        assert quarter["mean_reward"] == pytest.approx(rewards[members].mean())


def test_different_lengths_make_quarters_of_equal_size():
    quartiles = length_bias(np.zeros(40), np.random.default_rng(0).permutation(40))["quartiles"]
    assert [quarter["n"] for quarter in quartiles] == [10, 10, 10, 10]
