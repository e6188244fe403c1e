"""The scripts that `ray job submit` runs, and one of them submitted to a Ray started by hand."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from raylm.cli import main
from raylm.settings import Settings
from raylm.storage import Manifest, StoragePath
from tests.conftest import REPOSITORY

JOBS = sorted((REPOSITORY / "jobs").glob("*.py"))
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_job_is_a_short_runnable_script_with_its_command(job: Path) -> None:
    text = job.read_text()
    assert text.startswith("#!/usr/bin/env python\n")
    assert os.access(job, os.X_OK)
    assert len(text.splitlines()) <= 40
    documentation = ast.get_docstring(ast.parse(text)) or ""
    assert "ray job submit --working-dir . " in documentation
    assert f"jobs/{job.name}" in documentation
    assert job.stem.replace("_", "-") in main.commands  # type: ignore[attr-defined]


def test_every_stage_has_its_job() -> None:
    assert {job.stem for job in JOBS} == {
        "prepare", "pretrain", "finetune", "evaluate", "export", "serve",
        "batch_translate", "batch_summarize", "batch_generate", "batch_classify", "batch_answer",
    }  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A shell with the environment of this test activated, of a person who has not talked to any Ray yet."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"HOME": str(tmp_path), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def dashboard(environment: dict[str, str]) -> Iterator[str]:
    """The address of a Ray head with a dashboard, started as a person starts one; ended by its process group."""
    ports = [_free_port() for _ in range(3)]
    with tempfile.TemporaryDirectory(prefix="raylm-", dir="/tmp") as directory:
        head = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", f"--port={ports[0]}", f"--dashboard-port={ports[1]}",
             f"--dashboard-agent-listen-port={ports[2]}", f"--temp-dir={directory}", "--num-cpus=4",
             "--object-store-memory=500000000", "--disable-usage-stats"],
            start_new_session=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        address = f"http://127.0.0.1:{ports[1]}"
        try:
            _wait_for_agent(address, head)
            yield address
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            try:
                head.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for_agent(address: str, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, "the head node ended"
        try:
            with urllib.request.urlopen(f"{address}/api/jobs/", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)


def test_pretraining_is_submitted_to_a_ray_started_by_hand(
    dashboard: str, small_settings: Settings, tmp_path: Path, environment: dict[str, str]
) -> None:
    values = small_settings.model_dump(mode="json") | {"storage": str(tmp_path / "storage")}
    values["pretrain"] |= {"steps": 4, "checkpoint_every": 4}
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump({"cluster_name": "x", "metadata": {"raylm": values}}))
    found = subprocess.run(
        [BIN / "ray", "job", "submit", "--address", dashboard, "--working-dir", ".", "--",
         "jobs/pretrain.py", "--cluster", cluster],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False, env=environment,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert "succeeded" in found.stdout
    manifest = Manifest.read(StoragePath(str(tmp_path / "storage/runs/pretrain")))
    assert manifest is not None
    assert manifest.metrics["step"] == 4
