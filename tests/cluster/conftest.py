"""A cluster that the tests of this room share: `ray up clusters/local.yaml`, under names and ports of its own."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from raylm.cluster.providers.processes import NODE, ProcessNodeProvider
from raylm.settings import Settings

REPOSITORY = Path(__file__).parents[2]
LOCAL = REPOSITORY / "clusters" / "local.yaml"
NETWORK = "127.77.1"
TOKEN = "5" * 64


PATIENCE_S = 600
"""With a command that takes a minute by itself: this machine may be busy with others."""
_given: set[int] = set()


def free_port() -> int:
    """One above those of Ray's workers, and below those that the system gives out by itself."""
    for port in random.SystemRandom().sample(range(20_000, 32_768), 200):
        with closing(socket.socket()) as taken, suppress(OSError):
            taken.bind(("", port))
            if port not in _given:
                _given.add(port)
                return port
    raise AssertionError("no port is free")


class Cluster:
    """The packaged cluster file under a name, a network and ports of its own."""

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        network: str = NETWORK,
        change: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.name = f"t{os.getpid()}-{network.rsplit('.', 1)[1]}"
        values: dict[str, Any] = yaml.safe_load(LOCAL.read_text())
        self.gcs, self.dashboard = free_port(), free_port()
        values |= {"cluster_name": self.name, "idle_timeout_minutes": 0.1}
        values["provider"]["network"] = network
        self.storage = directory / "storage"
        values["metadata"] = {"raylm": settings.model_dump(mode="json") | {"storage": str(self.storage)}}
        host = "--dashboard-host=127.0.0.1"
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            own = [
                text.replace("6379", str(self.gcs)).replace("timeout 120", f"timeout {PATIENCE_S}")
                for text in values[key]
            ]
            values[key] = [text.replace(host, f"{host} --dashboard-port={self.dashboard}") for text in own]
        change(values)
        self.file = directory / "cluster.yaml"
        self.file.write_text(yaml.safe_dump(values))
        self.token = token = directory / ".ray" / "auth_token"
        token.parent.mkdir()
        token.write_text(TOKEN)
        token.chmod(0o600)
        self.environment = os.environ | {
            "HOME": str(directory),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.provider = ProcessNodeProvider(values["provider"], self.name)

    def raylm(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-m", "raylm", *words])

    def ray(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self._run([str(Path(sys.executable).parent / "ray"), *words], **environment)

    def _run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment | environment,
            cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    def submit(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, to its end; a head that has just started has no agent for it yet."""
        address = f"http://127.0.0.1:{self.dashboard}"
        for _ in range(30):
            done = self.ray("job", "submit", *words, RAY_API_SERVER_ADDRESS=address, **environment)
            if "No available agent" not in done.stderr:
                break
            time.sleep(1)
        return done

    @contextmanager
    def running(self) -> Iterator[None]:
        """`ray up`, and at the end nothing left of it, whatever has happened."""
        try:
            up = self.ray("up", "-y", "--no-config-cache", str(self.file))
            assert up.returncode == 0, up.stdout + up.stderr
            yield
        finally:
            self.end()

    def end(self) -> None:
        """Leave nothing of it, whether it is up or not."""
        while nodes := self.provider.non_terminated_nodes({}):  # the head may make one meanwhile
            for node in nodes:
                self.provider.terminate_node(node)
        shutil.rmtree(self.provider.directory(f"{self.name}-2").parent, ignore_errors=True)

    def workers(self) -> list[str]:
        return self.provider.non_terminated_nodes({"ray-node-type": "worker"})

    def processes_of(self, node: str) -> list[psutil.Process]:
        """All that belongs to a machine of the cluster."""
        return list(self.provider._processes(node))

    def processes(self) -> list[str]:
        """All that belongs to any machine of the cluster."""
        found = []
        for process in psutil.process_iter():
            try:
                if f"/{self.name}/" in process.environ().get(NODE, ""):
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory, small_settings: Settings) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("home"), small_settings)
    with cluster.running():
        yield cluster
