"""Reference log-probabilities on disk: one pass for all runs that ask the same reference."""

import math
from pathlib import Path

import pytest
from harness import Run, config, paired_rows, train, unpaired_rows, write_config, write_rows
from host_process import start_axolotl

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
PASS = "Computing reference log probs"


def write(tmp_path: Path, mode: str) -> Path:
    rows = paired_rows(24) if mode == "paired" else unpaired_rows(24)
    return write_rows(tmp_path / "rows.jsonl", rows)


def cached_in(tmp_path: Path) -> set[Path]:
    folder = tmp_path / "prepared" / "aot_reference"
    return {file for file in folder.glob("*.arrow") if len(file.stem) == 64 + 1 + 32}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_runs_of_a_sweep_share_it(
    mode: str, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, mode)

    def run(name: str, cached: bool = True, model: Path = tiny_model, **keys: object) -> Run:
        keys = {**LORA, "aot_mode": mode, "max_steps": 2, "save_steps": 1, **keys}
        cfg = config(model, data, tmp_path / name, precompute_ref_log_probs=cached, **keys)
        return train(cfg | {"dataset_num_proc": 0})

    def passes() -> int:
        return capfd.readouterr().err.count(f"{PASS} for train dataset: 100%")

    first = run("first")
    assert passes() > 0
    files = cached_in(tmp_path)
    assert len(files) == 1
    again = run("again")
    other = run("other", rl_beta=0.5, lora_r=2, seed=2, learning_rate=0.001)
    assert passes() == 0
    assert cached_in(tmp_path) == files
    # What was read is what would have been computed.
    assert again.logged("loss") == first.logged("loss")
    plain = run("plain", cached=False, rl_beta=0.5, lora_r=2, seed=2, learning_rate=0.001)
    assert other.logged("loss") == pytest.approx(plain.logged("loss"), rel=1e-5)
    # Another reference: a model that was trained in between.
    trained = run("trained", cached=False, adapter=None)
    passes()
    run("next", model=trained.checkpoint)
    assert passes() > 0
    assert len(cached_in(tmp_path)) == 2
    # A resumed run reads what the broken one has read.
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert passes() == 0
    assert resumed.logged("loss") == first.logged("loss")
    # The same weights in another model, and by other kernels.
    positions = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    turned = run("turned", overrides_of_model_config=positions)
    assert passes() > 0
    assert turned.logged("loss")[0] == pytest.approx(math.log(2), rel=1e-5)
    assert turned.logged("logps/chosen")[0] != pytest.approx(first.logged("logps/chosen")[0])
    run("eager", attn_implementation="eager")
    assert passes() > 0
    assert len(cached_in(tmp_path)) == 4
    run("turned again", overrides_of_model_config=positions)
    assert passes() == 0


@pytest.mark.slow
def test_two_runs_may_write_at_once(tiny_model: Path, tmp_path: Path) -> None:
    data = write(tmp_path, "paired")
    runs = {}
    for name in ("one", "two"):
        cfg = config(
            tiny_model, data, tmp_path / name, precompute_ref_log_probs=True, max_steps=2, **LORA
        )
        path = write_config(tmp_path / f"{name}.yml", cfg)
        log = tmp_path / f"{name}.log"
        runs[name] = start_axolotl("train", path, "--launcher", "python", log=log)
    codes = {name: process.wait() for name, process in runs.items()}
    logs = {name: process.log.read_text() for name, process in runs.items()}
    assert codes == {"one": 0, "two": 0}, logs
    losses = [Run.last(tmp_path / name).logged("loss") for name in runs]
    assert losses[0] == losses[1]
    # One if the second came late, with the same name for both but for the random end.
    assert len({file.stem[:64] for file in cached_in(tmp_path)}) == 1
