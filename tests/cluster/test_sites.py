"""The packaged files of machines that ssh reaches: a site of one's own, and AWS as moto answers for it."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylm.settings import Settings
from tests.cluster.machines import REPOSITORY, Machine, Site, make_key, site
from tests.cluster.owner import PARAMETER, forget_earlier_tests, own_account

_TOKEN = "7" * 64
_LAPTOP, _OTHER_LAPTOP = "192.168.1.2", "192.168.1.4"
_CLOUD = "192.168.1.3"
_JOB = """
import subprocess, sys
subprocess.run(["raylm", "prepare"], check=True)  # by the settings that the launcher left
print("prepared", flush=True)
sys.exit(7)
"""
_BUCKET = f"s3://raylm/storage?endpoint_override={_CLOUD}:5000&scheme=http&region=eu-central-1"


def _laptop(here: Site, address: str = _LAPTOP) -> Machine:
    machine = here.add(address)
    (machine.home / ".ray").mkdir()
    token = machine.home / ".ray" / "auth_token"
    token.write_text(_TOKEN)
    token.chmod(0o600)
    make_key(machine.home / ".ssh" / "id_ed25519")
    return machine


def _file(name: str, directory: Path, change: Callable[[dict[str, Any]], None]) -> str:
    values = yaml.safe_load((REPOSITORY / "clusters" / name).read_text())
    values["cluster_name"] = f"site-{directory.name}"
    change(values)
    file = directory / name
    file.write_text(yaml.safe_dump(values, width=1_000))
    return str(file)


def _work(settings: Settings, storage: str) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude_unset=True) | {"storage": storage}


@pytest.mark.slow
def test_machines_of_ones_own(tmp_path: Path, small_settings: Settings) -> None:
    """`clusters/onprem.yaml`, a head and two workers: all of them work, and at the end none runs anything."""

    def own(values: dict[str, Any]) -> None:
        values["provider"] |= {"head_ip": "192.168.1.10", "worker_ips": ["192.168.1.11", "192.168.1.12"]}
        values["auth"]["ssh_private_key"] = "~/.ssh/id_ed25519"
        values["metadata"]["raylm"] = _work(small_settings, str(tmp_path / "storage"))

    file = _file("onprem.yaml", tmp_path, own)
    with site(tmp_path, "raylm") as here:
        laptop = _laptop(here)
        here.authorized_key = laptop.home / ".ssh" / "id_ed25519.pub"
        machines = [here.add(f"192.168.1.{number}") for number in (10, 11, 12)]
        up = laptop.run("raylm", "up", file)
        assert up.returncode == 0, up.stdout + up.stderr
        end = time.monotonic() + 400
        while not all(any("raylet" in line for line in machine.processes()) for machine in machines):
            assert time.monotonic() < end, [machine.processes() for machine in machines]
            time.sleep(1)
        assert not any(_TOKEN in line for machine in machines for line in machine.processes())

        submitted = laptop.run("raylm", "submit", "--cluster", file, "jobs/prepare.py")
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        assert (tmp_path / "storage" / "tokens" / "default" / "manifest.json").exists()
        status = json.loads(laptop.run("raylm", "status", "--cluster", file, "--json").stdout)
        assert sum(machine["count"] for machine in status["machines"]) == 3
        other = _laptop(here, _OTHER_LAPTOP)  # which has not made the cluster
        for name in ("id_ed25519", "id_ed25519.pub"):
            shutil.copy(laptop.home / ".ssh" / name, other.home / ".ssh" / name)
        for machine in (laptop, other):
            refused = machine.run("raylm", "run", file, "jobs/prepare.py")
            assert refused.returncode == 1 and "its cluster is up already" in refused.stderr, refused.stderr

        down = other.run("raylm", "down", file)
        assert down.returncode == 0, down.stdout + down.stderr
        end = time.monotonic() + 240
        while left := {machine.address: found for machine in machines if (found := machine.processes())}:
            assert time.monotonic() < end, left
            time.sleep(1)

        here.remove("192.168.1.12")
        down = laptop.run("raylm", "down", file)
        assert down.returncode == 1 and "Ray is not stopped on 192.168.1.12; end it there" in down.stderr, down.stderr
        here.remove("192.168.1.10")
        for command in (("down", file), ("run", file, "jobs/prepare.py")):
            lost = laptop.run("raylm", *command)
            assert lost.returncode == 1 and "the head 192.168.1.10 cannot be reached: ssh: " in lost.stderr, lost.stderr


# ------------------------------------------------------------------------------------------------ AWS


class _Cloud:
    """moto in the network of a site, which has a machine for each instance that runs."""

    def __init__(self, here: Site) -> None:
        self._here = here
        self._ended = threading.Event()
        here.switch.add_address(_CLOUD)
        here.switch.inside(self._serve)
        self._thread = threading.Thread(target=self._keep_or_say_why)
        self._error: Exception | None = None

    def _serve(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address=_CLOUD, port=5000, verbose=False)
        self._server.start()
        forget_earlier_tests()

    def client(self, service: str) -> Any:
        import boto3

        return boto3.client(
            service, endpoint_url=f"http://{_CLOUD}:5000", region_name="eu-central-1",
            aws_access_key_id="someone", aws_secret_access_key="secret",
        )  # fmt: skip

    def instances(self) -> list[dict[str, Any]]:
        """All there have ever been."""
        found = self._here.switch.inside(lambda: self.client("ec2").describe_instances()["Reservations"])
        return [instance for reservation in found for instance in reservation["Instances"]]

    def running(self) -> list[dict[str, Any]]:
        return [found for found in self.instances() if found["State"]["Name"] in ("pending", "running")]

    def _keep_or_say_why(self) -> None:
        try:
            self._keep()
        except Exception as error:  # told at the end, by `kept`
            self._error = error

    def _keep(self) -> None:
        """Machines come and go with their instances."""
        known: set[str] = set()
        while not self._ended.wait(0.5):
            addresses = {instance["PrivateIpAddress"] for instance in self.running()}
            for address in known - addresses:
                self._here.remove(address)
            for address in addresses - known:
                self._here.add(address)
            known = addresses

    @contextmanager
    def kept(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()
            self._here.switch.inside(self._server.stop)
            if self._error:
                raise self._error


def _owned(cloud: _Cloud) -> tuple[str, str]:
    cloud.client("s3").create_bucket(Bucket="raylm", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    return own_account(cloud.client)


@pytest.mark.slow
def test_a_job_on_aws(tmp_path: Path, small_settings: Settings) -> None:
    """`raylm run clusters/aws.yaml` with a job that works and then fails: all machines that came for it end with it."""
    pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    environment = {
        "AWS_ENDPOINT_URL": f"http://{_CLOUD}:5000",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }
    with site(tmp_path, "ubuntu", **environment) as here:
        cloud = _Cloud(here)
        with cloud.kept():
            subnet, group = here.switch.inside(lambda: _owned(cloud))

            def theirs(values: dict[str, Any]) -> None:
                types = values["available_node_types"]
                for name in ("gpu-spot", "gpu-on-demand"):
                    del types[name], values["metadata"]["raylm"]["prices"][name]
                del values["metadata"]["raylm"]["spot"]
                for kind in types.values():
                    own = {"SubnetIds": [subnet], "SecurityGroupIds": [group], "ImageId": f"resolve:ssm:{PARAMETER}"}
                    kind["node_config"] |= own
                for name in ("driver", "cpu"):  # machines of the size of this one, which has to be all of them
                    types[name]["node_config"]["InstanceType"] = "m6i.large"
                    types[name]["resources"]["CPU"] = 2
                types["cpu"]["max_workers"] = 1
                values["metadata"]["raylm"] |= _work(small_settings, _BUCKET)
                values["metadata"]["raylm"]["job"]["retries"] = 0

            file = _file("aws.yaml", tmp_path, theirs)
            job = tmp_path / "job.py"
            job.write_text(f"#!{sys.executable}\n{_JOB}")
            job.chmod(0o755)
            ran = _laptop(here).run("raylm", "run", file, str(job), timeout_s=1_500)
            assert ran.returncode == 7, ran.stdout[-5_000:] + ran.stderr[-5_000:]
            assert "prepared\n" in ran.stdout
            assert cloud.running() == []

            tags = [tag for instance in cloud.instances() for tag in instance["Tags"]]
            assert {tag["Value"] for tag in tags if tag["Key"] == "ray-user-node-type"} >= {"head", "driver"}
            listed = here.switch.inside(lambda: cloud.client("s3").list_objects_v2(Bucket="raylm"))["Contents"]
            keys = [entry["Key"].removeprefix("storage/") for entry in listed]
            assert "tokens/default/manifest.json" in keys
            kept = [key for key in keys if key.startswith("jobs/raylm-job-")]
            assert [key for key in kept if key.endswith(".log")] and [key for key in kept if key.endswith(".tar.gz")]
