"""`ray up clusters/local.yaml`: a real cluster of processes that grows, shrinks and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from raylm.cluster.providers.processes import ProcessNodeProvider
from tests.cluster.conftest import NETWORK, TOKEN, Cluster

# All CPUs of three machines at once: of the head and of both workers.
_JOB = """
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
ray.init()
group = ray.util.placement_group([{"CPU": 2}] * 3, strategy="STRICT_SPREAD")
ray.get(group.ready(), timeout=400)
@ray.remote(num_cpus=2)
def where():
    return ray.util.get_node_ip_address()
places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number) for number in range(3)]
print(sorted(ray.get([where.options(scheduling_strategy=place).remote() for place in places])))
"""


@pytest.mark.slow
def test_workers_come_for_work_and_go_without_it(cluster: Cluster) -> None:
    assert cluster.workers() == []
    done = cluster.submit("--", sys.executable, "-c", _JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str([f"{NETWORK}.{number}" for number in (2, 3, 4)]) in done.stdout
    end = time.monotonic() + 300
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
def test_the_literal_command_trains_by_the_settings_that_ray_up_left(cluster: Cluster) -> None:
    """No argument: `ray up` has left the whole file in the head's home, and jobs run in the checkout."""
    left = json.loads((cluster.file.parent / "ray_bootstrap_config.yaml").read_text())
    assert left["metadata"]["raylm"]["storage"] == str(cluster.storage)
    done = cluster.submit("jobs/pretrain.py")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((cluster.storage / "runs" / "pretrain" / "manifest.json").read_text())
    assert manifest["metrics"]["step"] == 12
    assert (cluster.storage / "tokens" / "default" / "manifest.json").exists()


@pytest.mark.slow
def test_the_checkout_can_be_sent_along(cluster: Cluster) -> None:
    values = ("--set", "pretrain.name=sent", "--set", "pretrain.steps=4", "--set", "pretrain.checkpoint_every=4")
    done = cluster.submit("--working-dir", ".", "--", "jobs/pretrain.py", *values)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((cluster.storage / "runs" / "sent" / "manifest.json").read_text())
    assert manifest["metrics"]["step"] == 4


@pytest.mark.slow
def test_the_end_leaves_no_process_and_touches_no_other(cluster: Cluster) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert cluster.processes()
        down = cluster.ray("down", "-y", str(cluster.file))
        assert down.returncode == 0, down.stdout + down.stderr
        assert cluster.processes() == []
        assert cluster.provider.non_terminated_nodes({}) == []
        assert not (cluster.file.parent / "ray_bootstrap_config.yaml").exists(), "commands would read it on"
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


@pytest.mark.parametrize(("name", "stays"), [("", False), ("-other", True)])
def test_the_file_of_a_head_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stays: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    provider = ProcessNodeProvider({"network": "127.77.2"}, f"g{os.getpid()}")
    left = tmp_path / "ray_bootstrap_config.yaml"
    left.write_text(json.dumps({"cluster_name": f"{provider.cluster_name}{name}"}))  # as `ray up` leaves it
    try:
        [worker] = provider.create_node({}, {"ray-node-type": "worker"}, 1)
        [head] = provider.create_node({}, {"ray-node-type": "head"}, 1)
        provider.terminate_node(worker)
        assert left.exists()
        provider.terminate_node(head)
        assert left.exists() == stays
    finally:
        shutil.rmtree(provider.directory("x-2").parent)


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
