"""Stopping a training as a person does, and starting it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from raylm.settings import Settings
from raylm.storage import Manifest, StoragePath
from raylm.training import checkpoint as checkpoints
from raylm.training.telemetry import read_metrics


@pytest.mark.parametrize(("number", "goes_on"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_stopped_training_saves_first_and_the_same_command_goes_on(
    small_settings: Settings, tmp_path: Path, number: signal.Signals, goes_on: bool
) -> None:
    values = small_settings.model_dump(mode="json") | {"storage": str(tmp_path / "storage")}
    # No checkpoint is due: there is one because the training was stopped.
    values["pretrain"] |= {"steps": 100_000, "checkpoint_every": 100_000, "validate_every": 100_000, "workers": 1}
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump({"cluster_name": "x", "metadata": {"raylm": values}}))
    command = [sys.executable, "-m", "raylm", "pretrain", "--cluster", str(cluster)]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    run = StoragePath(str(tmp_path / "storage/runs/pretrain"))
    said = tmp_path / "log"

    with said.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 600
            while "tokens/s  loss" not in said.read_text():
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.5)
            process.send_signal(number)
            assert process.wait(timeout=240) == 130, said.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert "stopping: a checkpoint is written after this step" in said.read_text()
    assert "the same command continues" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert Manifest.read(run) is None

    [checkpoint] = checkpoints.checkpoints(run)
    assert checkpoint.fault() is None
    assert len(read_metrics(run)) == checkpoint.step
    if not goes_on:
        return
    found = subprocess.run(
        [*command, "--set", f"pretrain.steps={checkpoint.step + 3}"],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    manifest = Manifest.read(run)
    assert manifest is not None
    assert manifest.metrics["step"] == checkpoint.step + 3
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, checkpoint.step + 4))
