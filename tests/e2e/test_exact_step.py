"""The gradient of a step does not depend on how the step is cut into micro-batches.

Each test compares whole training runs (losses, gradient norms, final parameters), and each carries
a negative control, sorting inside micro-batches on the same data, which must miss by a wide
margin: on data whose couplings are the identity every method would agree.
"""

from pathlib import Path
from typing import Any

import pytest
from harness import Run, config, paired_rows, train, unpaired_rows, write_rows

pytestmark = pytest.mark.slow

CUTS = ((16, 1), (4, 4), (2, 8), (1, 16))
TOLERANCE = 1e-4


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b))


def assert_same(run: Run, reference: Run, tolerance: float = TOLERANCE) -> None:
    for key in ("loss", "grad_norm"):
        values, expected = run.logged(key), reference.logged(key)
        assert len(values) == len(expected) >= 5
        for step, (a, b) in enumerate(zip(values, expected, strict=True), 1):
            assert relative(a, b) < tolerance, (key, step, a, b)
    for name, parameter in reference.parameters.items():
        difference = (run.parameters[name].float() - parameter.float()).norm()
        assert difference <= tolerance * parameter.float().norm(), name


def assert_differs(run: Run, reference: Run, tolerance: float = TOLERANCE) -> None:
    misses = [
        relative(a, b) for a, b in zip(run.logged("loss"), reference.logged("loss"), strict=True)
    ]
    assert max(misses) > 10 * tolerance, f"the negative control agrees: {misses}"


class Cutter:
    """Runs one config under several cuts of the same effective batch."""

    def __init__(self, tmp_path: Path, model: Path, mode: str, **keys: Any) -> None:
        rows = paired_rows(64) if mode == "paired" else unpaired_rows(64)
        self.data = write_rows(tmp_path / "rows.jsonl", rows)
        self.tmp_path, self.model, self.mode, self.keys = tmp_path, model, mode, keys

    def run(self, micro: int, accumulation: int, **keys: Any) -> Run:
        name = f"{micro}x{accumulation}-" + "-".join(map(str, keys.values()))
        return train(
            config(
                self.model,
                self.data,
                self.tmp_path / name,
                aot_mode=self.mode,
                micro_batch_size=micro,
                gradient_accumulation_steps=accumulation,
                **{**self.keys, **keys},
            )
        )


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.parametrize("penalty", ["logistic", "squared_hinge", "least_squares"])
@pytest.mark.parametrize("sort", ["hard", "soft"])
def test_every_cut_gives_the_same_run(
    mode: str, penalty: str, sort: str, tiny_model: Path, tmp_path: Path
) -> None:
    keys = {"aot_penalty": penalty, "aot_sort": sort, "learning_rate": 0.001}
    if sort == "soft":
        keys["aot_sort_epsilon"] = 2.0  # gaps above 0.5 nats are smoothed: not the hard sort
    cutter = Cutter(tmp_path, tiny_model, mode, **keys)
    whole = cutter.run(16, 1)
    cuts = CUTS[1:] if (penalty, sort) == ("logistic", "hard") else ((2, 8),)
    for micro, accumulation in cuts:
        assert_same(cutter.run(micro, accumulation), whole)
    assert_differs(cutter.run(2, 8, aot_batch="micro_batch"), whole)
