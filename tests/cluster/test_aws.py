"""`clusters/aws.yaml` against AWS's API as moto answers it: what is made, what it may do, and that nothing is left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import REPOSITORY
from tests.cluster.owner import IMAGE, PARAMETER, forget_earlier_tests, own_account

boto3 = pytest.importorskip("boto3")
server = pytest.importorskip("moto.server")


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of commands that ask moto, with a home of their own."""
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    forget_earlier_tests()
    (tmp_path / ".ray").mkdir()
    token = tmp_path / ".ray" / "auth_token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    yield os.environ | {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "HOME": str(tmp_path),
        "RECORDED": str(tmp_path / "commands"),
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests/cluster/recording'}",
    }
    moto.stop()


def client(aws: dict[str, str], service: str) -> Any:
    return boto3.client(
        service, endpoint_url=aws["AWS_ENDPOINT_URL"], region_name="eu-central-1",
        aws_access_key_id="someone", aws_secret_access_key="secret",
    )  # fmt: skip


def own_file(aws: dict[str, str], directory: Path) -> Path:
    """The packaged file with an owner's network, group and rights in it, as its first comment asks."""
    subnet, group = own_account(partial(client, aws))
    text = (REPOSITORY / "clusters" / "aws.yaml").read_text()
    text = re.sub(r"resolve:ssm:\S+", f"resolve:ssm:{PARAMETER}", text).replace("subnet-0123456789abcdef0", subnet)
    path = directory / "aws.yaml"
    path.write_text(text.replace("sg-0123456789abcdef0", group))
    return path


def command(aws: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        env=aws,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def instances(aws: dict[str, str]) -> list[dict[str, Any]]:
    """All that are not ended."""
    found = client(aws, "ec2").describe_instances()["Reservations"]
    every = [instance for reservation in found for instance in reservation["Instances"]]
    return [instance for instance in every if instance["State"]["Name"] not in ("terminated", "shutting-down")]


def test_what_is_made_is_closed_and_has_few_rights(aws: dict[str, str], tmp_path: Path) -> None:
    path = own_file(aws, tmp_path)
    up = command(aws, "raylm", "up", str(path))
    assert up.returncode == 0, up.stdout[-3_000:] + up.stderr[-3_000:]
    [head] = instances(aws)
    assert (head["InstanceType"], head["ImageId"]) == ("m6i.xlarge", IMAGE)
    assert head["IamInstanceProfile"]["Arn"].endswith("raylm-head")

    for group in client(aws, "ec2").describe_security_groups()["SecurityGroups"]:
        rules = [entry for rule in group["IpPermissions"] for entry in rule.get("IpRanges", [])]
        assert not [entry for entry in rules if entry["CidrIp"] == "0.0.0.0/0"], group["GroupName"]
    iam = client(aws, "iam")
    for role in iam.list_roles()["Roles"]:
        attached = iam.list_attached_role_policies(RoleName=role["RoleName"])["AttachedPolicies"]
        assert not [policy for policy in attached if "FullAccess" in policy["PolicyName"]], role["RoleName"]

    # A newer image does not cost the cluster its head.
    client(aws, "ssm").put_parameter(Name=PARAMETER, Value="ami-0123456789abcdef0", Type="String", Overwrite=True)
    again = command(aws, "raylm", "up", str(path))
    assert again.returncode == 0, again.stdout[-3_000:] + again.stderr[-3_000:]
    assert [instance["InstanceId"] for instance in instances(aws)] == [head["InstanceId"]]

    recorded = (tmp_path / "commands").read_text()
    assert "RAY_AUTH_MODE=token" in recorded and "ray start --head" in recorded
    assert "0" * 64 not in recorded
    refused = command(aws, "raylm", "run", str(path), "jobs/pretrain.py")
    assert refused.returncode == 1 and "its cluster is up already, and would end with the job" in refused.stderr
    assert len(instances(aws)) == 1
    client(aws, "ssm").delete_parameter(Name=PARAMETER)  # the workers' image is known nowhere now
    down = command(aws, "raylm", "down", str(path))
    assert down.returncode == 0, down.stdout[-3_000:] + down.stderr[-3_000:]
    assert instances(aws) == []


def test_a_run_that_fails_leaves_no_machine(aws: dict[str, str], tmp_path: Path) -> None:
    """No head answers behind the recorded commands, so that the job cannot be submitted."""
    path = own_file(aws, tmp_path)
    found = command(aws, "raylm", "run", str(path), "jobs/pretrain.py")
    assert found.returncode == 1
    assert "no tunnel to the head's dashboard" in found.stderr
    assert "Traceback" not in found.stderr
    assert client(aws, "ec2").describe_instances()["Reservations"]  # one was there
    assert instances(aws) == []


def test_an_image_that_nobody_keeps_is_named(aws: dict[str, str], tmp_path: Path) -> None:
    path = own_file(aws, tmp_path)
    path.write_text(path.read_text().replace(PARAMETER, "/raylm/imagf"))
    found = command(aws, "raylm", "up", str(path))
    assert found.returncode == 1
    assert "node_config.ImageId: resolve:ssm:/raylm/imagf: " in found.stderr
    assert "Traceback" not in found.stderr
    assert instances(aws) == []
    ran = command(aws, "raylm", "run", str(path), "jobs/pretrain.py")
    assert ran.returncode == 1 and "raylm: error: ray up " in ran.stderr
    assert "trying again" not in ran.stderr and "may still run" not in ran.stderr, "there is nothing to end"
