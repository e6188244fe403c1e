"""A preparation that is killed again and again, with everything of it, ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from raylm.corpus.plan import WORK
from raylm.corpus.prepare import prepare
from raylm.settings import Settings
from raylm.storage import Manifest, StoragePath
from tests.corpus.test_pipeline import document, settings, write_jsonl

KILLS = 4


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a driver with the whole Ray that it started: raylet, workers and all."""
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):  # an idle worker that has just ended
            member.suspend()
    family += [child for child in root.children(recursive=True) if child not in family]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def results(work: Path) -> dict[str, int]:
    """The published results of all steps, with their times."""
    return {str(path.relative_to(work)): path.stat().st_mtime_ns for path in work.rglob("*.json")}


def test_kill_9_at_any_point_changes_no_byte_and_costs_no_finished_item(tmp_path: Path, ray_cluster: None) -> None:
    sources = [write_jsonl(tmp_path / f"{n}.jsonl", [document(n * 1_000 + m) for m in range(250)]) for n in range(6)]
    corpus = {"documents": sources, "shard_mb": 0.15, "pack": {"max_document_tokens": 200}}
    undisturbed = prepare(settings(tmp_path / "undisturbed", **corpus))

    disturbed: Settings = settings(tmp_path / "disturbed", **corpus)
    cluster = tmp_path / "cluster.yaml"
    values = disturbed.model_dump(mode="json")
    cluster.write_text(yaml.safe_dump({"cluster_name": "x", "metadata": {"raylm": values}}))
    command = [sys.executable, "-m", "raylm", "prepare", "--cluster", str(cluster)]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    work = tmp_path / "disturbed/storage/tokens/default" / WORK
    rng = random.Random(20)
    total = len(results(tmp_path / "undisturbed/storage/tokens/default" / WORK))
    parts = len([entry for entry in undisturbed.outputs if entry["name"].startswith("documents/train/")])
    finished: dict[str, int] = {}
    for goal in sorted(rng.sample(range(1, total - parts), KILLS)):
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + 400
        while len(results(work) if work.exists() else {}) < goal:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        kill_all(process)
        assert Manifest.read(StoragePath(str(work.parent))) is None
        now = results(work)
        assert finished.items() <= now.items(), "what was finished was done again"
        finished = now
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=400)
    assert finished.items() <= results(work).items()
    manifest = Manifest.read(StoragePath(str(work.parent)))
    assert manifest is not None
    assert manifest.outputs == undisturbed.outputs
    assert manifest.counts == undisturbed.counts
