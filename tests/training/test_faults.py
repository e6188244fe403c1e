"""Machines that are taken away, lost or added, and workers that do not answer: nothing is lost, and nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from raylm.settings import Settings
from raylm.storage import StoragePath
from raylm.training import checkpoint as checkpoints
from raylm.training.runs import run_directory
from raylm.training.telemetry import read_metrics
from raylm.training.trainer import pretrain
from tests.conftest import REPOSITORY
from tests.training.runs import changed, losses, worker_processes


def disturbed(settings: Settings, name: str, **values: object) -> Settings:
    common = {"log_every": 1, "validate_every": 10_000, "validation_batches": 1, "global_batch_tokens": 512}
    return changed(settings, pretrain=common | {"name": name, "schedule": "constant", "learning_rate": 1e-4, **values})


@pytest.mark.slow
def test_machines_go_and_come_and_no_step_is_lost(
    small_settings: Settings, corpus: StoragePath, tmp_path: Path
) -> None:
    settings = disturbed(small_settings, "elastic", workers=(1, 2), steps=1_000_000, checkpoint_every=500)
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    environment = os.environ | {"RAY_ADDRESS": ""}
    command = [
        sys.executable,
        "-m",
        "tests.training.elastic",
        str(tmp_path / "settings.json"),
        str(tmp_path / "r.json"),
    ]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=1_800, cwd=REPOSITORY, env=environment
    )
    assert found.returncode == 0, found.stderr[-3_000:]
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["stopped"]
    sizes = [start["world_size"] for start in result["starts"]]
    # A dead machine may be taken for one with room until Ray notices: a pause more, which costs no step.
    assert (sizes[:2], set(sizes[2:-2]) - {1}, sizes[-2:]) == ([2, 1], set(), [2, 2])
    pauses = [note for note in result["notes"] if "training pauses" in note]
    assert "(a machine will be taken away)" in pauses[0]  # by the cloud's notice, which its watch has passed on
    assert all("(there are machines for more workers)" in pause for pause in pauses[1:-1])
    assert "(stop)" in pauses[-1]
    # The killed group said nothing; the last one was stopped.
    assert len(pauses) == len(sizes) - 1
    # Each group begins at the very step where the one before it paused; the killed one's lost its interval at most.
    for pause, start in zip(pauses[:-1], result["starts"][1:], strict=False):
        assert pause.startswith(f"step {start['step']}:")
    assert result["step_at_kill"] - result["starts"][-1]["step"] <= 500
    assert result["after_notice_s"] < 60
    assert result["after_kill_s"] < 60

    run = run_directory(settings, "elastic")
    [*_, last] = checkpoints.checkpoints(run)
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, last.step + 1))
    assert pauses[-1].startswith(f"step {last.step}:")
    whole = disturbed(small_settings, "whole", workers=2, steps=150, checkpoint_every=150)
    pretrain(whole)
    assert losses(run)[:150] == pytest.approx(losses(run_directory(whole, "whole")), abs=1e-4)


def test_an_elastic_group_is_as_large_as_other_work_lets_it_be(small_settings: Settings, corpus: StoragePath) -> None:
    import ray

    @ray.remote(num_cpus=2)
    class Busy:
        def is_ready(self) -> bool:
            return True

    busy = Busy.remote()
    assert ray.get(busy.is_ready.remote())
    try:
        manifest = pretrain(disturbed(small_settings, "beside", workers=(1, 4), steps=20, checkpoint_every=20))
    finally:
        ray.kill(busy)
    assert (manifest.metrics["workers"], manifest.metrics["step"]) == (2, 20)


def test_a_worker_that_does_not_answer_is_given_up(
    small_settings: Settings, corpus: StoragePath, tmp_path: Path
) -> None:
    settings = disturbed(
        small_settings, "silent", workers=2, steps=150, checkpoint_every=25, collective_timeout_s=15, max_failures=6
    )
    run = run_directory(settings, "silent")
    stopped: list[int] = []

    def silence() -> None:
        while not checkpoints.checkpoints(run):
            time.sleep(0.2)
        while not (workers := worker_processes()):
            time.sleep(0.2)
        stopped.append(workers[-1].pid)
        os.kill(workers[-1].pid, signal.SIGSTOP)

    thread = threading.Thread(target=silence, daemon=True)
    thread.start()
    try:
        manifest = pretrain(settings)
    finally:
        for pid in stopped:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
    assert stopped
    assert manifest.metrics["step"] == 150
    assert len(losses(run)) == 150
