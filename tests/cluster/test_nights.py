"""A night on a cluster: replicas answer its jobs, on machines that come for them and go when it is over."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylm.settings import Settings
from tests.cluster.conftest import PATIENCE_S, REPOSITORY, Cluster, free_port
from tests.cluster.test_losses import names, with_a_driver
from tests.inference.conftest import build_model_directory, english_sentences

ROWS = 3_000
DATE = "2026-11-01"


def served_by(cluster: Cluster) -> set[str]:
    """The machines with a replica of the model."""
    return {node for node in cluster.workers() if "ServeReplica:raylm:model" in " ".join(names(cluster, node))}


@pytest.mark.slow
def test_a_night_is_served_by_machines_that_come_for_it(tmp_path: Path, small_settings: Settings) -> None:
    sentences, model = english_sentences(4_000), tmp_path / "model"
    build_model_directory(model, sentences)
    source = tmp_path / "in" / DATE
    source.mkdir(parents=True)
    texts = [f"{sentences[number % len(sentences)]} {number}" for number in range(ROWS)]
    pq.write_table(pa.table({"id": range(ROWS), "text": texts}), source / "mail.parquet")

    def with_nights(values: dict[str, Any]) -> None:
        with_a_driver(values)
        job = {"name": "mail", "task": "translate", "input": f"{tmp_path}/in/{{date}}/",
               "output": f"{tmp_path}/out/{{date}}/", "model": str(model)}  # fmt: skip
        values["metadata"]["raylm"] |= {
            "serve": {"port": free_port(), "replicas": [1, 2]},
            "nightly": {"through": "serve", "jobs": [job]},
            "batch": {"chunk_rows": 64},
        }

    cluster = Cluster(tmp_path, small_settings, "127.77.10", with_nights)
    address = f"http://127.0.0.1:{cluster.dashboard}"
    with cluster.running():
        assert cluster.workers() == []
        night = subprocess.Popen(
            [sys.executable, "-m", "raylm", "submit", "--cluster", str(cluster.file), "jobs/nightly.py",
             "--now", "2026-11-02T03:00", "--json"],
            env=cluster.environment | {"RAY_API_SERVER_ADDRESS": address}, cwd=REPOSITORY, text=True,
            stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        seen: set[str] = set()
        end = time.monotonic() + 2 * PATIENCE_S
        while night.poll() is None:
            assert time.monotonic() < end, (tmp_path / "log").read_text()[-3_000:]
            seen |= served_by(cluster)
            time.sleep(0.5)
        said = (tmp_path / "log").read_text()
        assert night.returncode == 0, said[-3_000:]
        assert seen, "a replica, and not on the head, which computes nothing"
        end = time.monotonic() + 300
        while cluster.workers():
            assert time.monotonic() < end, f"{cluster.workers()} stay, though nobody needs them"
            time.sleep(1)
    answered = pq.read_table(tmp_path / "out" / DATE / "mail.parquet")
    assert answered["id"].to_pylist() == list(range(ROWS))
    assert answered["translation"].null_count == 0
    record = json.loads((cluster.storage / "nightly" / DATE / "mail.json").read_text())
    assert (record["status"], record["rows"], record["errors"]) == ("done", ROWS, 0)
