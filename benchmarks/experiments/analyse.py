"""Tables of the distributions of the true score, from the lines that run.py writes.

    python benchmarks/experiments/analyse.py matched kto --kl 3 6 12

Per sweep it prints:

1. Every setting, over its seeds: mean score, 5, 25 and 50 per cent quantiles of the scores of its
   responses, and divergence, each with a 95 per cent interval (Student's t over seeds).
2. Arms of the same context (beta, responses per step, steps, data) two by two, seed by seed: the
   differences (first less second), averaged over the divergences that both cover, with a 95 per
   cent interval (Student's t over seeds). The runs of one seed that differ in the learning rate (or
   the number of steps) are a curve. Its mean score is fitted, b + d (alpha + beta d) with d the
   root of the divergence and b the score before training (Gao, Schulman and Hilton, 2023, arXiv
   2210.10760). A distribution on it, which quantiles need, is the mixture of those of the two runs
   nearest in divergence, in shares that are linear in d; over a wide gap that keeps too much of the
   worse run's tail. Seeds that lack a run are left out. --from-base begins every curve at the model
   before training.
3. Mean and quantiles at given divergences. It says which seeds have no run on one of the two sides.
4. At each of these divergences, arms two by two, and each against the model before training:
   differences of quantiles, the violation ratio of "the first dominates the second" (0: it does, 1:
   the second dominates the first) with its upper 95 per cent limit, and the p-values of the
   hypotheses that the first dominates the second, and the reverse. A small p-value is evidence
   against dominance; a large one is no proof of it.

Intervals and tests of 4. resample prompts (the same for both arms) and seeds (of each arm), since
responses to one prompt and responses of one run depend on each other. Quantiles and ratios are
those of aot_plugin.ot; the test is the recentred bootstrap of ot.order_tests on these clusters.
With --figures, quantile curves at each divergence are drawn.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy.stats import norm
from scipy.stats import t as student

from aot_plugin.ot.dominance import quantile_curve, with_masses
from aot_plugin.ot.order_tests import violation_ratio

HERE = Path(__file__).parent
PERCENTS = (5, 25, 50)
QUANTILES = [f"{percent} %" for percent in PERCENTS]
PLACES = 11
"""Divergences over which differences are averaged, the two ends included (and not used)."""
AXES = {"paired_steps": "max_steps"}
"""By sweep: the key along which runs are a curve; otherwise the learning rate."""
BASE = "before training"
HIDDEN = {"seed", "remove_unused_columns", "rl", "aot_mode", "responses"}
SIZES = ("micro_batch_size", "gradient_accumulation_steps")
DEFAULTS = yaml.safe_load((HERE / "base.yml").read_text())
CONTEXT = ("rl_beta", "responses", "max_steps", "learning_rate", "data")
"""What two arms must have in common to be compared."""
NAMES = {"aot_batch": "sorted over", "rl_beta": "beta", "kto_desirable_weight": "weight"}

Changes = dict[str, Any]


class Distribution(NamedTuple):
    """Scores of one seed at one divergence: a run's, or a mixture of two runs'."""

    scores: np.ndarray
    """[runs, prompts, responses]"""
    shares: np.ndarray
    """[runs], of each run in the mixture; their sum is 1"""

    def of_prompts(self, prompts: Any = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Values and masses, [n]."""
        chosen = self.scores[:, prompts]
        masses = np.broadcast_to(self.shares[:, None, None], chosen.shape)
        return chosen.ravel(), masses.ravel()


class Arm(NamedTuple):
    label: str
    context: tuple[Any, ...]
    curves: dict[int, list[dict[str, Any]]]
    """By seed, the lines of its runs in order of divergence."""


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def method(changes: Changes) -> str:
    rl = changes.get("rl", "aot")
    return rl.upper() if rl != "aot" else f"AOT {changes.get('aot_mode', 'paired')}"


def described(changes: Changes) -> Changes:
    """The changes as a reader looks at them: the effective batch (pairs or labelled rows, and
    responses), and the micro-batch's size only where the sorting depends on it."""
    found = {key: DEFAULTS[key] for key in ("rl_beta", "max_steps", "learning_rate")}
    found |= {key: value for key, value in changes.items() if key not in SIZES}
    micro, accumulation = (changes.get(key, DEFAULTS[key]) for key in SIZES)
    found["batch"] = micro * accumulation
    labelled = method(changes) in ("AOT unpaired", "KTO")
    found["responses"] = found["batch"] * (1 if labelled else 2)
    if "aot_batch" in changes:
        alone = changes["aot_batch"] == "micro_batch"
        found["aot_batch"] = f"micro-batches of {micro}" if alone else "the step"
    if "data" in found:
        found["data"] = found["data"].removesuffix("_text")
    return found


def arms_of(rows: list[dict[str, Any]], axis: str) -> list[Arm]:
    """The sweep's runs by all that they change but seed and axis."""
    trained = [row for row in rows if row["changes"] != {"rl": "none"}]
    kinds = [(row, method(row["changes"]), described(row["changes"])) for row in trained]
    # Only what varies between the runs of a method is worth a word.
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for key in {key for _, _, kind in kinds for key in kind}:
        for _, name, kind in kinds:
            values[name, key].add(str(kind.get(key)))
    found: dict[str, Arm] = {}
    for row, name, kind in kinds:
        varied = [k for k in sorted(kind) if k not in (axis, *HIDDEN) and len(values[name, k]) > 1]
        label = ", ".join([name, *(f"{NAMES.get(k, k)} {kind[k]}" for k in varied)])
        context = tuple(kind.get(key) for key in CONTEXT if key != axis)
        curves = found.setdefault(label, Arm(label, context, defaultdict(list))).curves
        curves[row["changes"].get("seed", 1)].append(row)
    for arm in found.values():
        for curve in arm.curves.values():
            curve.sort(key=lambda row: row["kl"])
    return [found[label] for label in sorted(found)]


def whole_curves(arm: Arm) -> dict[int, list[dict[str, Any]]]:
    """Those of the seeds that have all runs. Over a wide gap the score would come out too low,
    since it is a little concave in the divergence's root."""
    runs = max(map(len, arm.curves.values()))
    return {seed: curve for seed, curve in arm.curves.items() if len(curve) == runs > 1}


def at_divergence(curve: list[dict[str, Any]], kl: float) -> Distribution | None:
    """The distribution of a seed's curve at a divergence; None outside its runs' range."""
    for low, high in pairwise(curve):
        if low["kl"] <= kl <= high["kl"]:
            start, place, end = np.sqrt(np.maximum([low["kl"], kl, high["kl"]], 0.0))
            share = (place - start) / ((end - start) or 1.0)
            scores = np.array([low["scores"], high["scores"]])
            return Distribution(scores, np.array([1.0 - share, share]))
    return None


def fitted(curve: list[dict[str, Any]], before: float) -> Callable[[float], float]:
    """The mean score of a seed by divergence: least squares over its runs, given that before
    training."""
    root = np.sqrt([max(row["kl"], 0.0) for row in curve])
    gains = np.array([np.mean(row["scores"]) for row in curve]) - before
    factors, *_ = np.linalg.lstsq(np.stack([root, root**2], axis=1), gains, rcond=None)
    return lambda kl: before + float(factors @ (kl**0.5, kl))


def gaps_of_seeds(first: Arm, second: Arm, before: float) -> list[tuple[float, float, np.ndarray]]:
    """By seed that both have: the divergences that both cover, from and to, and the differences of
    mean and quantiles, averaged over them (evenly in the root)."""
    found = []
    for seed in sorted(first.curves.keys() & second.curves.keys()):
        a, b = first.curves[seed], second.curves[seed]
        low, high = max(a[0]["kl"], b[0]["kl"]), min(a[-1]["kl"], b[-1]["kl"])
        places = np.linspace(max(low, 0.0) ** 0.5, max(high, 0.0) ** 0.5, PLACES)[1:-1] ** 2
        both = [(at_divergence(a, kl), at_divergence(b, kl)) for kl in places if low < high]
        gaps = [statistics([x]) - statistics([y]) for x, y in both if x and y]
        if gaps:
            mean = np.mean(gaps, axis=0)
            one, other = fitted(a, before), fitted(b, before)
            mean[0] = np.mean([one(kl) - other(kl) for kl in places])
            found.append((low, high, mean))
    return found


def averaged(arms: list[Arm], before: float, all_pairs: bool) -> str:
    """The table of gaps_of_seeds."""
    lines = []
    for a, b in pairs_of(arms, all_pairs):
        if found := gaps_of_seeds(a, b, before):
            low, high, gaps = zip(*found, strict=True)
            columns = [interval(column) for column in np.array(gaps).T]
            where = f"{np.mean(low):.1f} to {np.mean(high):.1f}"
            lines.append([f"{a.label} - {b.label}", str(len(found)), where, *columns])
    return table(["first - second", "seeds", "nats", "mean", *QUANTILES], lines)


def pairs_of(arms: list[Arm], all_pairs: bool) -> list[tuple[Arm, Arm]]:
    return [(a, b) for a, b in combinations(arms, 2) if all_pairs or a.context == b.context]


def whole(row: dict[str, Any]) -> Distribution:
    return Distribution(np.array([row["scores"]]), np.ones(1))


def statistics(found: Sequence[Distribution], prompts: Any = slice(None)) -> np.ndarray:
    """[1 + len(PERCENTS)]: mean and quantiles of the pooled scores."""
    values, masses = pooled(found, prompts)
    sample = with_masses(values, masses, "scores").sorted()
    mean = np.average(values, weights=masses)
    return np.array([mean, *(float(sample.at(percent)) for percent in PERCENTS)])


def pooled(
    found: Sequence[Distribution], prompts: Any = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """Values and positive masses of several seeds together."""
    parts = [distribution.of_prompts(prompts) for distribution in found]
    values, masses = (np.concatenate(part) for part in zip(*parts, strict=True))
    return values[masses > 0.0], masses[masses > 0.0]


def interval(values: Sequence[float], decimals: int = 3) -> str:
    """Mean and half width of the 95 per cent interval over seeds."""
    n = len(values)
    mean = f"{np.mean(values):.{decimals}f}"
    if n < 2:
        return mean
    half = student.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return f"{mean} ± {half:.{decimals}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score_columns(by_seed: Sequence[Distribution]) -> list[str]:
    columns = np.array([statistics([distribution]) for distribution in by_seed]).T
    return [interval(column) for column in columns]


def settings_table(arms: list[Arm], base: dict[str, Any] | None, axis: str) -> str:
    lines = []
    if base is not None:
        values = [f"{value:.3f}" for value in statistics([whole(base)])]
        lines.append([BASE, "", "", *values, "0.0", f"{base['words']:.1f}"])
    for arm in arms:
        places: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for curve in arm.curves.values():
            for row in curve:
                places[row["changes"].get(axis, DEFAULTS[axis])].append(row)
        for place, rows in sorted(places.items(), key=lambda item: np.mean(kls(item[1]))):
            columns = score_columns([whole(row) for row in rows])
            words = interval([row["words"] for row in rows], 1)
            lines.append(
                [arm.label, str(place), str(len(rows)), *columns, interval(kls(rows), 1), words]
            )
    return table(["arm", axis, "seeds", "mean score", *QUANTILES, "KL, nats", "words"], lines)


def kls(rows: Sequence[dict[str, Any]]) -> list[float]:
    return [row["kl"] for row in rows]


def reach(arm: Arm) -> str:
    """Which divergences an arm's seeds cover."""
    ends = [f"{curve[0]['kl']:.1f} to {curve[-1]['kl']:.1f}" for curve in arm.curves.values()]
    return "runs are at " + ", ".join(ends)


def matched(arms: list[Arm], kl: float) -> tuple[str, dict[str, list[Distribution]]]:
    """The table at a divergence, and the distributions of the arms that have one there."""
    lines, found = [], {}
    for arm in arms:
        those = [d for curve in arm.curves.values() if (d := at_divergence(curve, kl)) is not None]
        seeds = f"{len(those)} of {len(arm.curves)}"
        note = "" if len(those) == len(arm.curves) else reach(arm)
        columns = score_columns(those) if those else [""] * (1 + len(PERCENTS))
        lines.append([arm.label, seeds, *columns, note])
        if those:
            found[arm.label] = those
    return table(["arm", "seeds", "mean score", *QUANTILES, "not covered"], lines), found


def draws(
    first: list[Distribution], second: list[Distribution], n: int, seed: int
) -> Iterator[tuple[list[Distribution], list[Distribution], np.ndarray]]:
    """Bootstrap draws of seeds and of prompts."""
    random = np.random.default_rng(seed)
    prompts = first[0].scores.shape[1]
    for _ in range(n):
        seeds = [
            [arm[i] for i in random.integers(0, len(arm), len(arm))] for arm in (first, second)
        ]
        yield *seeds, random.integers(0, prompts, prompts)


def below(sample: tuple[np.ndarray, np.ndarray], points: np.ndarray) -> np.ndarray:
    """The sample's distribution function at the points."""
    order = np.argsort(sample[0])
    cumulated = np.concatenate([[0.0], np.cumsum(sample[1][order])])
    places = np.searchsorted(sample[0][order], points, side="right")
    return cumulated[places] / cumulated[-1]


def compare(first: list[Distribution], second: list[Distribution], n: int) -> list[str]:
    """Differences of mean and quantiles, violation ratio and p-values; see the module."""
    u, v = pooled(first), pooled(second)
    gaps = statistics(first) - statistics(second)
    ratio = violation_ratio(u[0], v[0], u[1], v[1])
    points = np.unique(np.concatenate([u[0], v[0]]))
    excess = below(u, points) - below(v, points)
    drawn_gaps, ratios, suprema = [], [], []
    for a, b, prompts in draws(first, second, n, seed=0):
        x, y = pooled(a, prompts), pooled(b, prompts)
        drawn_gaps.append(statistics(a, prompts) - statistics(b, prompts))
        ratios.append(violation_ratio(x[0], y[0], x[1], y[1]))
        change = below(x, points) - below(y, points) - excess
        suprema.append((change.max(), -change.min()))
    low, high = np.quantile(drawn_gaps, (0.025, 0.975), axis=0)
    shown = [f"{g:+.3f} ({a:+.3f}, {b:+.3f})" for g, a, b in zip(gaps, low, high, strict=True)]
    upper = min(ratio + norm.ppf(0.95) * np.nanstd(ratios, ddof=1), 1.0)
    observed = max(excess.max(), 0.0), max(-excess.min(), 0.0)
    # As in order_tests: one is added to both counts. Rounding must not decide a tie.
    counts = (np.array(suprema) >= np.array(observed) - 1e-12).sum(axis=0)
    p_values = [f"{(1 + count) / (n + 1):.3f}" for count in counts]
    return [*shown, f"{ratio:.2f} (to {upper:.2f})", *p_values]


def comparisons(
    arms: list[Arm],
    found: dict[str, list[Distribution]],
    base: dict[str, Any] | None,
    args: argparse.Namespace,
) -> str:
    present = [arm for arm in arms if arm.label in found]
    pairs = [(a.label, b.label) for a, b in pairs_of(present, args.all_pairs)]
    if base is not None:
        found = found | {BASE: [whole(base)]}
        pairs += [(arm.label, BASE) for arm in present]
    lines = [[f"{a} - {b}", *compare(found[a], found[b], args.resamples)] for a, b in pairs]
    tests = ["violation ratio", "p: first dominates", "p: second does"]
    return table(["first - second", "mean", *QUANTILES, *tests], lines)


def draw(
    arms: list[Arm],
    found: dict[str, list[Distribution]],
    base: dict[str, Any] | None,
    title: str,
    file: Path,
) -> None:
    """Quantile curves, a panel per context."""
    from matplotlib.figure import Figure

    contexts = list(dict.fromkeys(arm.context for arm in arms if arm.label in found))
    figure = Figure(figsize=(5.6 * len(contexts), 4.6), layout="constrained")
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    for axes, context in zip(panels, contexts, strict=True):
        samples = {a.label: pooled(found[a.label]) for a in arms if a.context == context}
        samples |= {BASE: pooled([whole(base)])} if base is not None else {}
        for index, (label, (values, masses)) in enumerate(samples.items()):
            curve = quantile_curve(values, values, masses, masses)
            style = {"color": "0.5"} if label == BASE else {"color": f"C{index}"}
            dash = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))[index % 5]
            axes.stairs(curve.x, curve.levels, baseline=None, label=label, linestyle=dash, **style)
        axes.set(xlabel="quantile level", xlim=(0, 1))
        axes.legend(fontsize="x-small", loc="lower right")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("true score of sampled responses")
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def common_divergences(arms: list[Arm]) -> list[float]:
    """Three divergences that as many seeds as possible cover: by default."""
    ends = [(curve[0]["kl"], curve[-1]["kl"]) for a in arms for curve in a.curves.values()]
    low, high = (float(np.median(end)) for end in zip(*ends, strict=True))
    low = max(low, high / 100)  # with `--from-base` curves begin at 0
    if low >= high:
        return []
    return [round(float(kl), 1) for kl in np.geomspace(low, high, 5)[1:-1]]


def analyse(sweep: str, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    rows: list[dict[str, Any]] = []
    for name in sweep.split("+"):
        known = [row["changes"] for row in rows]
        lines = [row for row in read(args.results / f"{name}.jsonl") if "scores" in row]
        rows += [row for row in lines if row["changes"] not in known]
        for row in lines:
            if row["changes"] in known and row["changes"] != {"rl": "none"}:
                at = f"{row['score']:.3f} at {row['kl']:.1f} nats"
                say(f"Left out, since another sweep has it: {name} {row['changes']}, {at}")
    base = next((row for row in rows if row["changes"] == {"rl": "none"}), None)
    axis = AXES.get(sweep.split("+")[0], "learning_rate")
    arms = [arm for arm in arms_of(rows, axis) if arm.curves]
    say(f"\n## {sweep}\n\n{settings_table(arms, base, axis)}")
    curves = [arm._replace(curves=whole_curves(arm)) for arm in arms]
    left_out = {
        seed
        for arm, whole in zip(arms, curves, strict=True)
        for seed in arm.curves.keys() - whole.curves.keys()
    }
    if left_out:
        say(f"\nWithout the seeds {sorted(left_out)}, which lack runs:")
    curves = [arm for arm in curves if arm.curves]
    if args.from_base and base is not None:
        begun = [{seed: [base, *curve] for seed, curve in arm.curves.items()} for arm in curves]
        curves = [arm._replace(curves=each) for arm, each in zip(curves, begun, strict=True)]
    if base is not None:
        before = float(np.mean(base["scores"]))
        say(f"\n{averaged(curves, before, args.all_pairs)}")
    for kl in args.kl or common_divergences(curves) if curves else []:
        text, found = matched(curves, kl)
        say(f"\n### {sweep} at {kl:g} nats\n\n{text}")
        if not found:
            continue
        say(f"\n{comparisons(curves, found, base, args)}")
        if args.figures:
            name = f"quantiles_{sweep}_{kl:g}.png"
            draw(curves, found, base, f"{sweep} at {kl:g} nats", args.figures / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="+", help="`a+b` puts the runs of two together")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--kl", type=float, nargs="+", help="divergences; default: three in range")
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument(
        "--from-base", action="store_true", help="curves begin at the model before training"
    )
    parser.add_argument("--all-pairs", action="store_true", help="compare arms of all contexts")
    parser.add_argument("--figures", type=Path, help="folder of the figures; none if left out")
    args = parser.parse_args()
    for sweep in args.sweeps:
        analyse(sweep, args, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
