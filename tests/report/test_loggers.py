"""Images reach real loggers, offline, and are read back from what these wrote."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from aot_plugin.report import log_figure_to_loggers

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def picture(tmp_path):
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    path = tmp_path / "quantiles-eval_set-step7.png"
    Image.fromarray(pixels).save(path)
    return path, pixels


def test_tensorboard(picture, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    path, pixels = picture
    with tensorboard.SummaryWriter(tmp_path / "tb") as writer:
        callbacks = [object(), TensorBoardCallback(writer)]
        assert log_figure_to_loggers(path, 7, ["tensorboard"], callbacks) == ["tensorboard"]
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    [image] = events.Images("aot/quantiles-eval_set")
    assert image.step == 7
    read = Image.open(io.BytesIO(image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(read), pixels)


def test_wandb_offline(picture, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    path, _ = picture
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="aot-plugin-test", mode="offline", dir=tmp_path)
    try:
        assert log_figure_to_loggers(path, 7, ["wandb"]) == ["wandb"]
        [stored] = tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png")
        assert stored.read_bytes() == path.read_bytes()
        assert run.summary["train/global_step"] == 7
        assert "aot/quantiles-eval_set" in run.summary.keys()  # noqa: SIM118 - it's no dict
    finally:
        run.finish()


def test_mlflow_gets_an_artifact(picture, monkeypatch):
    path, _ = picture
    calls = []
    mlflow = SimpleNamespace(
        active_run=lambda: "a run",
        log_artifact=lambda local_path, artifact_path: calls.append((local_path, artifact_path)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    assert log_figure_to_loggers(path, 7, ["mlflow"]) == ["mlflow"]
    assert calls == [(str(path), "aot")]


def test_trackio_gets_an_image(picture, monkeypatch):
    path, _ = picture
    calls = []
    run = SimpleNamespace(get=lambda: "a run")
    trackio = SimpleNamespace(
        context_vars=SimpleNamespace(current_run=run),
        Image=lambda file: ("image", file),
        log=calls.append,
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    assert log_figure_to_loggers(path, 7, ["trackio"]) == ["trackio"]
    assert calls == [{"aot/quantiles-eval_set": ("image", str(path)), "train/global_step": 7}]


def test_the_real_trackio_has_the_names_used():
    trackio = pytest.importorskip("trackio")
    assert trackio.context_vars.current_run.get() is None
    assert callable(trackio.Image) and callable(trackio.log)


def test_libraries_that_are_not_loaded_stay_so(picture, monkeypatch):
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    everything = ["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "none"]
    assert log_figure_to_loggers(picture[0], 7, everything) == []
    assert not {"wandb", "mlflow", "trackio"} & set(sys.modules)


def test_a_logger_without_an_active_run_is_passed_over(picture, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(active_run=lambda: None))
    assert log_figure_to_loggers(picture[0], 7, ["wandb", "mlflow"]) == []
    assert caplog.records == []  # passed over, not tried in vain


def test_a_failing_logger_does_not_stop_the_next(picture, monkeypatch, caplog):
    def fail(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run="a run", Image=fail, log=fail))
    writer = SimpleNamespace(add_image=lambda *_, **__: None)
    callbacks = [SimpleNamespace(tb_writer=writer)]
    took = log_figure_to_loggers(picture[0], 7, ["wandb", "tensorboard"], callbacks)
    assert took == ["tensorboard"]
    assert "wandb didn't take quantiles-eval_set-step7.png" in caplog.text
