"""`raylm cluster check`: the files of clusters/ are sound, and mistakes seeded into them are found where they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from raylm.cli import main
from raylm.cluster import machines
from raylm.cluster.check import check
from raylm.cluster.machines import Machine, aws_machine, azure_machine, gcp_machine

CLUSTERS = Path(__file__).parents[2] / "clusters"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a token that only its owner can read."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0" * 64)
    (home / ".ray" / "auth_token").chmod(0o600)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_files_are_sound(path: Path) -> None:
    assert [str(finding) for finding in check([path])] == []


# ------------------------------------------------------------------------------------------- seeded mistakes

Values = dict[str, Any]


def _into(values: Values, *path: str | int) -> Any:
    for part in path:
        values = values[part]  # type: ignore[index]
    return values


def put(*path: str | int, to: Any) -> Callable[[Values], None]:
    """A value at a place, in the place of whatever stands there."""

    def change(values: Values) -> None:
        _into(values, *path[:-1])[path[-1]] = to

    return change


def drop(*path: str | int) -> Callable[[Values], None]:
    def change(values: Values) -> None:
        del _into(values, *path[:-1])[path[-1]]

    return change


def rename(*path: str | int, to: str) -> Callable[[Values], None]:
    def change(values: Values) -> None:
        inner = _into(values, *path[:-1])
        inner[to] = inner.pop(path[-1])

    return change


def edit(*path: str | int, old: str, new: str) -> Callable[[Values], None]:
    """A change within a text."""

    def change(values: Values) -> None:
        inner = _into(values, *path[:-1])
        assert old in inner[path[-1]]
        inner[path[-1]] = inner[path[-1]].replace(old, new)

    return change


HEAD, GPU = ("available_node_types", "head"), ("available_node_types", "gpu-spot")
OURS = ("metadata", "raylm")
START = ("head_start_ray_commands", 1)
INSTALLED = '-c ~/raylm/constraints.txt -e "$HOME/raylm[aws]"'

MISTAKES: list[tuple[str, Callable[[Values], None], str, str]] = [
    # Ray's own rules
    ("aws", rename("available_node_types", to="avilable_node_types"), "avilable_node_types", "mean 'available_node_t"),
    ("aws", put("raylm", to={}), "raylm", "put it below metadata:"),
    ("aws", put("max_workers", to="many"), "max_workers", "Ray expects a whole number"),
    ("aws", drop(*GPU, "resources"), "available_node_types.gpu-spot", "'resources' is missing"),
    ("aws", put("head_node_type", to="haed"), "head_node_type", "must be one of"),
    ("aws", put("provider", "type", to="asw"), "provider.type", "did you mean 'aws'?"),
    ("aws", put(*GPU, "min_workers", to=30), "max_workers", "smaller than the sum of `min_workers`"),
    # the clouds' APIs
    ("aws", rename(*GPU, "node_config", "InstanceType", to="InstanceTyp"),
     "available_node_types.gpu-spot.node_config.InstanceTyp", "did you mean 'InstanceType'?"),
    ("aws", put(*GPU, "node_config", "InstanceType", to="g6.12xlarg"),
     "available_node_types.gpu-spot.node_config.InstanceType", "did you mean 'g6.12xlarge'?"),
    ("aws", put(*GPU, "node_config", "InstanceType", to="qqqqqqqq"),
     "available_node_types.gpu-spot.node_config.InstanceType", "AWS has no 'qqqqqqqq'; name one that it has, such as"),
    ("aws", rename(*GPU, "node_config", "InstanceMarketOptions", "MarketType", to="MarketTyp"),
     "available_node_types.gpu-spot.node_config.InstanceMarketOptions.MarketTyp", "did you mean 'MarketType'?"),
    ("aws", put(*GPU, "node_config", "InstanceMarketOptions", "MarketType", to="spott"),
     "available_node_types.gpu-spot.node_config.InstanceMarketOptions.MarketType", "AWS takes one of"),
    ("aws", put(*HEAD, "node_config", "SecurityGroupIds", to="sg-1"),
     "available_node_types.head.node_config.SecurityGroupIds", "AWS takes a list here"),
    ("aws", put(*GPU, "node_config", "ImageId", to="latest_dlami"),
     "available_node_types.gpu-spot.node_config.ImageId", "an image of 2022"),
    ("gcp", rename(*GPU, "node_config", "machineType", to="machinType"),
     "available_node_types.gpu-spot.node_config.machinType", "did you mean 'machineType'?"),
    ("azure", rename(*GPU, "node_config", "azure_arm_parameters", "vmSize", to="vmSiz"),
     "available_node_types.gpu-spot.node_config.azure_arm_parameters.vmSiz", "did you mean 'vmSize'?"),
    # machines
    ("aws", put(*GPU, "resources", "CPU", to=96), "available_node_types.gpu-spot.resources.CPU", "the machine has 48"),
    ("aws", put(*GPU, "resources", "GPU", to=8), "available_node_types.gpu-spot.resources.GPU", "the machine has 4"),
    ("gcp", put(*GPU, "resources", "GPU", to=1), "available_node_types.gpu-spot.resources.GPU", "the machine has 4"),
    ("azure", put(*GPU, "resources", "CPU", to=24), "available_node_types.gpu-spot.resources.CPU", "machine has 96"),
    ("aws", put(*HEAD, "node_config", "InstanceMarketOptions", to={"MarketType": "spot"}),
     "available_node_types.head.node_config", "the head is a spot machine"),
    ("aws", drop(*GPU, "labels"), "available_node_types.gpu-spot", "without the label ray.io/market-type: spot"),
    ("aws", drop(*HEAD, "max_workers"), "available_node_types.head", "add max_workers: 0"),
    ("aws", put("provider", "availability_zone", to="eu-west-1a"), "provider.availability_zone", "not in the region"),
    ("aws", put("idle_timeout_minutes", to=0), "idle_timeout_minutes", "machines end as soon as they are up"),
    ("onprem", put("provider", "worker_ips", 1, to="192.168.1.10"), "provider.worker_ips[1]", "is the head"),
    ("kuberay", put("provider", "image", to="registry.example.com/raylm:latest"), "provider.image", "name a version"),
    ("kuberay", drop("provider", "image"), "provider", "no image"),
    ("kuberay", put("provider", "gcsFaultToleranceOptions", to={"backnd": "rocksdb"}),
     "provider.gcsFaultToleranceOptions.backnd", "did you mean 'backend'?"),
    ("kuberay", put(*GPU, "node_config", "memory", to="96 GB"),
     "available_node_types.gpu-spot.node_config.memory", "an amount such as 64Gi"),
    ("kuberay", rename(*GPU, "node_config", "memory", to="memroy"),
     "available_node_types.gpu-spot.node_config.memroy", "did you mean 'memory'?"),
    # commands
    ("aws", edit(*START, old="--autoscaling-config=~/ray_bootstrap_config.yaml", new=""),
     "head_start_ray_commands[1]", "no workers are ever started"),
    ("aws", edit(*START, old="cd ~/raylm && ", new=""), "head_start_ray_commands[1]", "jobs run where Ray was started"),
    ("aws", edit("setup_commands", 2, old=INSTALLED, new="'ray[default]' torch"),
     "setup_commands[2]", "whatever version of ray"),
    ("aws", edit("setup_commands", 2, old=INSTALLED, new="ray==2.9.0"),
     "setup_commands[2]", "the two do not talk"),
    ("aws", put("worker_start_ray_commands", 1, to="RAY_AUTH_MODE=token ray start --address=10.0.0.4:6379"),
     "worker_start_ray_commands[1]", "does not name the head"),
    ("aws", drop("worker_start_ray_commands", 2), "worker_start_ray_commands", "without Ray being told before"),
    ("aws", put("cluster_synced_files", to=[]), "metadata.raylm.job.entrypoint_resources", "run off the head"),
    ("aws", put(*OURS, "job", "entrypoint_resources", to={"drivr": 1}), "metadata.raylm.job.entrypoint_resources",
     "no machine has drivr"),
    # machines that stand in for others
    ("aws", put("provider", "type", to="aws"), "metadata.raylm.spot.fallback", "lets no machines stand in"),
    ("aws", put(*OURS, "spot", "fallback", to={"gpu-spt": "gpu-on-demand"}),
     "metadata.raylm.spot.fallback.gpu-spt", "did you mean 'gpu-spot'?"),
    ("aws", put(*OURS, "spot", "fallback", to={"gpu-spot": "cpu"}), "metadata.raylm.spot.fallback.gpu-spot",
     "machines of 'cpu' are spot themselves"),
    ("aws", put(*OURS, "spot", "fallback", to={"gpu-spot": "driver"}), "metadata.raylm.spot.fallback.gpu-spot",
     "'driver' 4 and 0; name a type of the same machines"),
    ("gcp", put(*OURS, "spot", "fallback", to={"driver": "gpu-on-demand"}), "metadata.raylm.spot.fallback.driver",
     "machines of 'driver' are not spot"),
    ("aws", put(*OURS, "spot", "after", to=0), "metadata.raylm.spot.after", "greater than or equal to 1"),
    # who may do what
    ("aws", edit(*START, old="--dashboard-host=127.0.0.1", new="--dashboard-host=0.0.0.0"),
     "head_start_ray_commands[1]", "listen on all addresses"),
    ("aws", edit(*START, old="RAY_AUTH_MODE=token ", new=""), "head_start_ray_commands[1]", "whoever reaches it"),
    ("aws", drop(*HEAD, "node_config", "SecurityGroupIds"), "provider", "opens port 22 to the whole internet"),
    ("aws", put("provider", "security_group", to={"GroupName": "g", "IpPermissions": [
        {"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}),
     "provider.security_group.IpPermissions[0].IpRanges[0].CidrIp", "opens port 8265"),
    ("aws", drop(*HEAD, "node_config", "IamInstanceProfile"), "available_node_types.head.node_config", "FullAccess"),
    ("gcp", drop(*HEAD, "node_config", "serviceAccounts"), "available_node_types.head.node_config", "whole project"),
    ("aws", put("setup_commands", 1, to="export HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz012345"),
     "setup_commands[1]", "a Hugging Face token in plain text"),
    ("aws", put("initialization_commands", to=["aws configure set x AKIAIOSFODNN7EXAMPLE"]),
     "initialization_commands[0]", "an AWS access key in plain text"),
    ("onprem", put("auth", "ssh_private_key", to="~/absent.pem"), "auth.ssh_private_key", "there is no ~/absent.pem"),
    ("aws", put("file_mounts", "~/data", to="./absent"), "file_mounts.~/data", "there is no ./absent"),
    # the work on these machines
    ("aws", put(*OURS, "pretrain", "stepz", to=1), "metadata.raylm.pretrain.stepz", "did you mean 'steps'?"),
    ("aws", put(*OURS, "pretrain", "steps", to="many"), "metadata.raylm.pretrain.steps", "valid integer"),
    ("aws", put(*OURS, "storage", to="~/raylm-storage"), "metadata.raylm.storage", "a directory of each machine"),
    ("aws", put(*OURS, "corpus", "documents", 0, "path", to="text/*.parquet"),
     "metadata.raylm.corpus.documents[0].path", "a directory of each machine"),
    ("aws", put(*OURS, "pretrain", "workers", to=64), "metadata.raylm.pretrain.workers", "machines together have 24"),
    ("aws", put(*OURS, "pretrain", "global_batch_tokens", to=4096), "metadata.raylm.pretrain.global_batch_tokens",
     "8 sequences of 512 tokens a step, for 16 workers"),
    ("aws", put(*OURS, "pretrain", "global_batch_tokens", to=262144 + 512),
     "metadata.raylm.pretrain.global_batch_tokens", "do not divide by 16 workers"),
    ("aws", put(*OURS, "model", to={"family": "llama", "size": "large", "config": {
        "hidden_size": 8_192, "intermediate_size": 28_672, "num_hidden_layers": 48}}),
     "metadata.raylm.pretrain", "an L4 has 25.8 GB; raise pretrain.zero_stage"),
    ("kuberay", put(*OURS, "nightly", "jobs", 0, "input", to="gs://my-bucket/in/today.parquet"),
     "metadata.raylm.nightly.jobs[0].input", "a place with {date} in it"),
    ("kuberay", put(*OURS, "nightly", "schedule", to="every night"), "metadata.raylm.nightly.schedule", "as cron has"),
    ("aws", put(*OURS, "prices", "gpu_spot", to=1), "metadata.raylm.prices.gpu_spot", "no such node type"),
    ("aws", drop(*OURS, "prices", "cpu"), "metadata.raylm.prices", "'cpu' has no price"),
]  # fmt: skip


def test_seeded_mistakes_are_found_where_they_are(tmp_path: Path) -> None:
    """One mistake in each copy of a sound file: the copy, the key and the reason are told."""
    missed = []
    for number, (name, mistake, key, why) in enumerate(MISTAKES):
        values = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
        mistake(values)
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        found = check([path])
        if not any(f.file == str(path) and f.key == key and why in f"{f.why}; {f.remedy}" for f in found):
            missed.append((name, key, why, [str(finding) for finding in found]))
    assert missed == []
    assert len(MISTAKES) >= 25


def test_a_finding_names_the_line(tmp_path: Path) -> None:
    text = (CLUSTERS / "aws.yaml").read_text()
    lines = text.splitlines()
    line = next(number for number, row in enumerate(lines, 1) if "InstanceType: g6.12xlarge # 4 L4" in row)
    path = tmp_path / "typo.yaml"
    path.write_text(text.replace("InstanceType: g6.12xlarge # 4 L4", "InstanceTyp: g6.12xlarge # 4 L4"))
    [finding] = [finding for finding in check([path]) if "InstanceTyp" in finding.key]
    assert finding.line == line
    assert str(finding).startswith(f"{path}:{line}: available_node_types.gpu-spot.node_config.InstanceTyp: error: ")


def test_a_key_that_stands_twice_is_found(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text((CLUSTERS / "aws.yaml").read_text() + "max_workers: 3\n")
    assert [(f.key, f.is_error) for f in check([path]) if "twice" in f.why] == [("max_workers", True)]


def test_a_token_that_others_can_read_is_found(home: Path) -> None:
    (home / ".ray" / "auth_token").chmod(0o644)
    [finding] = check([CLUSTERS / "aws.yaml"])
    assert (finding.key, finding.remedy) == ("file_mounts.~/.ray/auth_token", "chmod 600 ~/.ray/auth_token")


def test_a_signing_key_that_others_can_read_is_found(home: Path, tmp_path: Path) -> None:
    (home / ".ray" / "tls").mkdir()
    (home / ".ray" / "tls" / "ca.key").write_text("")
    path = tmp_path / "tls.yaml"
    path.write_text((CLUSTERS / "aws.yaml").read_text().replace("# ~/.ray/tls: ~/.ray/tls", "~/.ray/tls: ~/.ray/tls"))
    for mode, remedies in ((0o640, ["chmod 600 ~/.ray/tls/ca.key"]), (0o600, [])):
        (home / ".ray" / "tls" / "ca.key").chmod(mode)
        assert [finding.remedy for finding in check([path])] == remedies


def test_the_command_prints_findings_and_fails(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    values = yaml.safe_load((CLUSTERS / "local.yaml").read_text())
    values["metadata"]["raylm"]["pretrian"] = {}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    found = CliRunner().invoke(main, ["cluster", "check", str(CLUSTERS / "local.yaml"), str(path)])
    assert found.exit_code == 1
    assert "metadata.raylm.pretrian: error: unknown key; did you mean 'pretrain'?" in found.output
    assert "2 files: 1 errors, 0 warnings" in found.output
    as_json = CliRunner().invoke(main, ["cluster", "check", "--json", str(path)])
    [row] = json.loads(as_json.output)
    assert (row["file"], row["key"], row["is_error"]) == (str(path), "metadata.raylm.pretrian", True)


@pytest.mark.parametrize(
    ("text", "said"), [("- a list\n", "holds no mapping"), ("a: [\n", "not readable as YAML"), (None, "no such file")]
)
def test_what_is_no_cluster_file_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    found = CliRunner().invoke(main, ["cluster", "check", str(path)])
    assert found.exit_code == 1
    assert said in found.output and str(path) in found.output


# ------------------------------------------------------------------------------------------------ machines


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m6i.large", Machine(2)),
        ("m6i.8xlarge", Machine(32)),
        ("t3.micro", Machine(2)),
        ("c7g.medium", Machine(1)),
        ("g5.12xlarge", Machine(48, 4, machines.A10G)),
        ("g6.xlarge", Machine(4, 1, machines.L4)),
        ("p4d.24xlarge", Machine(96, 8, machines.A100)),
        ("p5.48xlarge", Machine(192, 8, machines.H100)),
        ("hpc6a.48xlarge", None),  # counts cores
        ("m6i.metal", None),
        ("g9.xlarge", None),  # GPUs that nobody here knows
        ("m6i", None),
    ],
)
def test_aws_machines_are_read_from_their_names(name: str, expected: Machine | None) -> None:
    assert aws_machine(name) == expected


@pytest.mark.parametrize(
    ("node_config", "expected"),
    [
        ({"machineType": "n2-standard-8"}, Machine(8)),
        ({"machineType": "zones/z/machineTypes/n2d-highmem-16"}, Machine(16)),
        ({"machineType": "n2-custom-6-20480"}, Machine(6)),
        ({"machineType": "a2-highgpu-2g"}, Machine(24, 2, machines.A100)),
        ({"machineType": "g2-standard-24"}, Machine(24, 2, machines.L4)),
        ({"machineType": "a3-highgpu-8g"}, Machine(208, 8, machines.H100)),
        ({"machineType": "n1-standard-8", "guestAccelerators": [
            {"acceleratorType": "projects/p/zones/z/acceleratorTypes/nvidia-tesla-t4", "acceleratorCount": 2}]},
         Machine(8, 2, machines.T4)),
        ({"machineType": "quantum-1"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_gcp_machines_are_read_from_their_names(node_config: dict[str, Any], expected: Machine | None) -> None:
    assert gcp_machine(node_config) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Standard_D8s_v5", Machine(8)),
        ("Standard_E8-4s_v5", Machine(4)),  # a machine of 8 with 4 of them switched off
        ("Standard_F16s_v2", Machine(16)),
        ("Standard_NC4as_T4_v3", Machine(4, 1, machines.T4)),
        ("Standard_NC96ads_A100_v4", Machine(96, 4, machines.A100_80)),
        ("Standard_ND96isr_H100_v5", Machine(96, 8, machines.H100)),
        ("Standard_NV6ads_A10_v5", None),  # a part of a GPU
        ("Basic_A1", None),
    ],
)
def test_azure_machines_are_read_from_their_names(name: str, expected: Machine | None) -> None:
    assert azure_machine(name) == expected
