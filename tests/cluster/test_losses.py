"""Machines that die under a batch job, the head among them: the job ends as if nothing had been."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

from raylm.settings import Settings
from tests.cluster.conftest import PATIENCE_S, REPOSITORY, Cluster
from tests.inference.conftest import build_model_directory, english_sentences

ROWS = 12_000
T = TypeVar("T")


def with_a_driver(values: dict[str, Any]) -> None:
    """The head drives no job, as on the clouds: one machine does that, others compute."""
    nodes = values["available_node_types"]
    nodes["head"]["resources"] = {"CPU": 0}
    nodes["worker"]["resources"] = {"CPU": 1}
    nodes["driver"] = {"resources": {"CPU": 0, "driver": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1}
    values["max_workers"] = 3
    values["metadata"]["raylm"]["job"]["entrypoint_resources"] = {"driver": 1}


def wait_for(what: str, condition: Callable[[], T], job: subprocess.Popen[str]) -> T:
    """What a condition gives, once it gives something."""
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert job.poll() is None, f"the job ended before there was {what}"
        assert time.monotonic() < end, f"no {what} after {PATIENCE_S} s"
        time.sleep(0.1)
    return found


def kill(processes: Iterable[psutil.Process], but: str = "") -> None:
    """Kill processes, all but those of a name, and wait for their end."""
    killed = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.name() != but:
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=30)


def names(cluster: Cluster, node: str) -> list[str]:
    """What runs on a machine."""
    found = []
    for process in cluster.processes_of(node):
        with suppress(psutil.NoSuchProcess):
            found.append(" ".join(process.cmdline()))
    return found


def computing(cluster: Cluster) -> list[str]:
    """The machines with an engine."""
    workers = cluster.provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: "worker"})
    return [node for node in workers if "ray::MapWorker" in " ".join(names(cluster, node))]


@pytest.mark.slow
def test_a_job_outlives_its_head_and_a_worker(tmp_path: Path, small_settings: Settings) -> None:
    sentences, model_directory = english_sentences(4_000), tmp_path / "model"
    build_model_directory(model_directory, sentences)
    texts = [f"{sentences[number % len(sentences)]} {number}" for number in range(ROWS)]
    source, result = tmp_path / "t.parquet", tmp_path / "t.translated.parquet"
    pq.write_table(pa.table({"id": range(ROWS), "text": texts}), source)
    parts = Path(f"{result}.raylm") / "parts"

    def done() -> int:
        return len(list(parts.glob("*/part-*.arrow")))

    cluster = Cluster(tmp_path, small_settings, "127.77.7", with_a_driver)
    address = f"http://127.0.0.1:{cluster.dashboard}"
    with cluster.running():
        job = subprocess.Popen(
            [sys.executable, "-m", "raylm", "submit", "--cluster", str(cluster.file), "jobs/batch_translate.py",
             str(source), "--model", str(model_directory), "--set", "batch.chunk_rows=64", "--set", "batch.workers=2"],
            env=cluster.environment | {"RAY_API_SERVER_ADDRESS": address}, cwd=REPOSITORY, text=True,
            stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        wait_for("a result", lambda: done() > 3, job)
        before = done()
        kill(cluster.processes_of(f"{cluster.name}-2"), but="sh")
        wait_for("a head again", lambda: "gcs_server" in " ".join(names(cluster, f"{cluster.name}-2")), job)
        wait_for("a result after the head's death", lambda: done() > before + 10, job)
        [worker, *_] = wait_for("a machine that computes", lambda: computing(cluster), job)
        kill(cluster.processes_of(worker))
        assert job.wait(timeout=PATIENCE_S) == 0, (tmp_path / "log").read_text()[-3_000:]
        end = time.monotonic() + 300
        while cluster.workers():  # that of the job's own process, too: nothing of it is left to keep it busy
            assert time.monotonic() < end, [names(cluster, node) for node in cluster.workers()]
            time.sleep(1)
    answered = pq.read_table(result)
    assert answered["id"].to_pylist() == list(range(ROWS))
    assert answered["translation"].null_count == 0


_WAITING = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""


@pytest.mark.slow
def test_a_job_whose_machine_falls_silent_is_tried_again(tmp_path: Path, small_settings: Settings) -> None:
    """A machine that is cut off closes no connection, as one that is killed does."""

    def tried_twice(values: dict[str, Any]) -> None:
        with_a_driver(values)
        values["metadata"]["raylm"]["job"]["retries"] = 1

    script, begun = tmp_path / "job.py", tmp_path / "begun"
    script.write_text(f"#!{sys.executable}\n{_WAITING}")
    script.chmod(0o755)
    cluster = Cluster(tmp_path, small_settings, "127.77.8", tried_twice)
    with cluster.running():
        job = subprocess.Popen(
            [sys.executable, "-m", "raylm", "submit", "--cluster", str(cluster.file), str(script), str(begun)],
            env=cluster.environment, cwd=REPOSITORY, text=True,
            stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        wait_for("a job that waits", begun.exists, job)
        [driver] = cluster.provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: "driver"})
        begun.unlink()
        for process in cluster.processes_of(driver):
            with suppress(psutil.NoSuchProcess):  # a `sleep 1` of Ray's that has just ended
                process.suspend()
        wait_for("a second attempt", lambda: "attempt 2 of 2" in (tmp_path / "log").read_text(), job)
        wait_for("another machine", begun.exists, job)
        assert not cluster.processes_of(driver)
        job.kill()
        job.wait()
