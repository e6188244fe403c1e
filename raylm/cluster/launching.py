"""The commands that set machines up and start Ray on them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version

from raylm.cluster.file import ClusterFile, Finding, Key
from raylm.cluster.nodes import is_spot

_LISTS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")


def check_launching(cluster: ClusterFile) -> Iterator[Finding]:
    """What keeps machines from joining, from scaling, or from having the versions that the job was tried with."""
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
