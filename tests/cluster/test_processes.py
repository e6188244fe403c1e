"""`ray up clusters/local.yaml`: a real cluster of processes that grows, shrinks and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from raylm.cluster.providers.processes import NODE, ProcessNodeProvider

REPOSITORY = Path(__file__).parents[2]
LOCAL = REPOSITORY / "clusters" / "local.yaml"
_NETWORK = "127.77.1"
TOKEN = "5" * 64

# All CPUs of three machines at once: of the head and of both workers.
_JOB = """
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
ray.init()
group = ray.util.placement_group([{"CPU": 2}] * 3, strategy="STRICT_SPREAD")
ray.get(group.ready(), timeout=120)
@ray.remote(num_cpus=2)
def where():
    return ray.util.get_node_ip_address()
places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number) for number in range(3)]
print(sorted(ray.get([where.options(scheduling_strategy=place).remote() for place in places])))
"""


def free_port() -> int:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Cluster:
    """The packaged cluster file under a name, a network and ports of its own."""

    def __init__(self, directory: Path) -> None:
        self.name = f"t{os.getpid()}"
        values: dict[str, Any] = yaml.safe_load(LOCAL.read_text())
        gcs, self.dashboard = free_port(), free_port()
        values |= {"cluster_name": self.name, "idle_timeout_minutes": 0.1}
        values["provider"]["network"] = _NETWORK
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            values[key] = [text.replace("6379", str(gcs)) for text in values[key]]
        values["head_start_ray_commands"][0] += f" --dashboard-port={self.dashboard}"
        self.file = directory / "cluster.yaml"
        self.file.write_text(yaml.safe_dump(values))
        token = directory / ".ray" / "auth_token"
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

    def ray(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).parent / "ray"), *words], env=self.environment | environment,
            cwd=self.file.parent, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    def submit(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Submit a job and wait for its end; a head that has just started has no agent for it yet."""
        address = f"http://127.0.0.1:{self.dashboard}"
        for _ in range(30):
            done = self.ray("job", "submit", "--address", address, "--", *words, **environment)
            if "No available agent" not in done.stderr:
                break
            time.sleep(1)
        return done

    def workers(self) -> list[str]:
        return self.provider.non_terminated_nodes({"ray-node-type": "worker"})

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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("home"))
    up = cluster.ray("up", "-y", "--no-config-cache", str(cluster.file))
    assert up.returncode == 0, up.stdout + up.stderr
    yield cluster
    for node in cluster.provider.non_terminated_nodes({}):
        cluster.provider.terminate_node(node)
    shutil.rmtree(cluster.provider.directory(f"{cluster.name}-2").parent, ignore_errors=True)


@pytest.mark.slow
def test_workers_come_for_work_and_go_without_it(cluster: Cluster) -> None:
    assert cluster.workers() == []
    done = cluster.submit(sys.executable, "-c", _JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str([f"{_NETWORK}.{number}" for number in (2, 3, 4)]) in done.stdout
    end = time.monotonic() + 60
    while cluster.workers() and time.monotonic() < end:
        time.sleep(1)
    assert cluster.workers() == []


@pytest.mark.slow
def test_who_has_no_token_is_answered_401(cluster: Cluster) -> None:
    jobs = f"http://127.0.0.1:{cluster.dashboard}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(jobs, timeout=30)
    asked = urllib.request.Request(jobs, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert answer.status == 200


@pytest.mark.slow
def test_the_literal_command_reads_the_settings_that_ray_up_left(cluster: Cluster) -> None:
    """`ray_bootstrap_config.yaml` is in the head's home; a job finds it without being told."""
    left = json.loads((cluster.file.parent / "ray_bootstrap_config.yaml").read_text())
    assert left["metadata"]["raylm"]["model"]["family"] == "marian"
    shown = cluster.submit(sys.executable, "-m", "raylm", "settings", "show")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "family: marian" in shown.stdout


@pytest.mark.slow
def test_the_end_leaves_no_process_and_touches_no_other(cluster: Cluster) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert cluster.processes()
        down = cluster.ray("down", "-y", str(cluster.file))
        assert down.returncode == 0, down.stdout + down.stderr
        assert cluster.processes() == []
        assert cluster.provider.non_terminated_nodes({}) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


# ----------------------------------------------------------------------------------- the provider by itself


def test_machines_have_addresses_and_end_with_what_they_started(tmp_path: Path) -> None:
    provider = ProcessNodeProvider({"network": "127.77.2"}, f"p{os.getpid()}")
    place = provider.directory("x-2").parent
    try:
        provider.create_node({}, {"ray-node-type": "head"}, 1)
        provider.create_node({}, {"ray-node-type": "worker"}, 2)
        head, *workers = sorted(provider.non_terminated_nodes({}))
        assert [provider.internal_ip(node) for node in (head, *workers)] == [f"127.77.2.{n}" for n in (2, 3, 4)]
        assert provider.non_terminated_nodes({"ray-node-type": "head"}) == [head]
        for node in workers:
            runner = provider.get_command_runner("", node)
            said = runner.run(
                "echo $RAYLM_NODE_IP $EXTRA", with_output=True, environment_variables={"EXTRA": {"CPU": 2}}
            )
            assert said.strip() == f'{provider.internal_ip(node)} {{"CPU": 2}}'
            runner.run("setsid sleep 300 & disown")  # as a daemon starts
        first, second = ([p.pid for p in provider._processes(node)] for node in workers)
        assert len(first) == len(second) == 1
        provider.get_command_runner("", workers[0]).run("export RAY_ENABLE=1; ray stop")
        assert not psutil.pid_exists(first[0]) and psutil.pid_exists(second[0])
        provider.terminate_node(workers[1])
        assert not psutil.pid_exists(second[0])
        assert provider.is_terminated(workers[1]) and provider.is_running(workers[0])
    finally:
        for node in provider.non_terminated_nodes({}):
            provider.terminate_node(node)
        shutil.rmtree(place)


def test_a_command_that_fails_is_an_error_of_the_launcher(tmp_path: Path) -> None:
    from ray.autoscaler._private.subprocess_output_util import ProcessRunnerError

    provider = ProcessNodeProvider({}, f"f{os.getpid()}")
    try:
        [name] = provider.create_node({}, {"ray-node-type": "head"}, 1)
        with pytest.raises(ProcessRunnerError, match="code=3"):
            provider.get_command_runner("", name).run("exit 3")
        source = tmp_path / "a.txt"
        source.write_text("text")
        provider.get_command_runner("", name).run_rsync_up(str(source), str(tmp_path / "deep" / "b.txt"))
        assert (tmp_path / "deep" / "b.txt").read_text() == "text"
    finally:
        shutil.rmtree(provider.directory("x-2").parent)
