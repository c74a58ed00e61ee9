"""`aot_order: second` in training: exact over every cut of a step, and not the first order."""

from pathlib import Path

import pytest
from cuts import LORA, NO_SIGNS, Cutter, assert_differs, assert_same

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_every_cut_gives_the_same_run(mode: str, tiny_model: Path, tmp_path: Path) -> None:
    keys = {"aot_order": "second", "learning_rate": 0.01, "rl_beta": 0.5, **NO_SIGNS, **LORA}
    cutter = Cutter(tmp_path, tiny_model, mode, **keys)
    whole = cutter.run(16, 1)
    assert_same(cutter.run(1, 16), whole)
    assert_differs(cutter.run(4, 4, aot_batch="micro_batch"), whole)
    assert_differs(cutter.run(16, 1, aot_order="first"), whole)
    last = whole.history[-2]
    assert 0 <= last["aot/second_order_violation_fraction"] <= 1
