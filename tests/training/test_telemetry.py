"""What a run says of itself: the values of a line, and the places that it goes to."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from raylm.settings import Settings
from raylm.storage import StoragePath
from raylm.training.steps import StepResult
from raylm.training.telemetry import MEANINGS, MetricsLog, Window, read_metrics
from tests.cluster.panels import metrics_of

NO_MLFLOW = "needs mlflow: pip install 'raylm[tracking]'"


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 10.0 / step, "tokens_per_s": 1e3, "mfu": 0.25} for step in range(first, last + 1)]


def logged(run: StoragePath, first_step: int, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log rows from a step on, to the end; what the driver hears."""
    heard: list[dict[str, Any]] = []
    log = MetricsLog(run, first_step, heard.append, {"optimizer": {"name": "adamw"}, "seed": 7})
    for row in steps:
        log.add(row)
    log.close()
    return heard


# ---------------------------------------------------------------------------------------- windows


STEP = StepResult(50.0, target_tokens=20, padded_tokens=100, real_tokens=60, flops=10**7, skipped=0, tally=())


def test_a_window_tells_speeds_and_shares() -> None:
    window = Window(torch.device("cpu"), peak=1e9)
    for _ in range(4):
        window.add(STEP)
    time.sleep(0.3)
    window.data_wait_s, window.validation_s, window.checkpoint_s = 0.02, 0.14, 0.06
    told = window.metrics()
    assert told.keys() <= MEANINGS.keys()
    assert told["loss"] == 2.5
    assert 4 * told["step_s"] >= 0.1  # 0.3 s without what was not training
    assert told["tokens_per_s"] == pytest.approx(100 / told["step_s"], rel=0.01)
    assert told["real_tokens_per_s"] == pytest.approx(0.6 * told["tokens_per_s"], rel=0.01)
    assert told["mfu"] == pytest.approx(1e7 / told["step_s"] / 1e9, rel=0.01)
    assert told["data_wait"] == pytest.approx(0.02 / (4 * told["step_s"]), rel=0.01)
    assert told["checkpoint_stall"] == pytest.approx(0.06 / (4 * told["step_s"] + 0.2), rel=0.01)
    assert (told["checkpoint_s"], told["validation_s"]) == (0.06, 0.14)
    assert 0.01 < told["memory_gb"] < 100


def test_a_window_tells_no_utilisation_that_is_not_known() -> None:
    window = Window(torch.device("cpu"), peak=1e9)
    window.add(replace(STEP, flops=None))
    assert not {"mfu", "skipped"} & window.metrics().keys()
    window = Window(torch.device("cpu"), peak=None)
    window.add(replace(STEP, skipped=2))
    assert "mfu" not in window.metrics()  # no peak to hold it against
    assert window.metrics()["skipped"] == 2


# -------------------------------------------------------------------------------- files and boards


def test_a_continued_run_drops_the_rows_that_come_again(tmp_path: Path) -> None:
    run = StoragePath(str(tmp_path / "run"))
    assert logged(run, 0, rows(1, 6)) == rows(1, 6)
    logged(run, 4, [row | {"loss": 0.5} for row in rows(5, 8)])
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 9))
    assert [row["loss"] for row in read_metrics(run)][3:] == [2.5, 0.5, 0.5, 0.5, 0.5]


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = StoragePath(str(tmp_path / "run"))
    logged(run, 0, rows(1, 6))
    logged(run, 4, [row | {"loss": 0.5} for row in rows(5, 8)])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "tokens_per_s", "mfu"}
    seen = {event.step: event.value for event in events.Scalars("loss")}
    assert len(events.Scalars("loss")) == len(seen)
    assert seen == pytest.approx({row["step"]: row["loss"] for row in read_metrics(run)})


WATCHED = """
import json, sys, threading, time, urllib.request
import ray
from raylm.settings import Settings

folder, settings = sys.argv[1], Settings.model_validate_json(sys.stdin.read())
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
         object_store_memory=1 << 28, _system_config={"metrics_report_interval_ms": 1000})
node = ray.nodes()[0]
address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
seen, done = {}, threading.Event()

def scrape():
    while not done.wait(0.3):
        try:
            text = urllib.request.urlopen(address, timeout=5).read().decode()
        except OSError:  # the agent is still starting
            continue
        for line in text.splitlines():
            if line.startswith("ray_raylm_train_"):
                seen[line.partition("{")[0]] = line

watcher = threading.Thread(target=scrape)
watcher.start()
from raylm.training.trainer import pretrain
pretrain(settings)
time.sleep(3)
done.set()
watcher.join()
ray.shutdown()
print(json.dumps(seen))
"""


def test_prometheus_sees_a_run_while_it_trains(small_settings: Settings, corpus: StoragePath) -> None:
    """A Ray of its own, whose workers export each second, is asked as Prometheus asks."""
    values = small_settings.model_dump()
    values["pretrain"] |= {"name": "watched", "workers": 1, "steps": 150, "checkpoint_every": 25, "validate_every": 5}
    settings = Settings.model_validate(values)
    with tempfile.TemporaryDirectory(prefix="raylm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", WATCHED, folder]
        done = subprocess.run(
            command, input=settings.model_dump_json(), capture_output=True, text=True, timeout=900, check=False
        )
    assert done.returncode == 0, done.stderr[-2_000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert {f"ray_raylm_train_{name}" for name in ("step", "loss", "tokens_per_s", "learning_rate")} <= seen.keys()
    assert metrics_of("Training") <= seen.keys()
    assert 'run="watched"' in seen["ray_raylm_train_loss"]
    values = {name: float(line.rpartition(" ")[2]) for name, line in seen.items()}
    told = [row for row in read_metrics(StoragePath(settings.storage) / "runs" / "watched") if "loss" in row]
    assert any(values["ray_raylm_train_loss"] == pytest.approx(row["loss"]) for row in told)


def test_a_missing_mlflow_is_said_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("mlflow"):
        pytest.skip("mlflow is there")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@tracking")
    heard = logged(StoragePath(str(tmp_path / "run")), 0, rows(1, 2))
    notes = [row["note"] for row in heard if "note" in row]
    assert len(notes) == 1
    assert "pip install 'raylm[tracking]'" in notes[0]
    assert "secret" not in notes[0]
    assert [row for row in heard if "note" not in row] == rows(1, 2)


def test_mlflow_shows_a_run_and_its_continuation_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason=NO_MLFLOW)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    run = StoragePath(str(tmp_path / "run"))
    heard = logged(run, 0, rows(1, 4)) + logged(run, 4, rows(5, 8))
    assert [row for row in heard if "note" in row] == []
    logged(StoragePath(str(tmp_path / "other")), 0, rows(1, 1))

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    found = {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}
    assert found.keys() == {"run", "other"}
    assert found["run"].info.status == "FINISHED"
    assert found["run"].data.params == {"optimizer.name": "adamw", "seed": "7"}
    history = client.get_metric_history(found["run"].info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(row["step"], row["loss"]) for row in rows(1, 8)]


def test_an_unreachable_mlflow_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason=NO_MLFLOW)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = StoragePath(str(tmp_path / "run"))
    heard = logged(run, 0, rows(1, 4))
    assert read_metrics(run) == rows(1, 4)
    assert ["tracked there no longer" in row["note"] for row in heard if "note" in row] == [True]
