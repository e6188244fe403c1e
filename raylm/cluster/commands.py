"""The commands that set machines up and start Ray on them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from raylm.cluster.file import ClusterFile, Finding, Key
from raylm.cluster.nodes import is_spot
from raylm.settings import Settings, problems
from raylm.settings.loading import BOOTSTRAP_CONFIG

_LISTS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")


def check_commands(cluster: ClusterFile) -> Iterator[Finding]:
    """What keeps machines from joining, from scaling, or from having the versions that the job was tried with."""
    yield from _off_the_head(cluster)
    if cluster.provider == "kuberay":
        return
    yield from _starts(cluster)
    for name in _LISTS:
        for key, text in commands(cluster, name):
            yield from _installs(cluster, key, text)


def commands(cluster: ClusterFile, name: str) -> Iterator[tuple[Key, str]]:
    """The commands of a list, and where each stands."""
    found = cluster.get(name, default=[])
    for number, text in enumerate(found if isinstance(found, list) else []):
        yield (name, number), str(text)


def _starts(cluster: ClusterFile) -> Iterator[Finding]:
    head = [(key, text) for key, text in commands(cluster, "head_start_ray_commands") if "ray start" in text]
    if not head:
        if cluster.get("head_start_ray_commands") is not None:
            yield cluster.error(("head_start_ray_commands",), "none of them starts Ray", "add ray start --head …")
        else:
            yield cluster.warning((), "without head_start_ray_commands Ray takes its own, whose dashboard is open and "
                                  "whose jobs start outside of the checkout", "copy those of clusters/")  # fmt: skip
    for key, text in head:
        if "--head" not in text:
            yield cluster.error(key, "ray start without --head joins a cluster instead of making one", "add --head")
        if "--autoscaling-config" not in text:
            yield cluster.error(key, "without --autoscaling-config no workers are ever started",
                                "add --autoscaling-config=~/ray_bootstrap_config.yaml")  # fmt: skip
        if cluster.provider != "external" and not re.search(r"\bcd\s+\S+", text):
            yield cluster.error(key, "jobs run where Ray was started: `ray job submit jobs/pretrain.py` finds no file",
                                "write cd ~/raylm && before ray start")  # fmt: skip
    starts = list(commands(cluster, "worker_start_ray_commands"))
    for key, text in starts:
        if "ray start" in text and "$RAY_HEAD_IP" not in text:
            yield cluster.error(key, "does not name the head", "add --address=$RAY_HEAD_IP:6379")
    spot = [name for name, node_type in cluster.node_types.items() if is_spot(cluster.provider, node_type)]
    if spot and not any("raylm cluster watch" in text for _, text in starts):
        yield cluster.warning(
            ("worker_start_ray_commands",), f"machines of '{spot[0]}' are taken away without Ray being told before",
            f"start raylm cluster watch {cluster.provider} on them, as in clusters/{cluster.provider}.yaml",
        )  # fmt: skip


def _off_the_head(cluster: ClusterFile) -> Iterator[Finding]:
    """Jobs' own processes that find no machine, or not their settings, which Ray leaves on the head alone."""
    values = cluster.mapping("metadata", "raylm")
    if any(problems(values)):  # which are told elsewhere
        return
    wanted = Settings.model_validate(values).job.entrypoint_resources
    key = ("metadata", "raylm", "job", "entrypoint_resources")
    if not wanted:
        return
    able = [name for name in cluster.node_types if _can(cluster.node_types[name], wanted)]
    if cluster.node_types and not able:
        yield cluster.error(key, f"no machine has {', '.join(sorted(wanted))}; jobs would wait for ever",
                            "give one of the available_node_types these resources")  # fmt: skip
    copied = cluster.get("cluster_synced_files", default=[])
    is_copied = cluster.provider in ("external", "kuberay") or str(BOOTSTRAP_CONFIG) in copied
    if not is_copied and cluster.node_types and cluster.head_type not in able:
        yield cluster.error(key, "jobs run off the head, where their settings are not",
                            f"say cluster_synced_files: [{BOOTSTRAP_CONFIG}]")  # fmt: skip


def _can(node_type: dict[str, Any], wanted: dict[str, float]) -> bool:
    """Whether a machine has some resources; CPUs and memory that a file does not name, Ray finds there itself."""
    resources = node_type.get("resources") or {}
    return all(
        resources[name] >= amount if name in resources else name in ("CPU", "memory") for name, amount in wanted.items()
    )


def _installs(cluster: ClusterFile, key: Key, text: str) -> Iterator[Finding]:
    for installed in re.finditer(r"pip3? install\s+(?P<what>[^&;|\n]+)", text):
        what = installed["what"]
        if re.search(r"(-c|--constraint)[ =]", what):
            continue
        for package in ("ray", "raylm", "torch", "deepspeed"):
            named = re.search(rf"(?<![\w/.~-]){package}(\[[\w,-]+\])?(?P<pin>==\S+)?(?=[\s'\"]|$)", what)
            if named and not named["pin"]:
                yield cluster.error(key, f"installs whatever version of {package} is the newest on that day",
                                    "pin it, or add -c constraints.txt")  # fmt: skip
            elif named and package == "ray" and named["pin"].strip("='\"") != version("ray"):
                here = version("ray")
                why = f"installs ray {named['pin'][2:]}, this machine has {here}, and the two do not talk"
                yield cluster.error(key, why, f"say ray=={here}")
        if "latest/ray-" in what or "/nightly" in what:
            yield cluster.error(key, "installs a nightly build of Ray, another one every day", "pin a version")
