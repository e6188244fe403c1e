"""Stopping a training as a person does, and starting it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from raylm.settings import Settings
from raylm.storage import Manifest, StoragePath
from raylm.training import checkpoint as checkpoints


def test_ctrl_c_keeps_the_checkpoints_and_the_same_command_goes_on(small_settings: Settings, tmp_path: Path) -> None:
    values = small_settings.model_dump(mode="json") | {"storage": str(tmp_path / "storage")}
    values["pretrain"] |= {"steps": 100_000, "checkpoint_every": 5, "workers": 1}
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump({"cluster_name": "x", "metadata": {"raylm": values}}))
    command = [sys.executable, "-m", "raylm", "pretrain", "--cluster", str(cluster)]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    run = StoragePath(str(tmp_path / "storage/runs/pretrain"))

    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 180
            while not checkpoints.checkpoints(run):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    assert "the same command continues" in said
    assert "Traceback" not in said
    assert Manifest.read(run) is None

    reached = checkpoints.checkpoints(run)[-1].step
    found = subprocess.run(
        [*command, "--set", f"pretrain.steps={reached + 3}"],
        capture_output=True, text=True, env=environment, timeout=180, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    manifest = Manifest.read(run)
    assert manifest is not None
    assert manifest.metrics["step"] == reached + 3
