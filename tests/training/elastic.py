"""A training on machines that are taken away, lost and added; run by `test_faults.py` as a process of its own.

    python -m tests.training.elastic SETTINGS.json RESULT.json

Machines are real Ray nodes of this machine. The result says what happened when.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"

import ray
from ray.cluster_utils import Cluster

from raylm.settings import Settings
from raylm.training import groups
from raylm.training.control import Follower
from raylm.training.trainer import pretrain
from tests.cluster.metadata import Metadata, serving
from tests.training.runs import worker_processes

groups._GROW_AFTER_S = 8.0
SPOT = "127.88.0.3"
"""The address of the machine that is taken away."""


class Seen:
    """What the driver heard from the workers."""

    def __init__(self) -> None:
        self.step = 0
        self.starts: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._relay: Any = None
        self._stopped = threading.Event()
        show = Follower._show
        groups.stopping = self._stopping

        def noted(follower: Follower, row: dict[str, Any]) -> None:
            if "world_size" in row:
                self.starts.append(row | {"at": time.monotonic()})
            elif "note" in row:
                self.notes.append(row["note"])
            self.step = max(self.step, row.get("step", 0))
            show(follower, row)

        Follower._show = noted  # type: ignore[method-assign]

    @contextmanager
    def _stopping(self, relay: Any) -> Iterator[threading.Event]:
        self._relay = relay
        yield self._stopped

    def stop(self) -> None:
        """What a signal does where training runs in the main thread."""
        self._stopped.set()
        self._relay.request.remote("stop")

    def wait_for(self, what: str, condition: Any, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: at step {self.step}, {self.starts}, {self.notes}")
            time.sleep(0.05)


def disturb(cluster: Cluster, spot: Any, seen: Seen, result: dict[str, Any]) -> None:
    """Take a machine away, bring another, and kill a worker."""
    seen.wait_for("training on two workers", lambda: seen.starts and seen.starts[-1]["world_size"] == 2)
    seen.wait_for("a hundred steps", lambda: seen.step > 100)

    notice = time.monotonic()
    Metadata.gone_at = datetime.now(UTC) + timedelta(seconds=180)
    seen.wait_for("one worker after the notice", lambda: seen.starts[-1]["world_size"] == 1)
    result["after_notice_s"] = seen.starts[-1]["at"] - notice
    cluster.remove_node(spot, allow_graceful=False)
    step = seen.step
    seen.wait_for("steps on one worker", lambda: seen.step > step + 50)

    cluster.add_node(num_cpus=1)
    seen.wait_for("two workers again", lambda: seen.starts[-1]["world_size"] == 2)
    step = seen.step
    seen.wait_for("steps on two workers", lambda: seen.step > step + 50)

    starts = len(seen.starts)
    killed = time.monotonic()
    result["step_at_kill"] = seen.step
    worker_processes()[-1].kill()
    seen.wait_for("a new group", lambda: len(seen.starts) > starts)
    result["after_kill_s"] = seen.starts[-1]["at"] - killed
    step = seen.step
    seen.wait_for("steps after the kill", lambda: seen.step > step + 50)
    seen.stop()


@contextmanager
def watching(cluster: Cluster, metadata: str) -> Iterator[None]:
    """The spot machine's watch for the notice of its cloud."""
    command = [
        sys.executable,
        "-m",
        "raylm",
        "cluster",
        "watch",
        "aws",
        "--address",
        cluster.address,
        "--node-ip",
        SPOT,
    ]
    watch = subprocess.Popen([*command, "--metadata", metadata])
    try:
        yield
    finally:
        watch.kill()
        watch.wait()


def train(settings: Settings, result: dict[str, Any]) -> None:
    try:
        pretrain(settings)
    except KeyboardInterrupt:
        result["stopped"] = True


def main(settings_file: str, result_file: str) -> None:
    settings = Settings.model_validate_json(Path(settings_file).read_text())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(cluster.address, log_to_driver=False)
    spot = cluster.add_node(num_cpus=1, node_ip_address=SPOT)
    seen, result = Seen(), {}
    # Ray starts machines in the main thread only.
    training = threading.Thread(target=train, args=(settings, result), daemon=True)
    try:
        with serving() as metadata, watching(cluster, metadata):
            seen.wait_for("the second machine", lambda: ray.cluster_resources().get("CPU", 0) == 2)
            training.start()
            disturb(cluster, spot, seen, result)
            training.join(timeout=300)
            if training.is_alive():
                raise TimeoutError(f"training does not stop: at step {seen.step}, {seen.notes}")
    finally:
        Path(result_file).write_text(json.dumps(result | {"starts": seen.starts, "notes": seen.notes}))
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
