"""Who may reach a cluster, what its machines may do, and secrets that stand in plain text."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raylm.cluster.commands import commands
from raylm.cluster.file import CLOUDS, ClusterFile, Finding

_WORLD = ("0.0.0.0/0", "::/0")
_SECRETS = {
    "an AWS access key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a secret": r"(?i)\b\w*(password|passwd|secret|token|api_?key)\s*[=:]\s*['\"]?(?![$~/<{.]|\w+://)[^\s'\"$]{8,}",
}


def check_exposure(cluster: ClusterFile) -> Iterator[Finding]:
    """What is open that should be closed."""
    yield from _ingress(cluster)
    yield from _dashboard(cluster)
    yield from _rights(cluster)
    yield from _token(cluster)
    yield from _secrets(cluster)
    yield from _ssh_key(cluster)


def _ingress(cluster: ClusterFile) -> Iterator[Finding]:
    if cluster.provider == "aws":
        own = all("SecurityGroupIds" in _config(node) or "NetworkInterfaces" in _config(node)
                  for node in cluster.node_types.values())  # fmt: skip
        if not own:
            yield cluster.error(
                ("provider",),
                "Ray makes a security group that opens port 22 to the whole internet, whatever else provider."
                "security_group says",
                "name a group of your own in each node_config: SecurityGroupIds: [sg-…]",
            )
    rules = cluster.get("provider", "security_group", "IpPermissions", default=[])
    for number, rule in enumerate(rules if isinstance(rules, list) else []):
        for ranges, name in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6")):
            for place, entry in enumerate(rule.get(ranges) or []):
                if entry.get(name) in _WORLD:
                    key = ("provider", "security_group", "IpPermissions", number, ranges, place, name)
                    yield cluster.error(key, f"opens port {rule.get('FromPort')} to the whole internet",
                                        "name the addresses that may come in, or none and use a tunnel")  # fmt: skip


def _dashboard(cluster: ClusterFile) -> Iterator[Finding]:
    for key, text in commands(cluster, "head_start_ray_commands"):
        if re.search(r"--dashboard-host[= ](0\.0\.0\.0|::)", text):
            yield cluster.error(key, "the dashboard and the Jobs API listen on all addresses",
                                "say --dashboard-host=127.0.0.1 and reach it by `ray dashboard`, a tunnel")  # fmt: skip


def _rights(cluster: ClusterFile) -> Iterator[Finding]:
    head = cluster.get("available_node_types", cluster.head_type, "node_config", default={})
    key = ("available_node_types", cluster.head_type, "node_config")
    if cluster.provider == "aws" and "IamInstanceProfile" not in head:
        yield cluster.error(
            key, "without IamInstanceProfile, Ray gives the head AmazonEC2FullAccess and AmazonS3FullAccess",
            "name a profile of your own, with the rights that README lists",
        )  # fmt: skip
    if cluster.provider == "gcp" and not head.get("serviceAccounts"):
        yield cluster.error(
            key, "without serviceAccounts, Ray makes an account that may change the whole project",
            "name an account of your own, with the rights that README lists",
        )  # fmt: skip


def _token(cluster: ClusterFile) -> Iterator[Finding]:
    """A cluster asks for a token, which only its owner can read."""
    if cluster.provider in (*CLOUDS, "kuberay", "external") or _has_other_machines(cluster):
        for name in ("head_start_ray_commands", "worker_start_ray_commands"):
            starts = [(key, text) for key, text in commands(cluster, name) if "ray start" in text]
            for key, text in starts:
                if "RAY_AUTH_MODE=token" not in text:
                    yield cluster.error(key, "Ray started like this takes jobs from whoever reaches it",
                                        "write RAY_AUTH_MODE=token before ray start")  # fmt: skip
    for remote, local in cluster.mapping("file_mounts").items():
        path = Path(str(local)).expanduser()
        if not path.exists():
            yield cluster.error(
                ("file_mounts", remote),
                f"there is no {local} on this machine",
                "`raylm up` makes it" if path.name == "auth_token" else "make it, or take the line out",
            )
            continue
        secret = path / "ca.key" if path.is_dir() else path
        if secret.name == "ca.key" or "token" in secret.name:
            mode = stat.S_IMODE(secret.stat().st_mode) if secret.is_file() else 0
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                shown = local if secret == path else f"{local}/{secret.name}"
                yield cluster.error(("file_mounts", remote), f"others on this machine can read {shown} (mode {mode:o})",
                                    f"chmod 600 {shown}")  # fmt: skip


def _secrets(cluster: ClusterFile) -> Iterator[Finding]:
    for key, text in cluster.texts():
        for what, pattern in _SECRETS.items():
            if re.search(pattern, f"{key[-1]}: {text}"):
                yield cluster.error(key, f"holds {what} in plain text",
                                    "put it into a file of mode 600 and mount that by file_mounts")  # fmt: skip
                break


def _ssh_key(cluster: ClusterFile) -> Iterator[Finding]:
    named = cluster.get("auth", "ssh_private_key")
    if not isinstance(named, str):
        return
    path = Path(named).expanduser()
    if not path.exists():
        yield cluster.error(("auth", "ssh_private_key"), f"there is no {named} on this machine", "name the key's file")
    elif path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield cluster.error(
            ("auth", "ssh_private_key"), f"others on this machine can read {named}", f"chmod 600 {named}"
        )


def _has_other_machines(cluster: ClusterFile) -> bool:
    return cluster.provider == "local" and bool(cluster.get("provider", "worker_ips"))


def _config(node: dict[str, Any]) -> dict[str, Any]:
    found = node.get("node_config")
    return found if isinstance(found, dict) else {}
