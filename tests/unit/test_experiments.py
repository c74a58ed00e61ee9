"""The scripts of docs/experiments.md: which runs are trained, and what is said of them."""

import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vaderSentiment", reason="the experiments' true score")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend("benchmarks/experiments")
    import analyse
    import run

    return run, analyse


def test_runs_come_seed_by_seed_and_equal_ones_once(scripts: Any, tmp_path: Path) -> None:
    run, _ = scripts
    runs = run.plan(["kto", "matched"], tmp_path, run.Model())
    seeds = [planned.config["seed"] for planned in runs if planned.config]
    assert all(a <= b for a, b in pairwise(seeds))
    assert runs[0].config is None and runs[0].sweeps == ("kto", "matched")
    changes = [json.dumps(planned.changes, sort_keys=True) for planned in runs]
    assert len(set(changes)) == len(changes)
    assert any(planned.sweeps == ("kto", "matched") for planned in runs[1:])

    lines = [json.dumps({"changes": planned.changes}) for planned in runs]
    (tmp_path / "kto.jsonl").write_text("\n".join(lines))
    left = run.plan(["kto", "matched"], tmp_path, run.Model())
    assert {planned.sweeps for planned in left} == {("matched",)}


def test_other_data_is_another_run(scripts: Any) -> None:
    run, _ = scripts
    base = {"rl": "aot", "seed": 1}
    other = {**base, "seed": 2, "datasets": [{"path": "outputs/experiments/data/share_0.2.jsonl"}]}
    assert run.changes_of(other, base) == {"seed": 2, "data": "share_0.2"}


def line(kl: float, mean: float, random: np.random.Generator) -> dict[str, Any]:
    return {"kl": kl, "scores": random.normal(mean, 0.3, (8, 4)).tolist()}


def test_mean_is_interpolated_linearly_in_the_divergences_root(scripts: Any) -> None:
    _, analyse = scripts
    random = np.random.default_rng(0)
    low, high = line(1.0, 0.2, random), line(5.0, 0.6, random)
    found = analyse.at_divergence([low, high], (0.75 + 0.25 * 5.0**0.5) ** 2)
    expected = 0.75 * np.mean(low["scores"]) + 0.25 * np.mean(high["scores"])
    assert analyse.statistics([found])[0] == pytest.approx(expected)
    at_end = analyse.at_divergence([low, high], 5.0)
    assert np.allclose(
        analyse.statistics([at_end])[1:],
        np.quantile(high["scores"], [0.05, 0.25, 0.5], method="inverted_cdf"),
    )
    assert analyse.at_divergence([low, high], 5.1) is None
    assert analyse.at_divergence([low, high], 0.9) is None


def test_gaps_are_averaged_over_the_divergences_that_both_curves_of_a_seed_cover(
    scripts: Any,
) -> None:
    _, analyse = scripts
    noise = np.random.default_rng(2).normal(0.0, 0.3, (8, 4))

    def arm(ahead: float, ranges: dict[int, tuple[float, ...]]) -> Any:
        curves = {
            seed: [{"kl": kl, "scores": (noise + (0.1 + ahead) * kl**0.5).tolist()} for kl in kls]
            for seed, kls in ranges.items()
        }
        return analyse.Arm("", (), curves)

    first = arm(0.2, {1: (1.0, 9.0, 16.0), 2: (4.0, 9.0), 3: (1.0, 2.0), 4: (1.0, 2.0)})
    second = arm(0.0, {1: (4.0, 25.0), 2: (1.0, 16.0), 3: (3.0, 4.0)})
    (low, high, gaps), (*_, others) = analyse.gaps_of_seeds(first, second, noise.mean())
    assert (low, high) == (4.0, 16.0)
    # Root by root 0.2 ahead, over roots from 2 to 4 and from 2 to 3.
    assert (gaps[0], others[0]) == pytest.approx((0.2 * 3.0, 0.2 * 2.5))


def test_the_mean_is_fitted_by_the_root_of_the_divergence(scripts: Any) -> None:
    _, analyse = scripts
    curve = [{"kl": kl, "scores": [[0.3 + kl**0.5 * (0.1 - 0.01 * kl**0.5)]]} for kl in (1, 4, 16)]
    assert analyse.fitted(curve, 0.3)(9.0) == pytest.approx(0.3 + 3 * (0.1 - 0.03))
    arm, other = (
        analyse.Arm(
            "",
            (),
            {1: [{**row, "scores": [[row["scores"][0][0] - lag * row["kl"]]]} for row in curve]},
        )
        for lag in (0.0, 0.001)
    )
    ((*_, gaps),) = analyse.gaps_of_seeds(arm, other, 0.3)
    places = np.linspace(1, 4, analyse.PLACES)[1:-1] ** 2
    assert gaps[0] == pytest.approx(0.001 * places.mean())


def test_a_shifted_sample_dominates_and_is_not_dominated(scripts: Any) -> None:
    _, analyse = scripts
    random = np.random.default_rng(1)
    lower = [analyse.whole(line(1.0, 0.0, random)) for _ in range(3)]
    higher = [d._replace(scores=d.scores + 0.5) for d in lower]
    *gaps, ratio, first, second = analyse.compare(higher, lower, 100)
    assert all(gap.startswith("+0.500") for gap in gaps)
    assert ratio.startswith("0.00")
    assert float(first) == 1.0 and float(second) < 0.05


def test_micro_batch_size_tells_arms_apart_only_where_sorting_depends_on_it(scripts: Any) -> None:
    _, analyse = scripts
    rows = [
        {"changes": {"aot_batch": how, "micro_batch_size": size, "seed": seed}, "kl": 1.0}
        for how, size in (("micro_batch", 2), ("micro_batch", 4), ("step", 2))
        for seed in (1, 2)
    ]
    for row in rows:
        row["changes"]["gradient_accumulation_steps"] = 8 // row["changes"]["micro_batch_size"]
    found = analyse.arms_of(rows, "learning_rate")
    assert [arm.label.split("over ")[1] for arm in found] == [
        "micro-batches of 2",
        "micro-batches of 4",
        "the step",
    ]
    assert len({arm.context for arm in found}) == 1


def test_the_second_model_has_rows_of_its_own(scripts: Any) -> None:
    run, _ = scripts
    first, second = run.Model(), run.Model("student")
    for sweep in ("kto", "shares", "theorem"):
        for one, other in zip(run.configs(sweep, first), run.configs(sweep, second), strict=True):
            for key in ("datasets", "test_datasets"):
                paths = [[entry["path"] for entry in cfg.get(key, [])] for cfg in (one, other)]
                assert len(paths[0]) == len(paths[1])
                assert all("student/" not in path for path in paths[0])
                assert all(path.startswith("outputs/experiments/student/") for path in paths[1])
            assert run.changes_of(one, first.base()) == run.changes_of(other, second.base())


def test_an_adapter_of_another_config_is_not_taken_again(scripts: Any, tmp_path: Path) -> None:
    run, _ = scripts
    config = {"rl": "aot", "lora_alpha": 32}
    assert not run.trained_before(config, tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "config.yml").write_text(json.dumps(config | {"output_dir": str(tmp_path)}))
    assert run.trained_before(config, tmp_path)
    assert not run.trained_before(config | {"lora_alpha": 256}, tmp_path)
    assert not run.trained_before({"rl": "aot"}, tmp_path)


@pytest.mark.parametrize(("true", "false"), [(429, 607), (100, 900), (900, 100)])
def test_every_share_of_positives_is_what_its_name_says(
    scripts: Any, true: int, false: int
) -> None:
    import data

    rows = [{"completion": str(i), "label": i < true} for i in range(true + false)]
    found = data.labels(rows)
    repeated = found.pop("share_0.2_repeated")
    assert sum(row["label"] for row in repeated) == pytest.approx(0.5 * len(repeated), abs=2)
    assert {row["completion"] for row in repeated} == {
        row["completion"] for row in found["share_0.2"]
    }
    assert len({len(each) for each in found.values()}) == 1
    for share in data.SHARES:
        each = found[f"share_{share}"]
        assert sum(row["label"] for row in each) == pytest.approx(share * len(each), abs=1)
    for flip in data.FLIPS:
        each = found[f"flip_{flip}"]
        assert sum(row["label"] for row in each) == pytest.approx(0.5 * len(each), abs=1)
        wrong = sum(row["label"] is not (int(row["completion"]) < true) for row in each)
        assert wrong == pytest.approx(flip * len(each), abs=2)
