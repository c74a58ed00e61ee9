"""What a kill at the worst moment leaves, made by hand: it is found, and nothing of it is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.integrations.base import PluginManager
from axolotl.utils.train import determine_last_checkpoint
from harness import config, paired_rows, unpaired_rows, write_config, write_rows

from aot_plugin.host.recovery import discard_half_prepared, set_aside_half_checkpoints


@pytest.fixture
def loaded(tiny_model: Path, tmp_path: Path) -> Any:
    """``loaded(**keys)``: a validated config over 12 rows."""

    def run(**keys: Any) -> Any:
        rows = unpaired_rows(12) if keys.get("aot_mode") == "unpaired" else paired_rows(12)
        data = write_rows(tmp_path / "rows.jsonl", rows)
        cfg = config(tiny_model, data, tmp_path / "out", dataset_num_proc=0, **keys)
        return load_cfg(str(write_config(tmp_path / "config.yml", cfg)))

    return run


def checkpoint(folder: Path, step: int) -> Path:
    """The files of a checkpoint that decide whether it is whole."""
    import torch

    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    torch.save({"step": step}, path / "rng_state_1.pth")
    return path


def without_state(path: Path) -> None:
    (path / "trainer_state.json").unlink()


def half_state(path: Path) -> None:
    state = path / "trainer_state.json"
    state.write_text(state.read_text()[:-3])


def half_of_another_rank(path: Path) -> None:
    saved = path / "rng_state_1.pth"
    saved.write_bytes(saved.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [without_state, half_state, half_of_another_rank])
def test_a_half_checkpoint_is_set_aside(harm: Callable[[Path], None], loaded: Any) -> None:
    cfg = loaded(auto_resume_from_checkpoints=True)
    out = Path(cfg.output_dir)
    whole, half = checkpoint(out, 2), checkpoint(out, 10)
    (out / "incomplete-checkpoint-10").mkdir()  # of an earlier kill
    harm(half)
    assert determine_last_checkpoint(cfg, update=False) == str(half)  # what the host would read
    set_aside_half_checkpoints(cfg)
    assert determine_last_checkpoint(cfg, update=False) == str(whole)
    assert not half.exists() and (out / "incomplete-checkpoint-10" / "rng_state_1.pth").exists()
    set_aside_half_checkpoints(cfg)
    assert whole.exists()


def test_checkpoints_are_left_alone_without_the_hosts_key(loaded: Any) -> None:
    cfg = loaded()
    half = checkpoint(Path(cfg.output_dir), 2)
    without_state(half)
    set_aside_half_checkpoints(cfg)
    assert half.exists()


def test_resuming_from_a_half_checkpoint_by_name_is_refused(loaded: Any, tmp_path: Path) -> None:
    half = checkpoint(tmp_path / "out", 2)
    without_state(half)
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint: .*checkpoint-2`.*half"):
        set_aside_half_checkpoints(loaded(resume_from_checkpoint=str(half)))


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", None])
def test_half_prepared_rows_are_prepared_anew(mode: str, file: str | None, loaded: Any) -> None:
    cfg = loaded(aot_mode=mode)
    rows = load_preference_datasets(cfg=cfg).train_dataset.to_list()
    (folder,) = (path.parent for path in Path(cfg.dataset_prepared_path).glob("*/state.json"))
    discard_half_prepared(cfg)
    assert (folder / "state.json").exists()  # whole: kept
    for name in (file,) if file else ("state.json", "dataset_info.json"):
        (folder / name).write_text((folder / name).read_text()[:5])
    with pytest.raises(Exception):  # noqa: B017  (the host reads what is there, whatever that is)
        load_preference_datasets(cfg=cfg)
    load_datasets = PluginManager.get_instance().load_datasets
    meta = load_datasets(cfg) or load_preference_datasets(cfg=cfg)
    assert meta.train_dataset.to_list() == rows


def test_another_runs_folders_are_left_alone(loaded: Any) -> None:
    cfg = loaded()
    load_preference_datasets(cfg=cfg)
    other = Path(cfg.dataset_prepared_path) / "other"
    other.mkdir()
    (other / "data-00000-of-00001.arrow").write_bytes(b"half")
    discard_half_prepared(cfg, preprocess=True)
    assert other.exists()
    assert [path for path in other.parent.iterdir() if path.is_dir()] == [other]
    shutil.rmtree(other)
