"""Runs of one step cut into micro-batches in several ways, and what it means that they agree."""

from pathlib import Path
from typing import Any

from harness import Run, config, paired_rows, train, unpaired_rows, write_rows

TOLERANCE = 1e-4
NO_SIGNS = {"adam_epsilon": 1e-4}
"""With its usual epsilon Adam makes whole steps of a gradient that is rounding only."""
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def assert_same(
    run: Run,
    reference: Run,
    tolerance: float = TOLERANCE,
    steps: int = 5,
    logged: tuple[str, ...] = ("loss", "grad_norm"),
) -> None:
    """Logged values of all steps and the final parameters agree."""
    for key in logged:
        values, expected = run.logged(key), reference.logged(key)
        assert len(values) == len(expected) >= steps
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

    def __init__(self, tmp_path: Path, model: Path, mode: str, rows: int = 64, **keys: Any) -> None:
        data = paired_rows(rows) if mode == "paired" else unpaired_rows(rows)
        self.data = write_rows(tmp_path / "rows.jsonl", data)
        self.tmp_path, self.model, self.mode, self.keys = tmp_path, model, mode, keys

    def run(self, micro: int, accumulation: int, **keys: Any) -> Run:
        name = f"{micro}x{accumulation}-{len(list(self.tmp_path.iterdir()))}"
        return train(
            config(
                self.model,
                self.data,
                self.tmp_path / name,
                **{
                    "aot_mode": self.mode,
                    "micro_batch_size": micro,
                    "gradient_accumulation_steps": accumulation,
                    **self.keys,
                    **keys,
                },
            )
        )
