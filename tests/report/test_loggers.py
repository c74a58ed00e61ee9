"""Images and tables reach real loggers, offline, and are read back from what these wrote."""

import contextlib
import io
import json
import os
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from aot_plugin.report import Samples, log_figure_to_loggers, log_table_to_loggers

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


SAMPLES = Samples(7, "eval_set", ["Why?", 'a "b"\n| c'], ["Because.", "ü"])
ANSWERS = [[7, "Why?", "Because."], [7, 'a "b"\n| c', "ü"]]


@pytest.fixture
def table(tmp_path):
    return SAMPLES.table(), SAMPLES.save(tmp_path)


def test_wandb_offline(picture, table, tmp_path, monkeypatch):
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
        assert log_table_to_loggers(*table, 7, ["wandb"]) == ["wandb"]
        [stored] = tmp_path.glob("wandb/offline-run-*/files/media/table/aot/*.table.json")
        assert stored.name.startswith("samples-eval_set_")
        stored = json.loads(stored.read_text())
        assert (stored["columns"], stored["data"]) == (["step", "prompt", "answer"], ANSWERS)
    finally:
        run.finish()


def test_mlflow_gets_artifacts(picture, table, tmp_path, monkeypatch):
    # Files, where a database would need more than the light package.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    path, _ = picture
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"file://{tmp_path / 'mlruns'}")
    try:
        with mlflow.start_run():
            assert log_figure_to_loggers(path, 7, ["mlflow"]) == ["mlflow"]
            for _ in range(2):  # of two evaluations
                assert log_table_to_loggers(*table, 7, ["mlflow"]) == ["mlflow"]
    finally:
        mlflow.set_tracking_uri(before)
    [stored] = tmp_path.glob("mlruns/**/artifacts/aot/*.png")
    assert stored.name == path.name
    assert stored.read_bytes() == path.read_bytes()
    [stored] = tmp_path.glob("mlruns/**/artifacts/aot/samples-eval_set.json")
    assert json.loads(stored.read_text())["data"] == ANSWERS * 2


TRACKIO = """
import sys
import trackio
from aot_plugin.report import log_figure_to_loggers, log_table_to_loggers

columns = {"step": [7], "prompt": ["Why?"], "answer": ["Because."]}
trackio.init(project="aot-plugin-test", name="run")
print("TOOK", log_figure_to_loggers(sys.argv[1], 7, ["trackio"]))
print("TOOK", log_table_to_loggers(columns, "samples-eval_set-step7.jsonl", 7, ["trackio"]))
trackio.finish()
"""


def test_trackio_gets_an_image_and_a_table(picture, tmp_path):
    """In a process of its own: trackio reads where to write when it is imported."""
    pytest.importorskip("trackio")
    path, pixels = picture
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(path)],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("TOOK ['trackio']") == 2
    [database] = tmp_path.glob("trackio/*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        logged = [row[0] for row in connection.execute("SELECT metrics FROM metrics")]
    [table] = [found for found in map(json.loads, logged) if "aot/samples-eval_set" in found]
    assert table["aot/samples-eval_set"]["_value"] == [
        {"step": 7, "prompt": "Why?", "answer": "Because."}
    ]
    [stored] = tmp_path.glob("trackio/media/**/*.png")
    np.testing.assert_array_equal(np.asarray(Image.open(stored)), pixels)


def test_libraries_that_are_not_loaded_stay_so(picture, table, monkeypatch):
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    everything = ["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "none"]
    assert log_figure_to_loggers(picture[0], 7, everything) == []
    assert log_table_to_loggers(*table, 7, everything) == []
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
