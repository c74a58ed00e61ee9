"""The short line per log."""

from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from aot_plugin.host.callbacks import StepLine, summary
from aot_plugin.plugin import AOTPlugin

METRICS = {
    "aot/violation_fraction": 0.125,
    "aot/violation_amount": 0.13362,
    "aot/dominance_amount": 2.861,
    "aot/recoupled_fraction": 0.875,
}


def test_what_to_look_at_stands_on_one_line() -> None:
    line = summary({"loss": 0.57014, **METRICS}, "step 2/4", 9.4812, "pairs")
    assert line == (
        "step 2/4  loss 0.5701 | violation 12% of levels, 0.134 nats | dominance 2.86 nats | "
        "recoupled 88% | 9.48 pairs/s"
    )
    assert "0.134 nats per token |" in summary(
        {"loss": 0.5, **METRICS}, "step 2/4", unit="nats per token"
    )
    evaluation = {"eval_loss": 0.5, **{f"eval_{key}": value for key, value in METRICS.items()}}
    assert summary(evaluation, "step 2/4").startswith("step 2/4  eval_loss 0.5 | violation 12%")


@pytest.mark.parametrize("logs", [{"train_runtime": 3.0, **METRICS}, {"loss": 0.5}, {}])
def test_other_logs_have_none(logs: dict[str, float]) -> None:
    assert summary(logs, "step 4/4") is None


@pytest.mark.parametrize("main", [True, False])
def test_the_main_process_says_it_and_an_evaluation_is_no_training_time(
    main: bool, tmp_path: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 1.0, 101.0, 102.0, 102.0])
    monkeypatch.setattr("aot_plugin.host.callbacks.time.perf_counter", lambda: next(clock))
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, use_cpu=True
    )
    state = TrainerState(is_world_process_zero=main, global_step=2, max_steps=4)
    common = (args, state, TrainerControl())
    line = StepLine("pairs", ranks=3)
    line.on_step_end(*common)
    line.on_evaluate(*common)  # took 100 s
    line.on_step_end(*common)
    line.on_log(*common, logs={"loss": 0.5, **METRICS})
    out = capsys.readouterr().out
    assert ("24 pairs/s" in out) == main and bool(out) == main


def test_another_rl_has_no_callbacks() -> None:
    from axolotl.utils.dict import DictDefault

    assert AOTPlugin().add_callbacks_post_trainer(DictDefault({"rl": "dpo"}), None) == []
