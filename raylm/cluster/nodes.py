"""Node types: what the cloud's API takes, what a machine has, which machines there may be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from raylm.capacity import MARKET
from raylm.cluster.file import ClusterFile, Finding, Key
from raylm.cluster.kubernetes import FAULT_TOLERANCE
from raylm.cluster.machines import machine_of
from raylm.errors import remedy_for

_RAYS_OWN: dict[str, set[str]] = {"aws": {"SubnetIds"}, "gcp": set(), "azure": {"availability_zone"}}
"""Keys of a node_config that Ray takes itself and the cloud never sees."""

_FAULT_TOLERANCE_KEYS = {
    "backend", "storage", "redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace",
}  # fmt: skip
"""Of a RayCluster's gcsFaultToleranceOptions."""

_POD_KEYS = {"cpu", "memory", "pod"}
"""Of a node_config: how much CPU and memory the pod has, and what else its spec says."""


def check_nodes(cluster: ClusterFile) -> Iterator[Finding]:
    """What is wrong with the types of machines."""
    for name, node_type in cluster.node_types.items():
        key = ("available_node_types", name)
        node_config = node_type.get("node_config")
        if not isinstance(node_config, dict):
            continue
        yield from _api(cluster, (*key, "node_config"), node_config)
        yield from _resources(cluster, key, node_type, node_config)
        yield from _market(cluster, key, name)
    yield from _bounds(cluster)
    yield from _places(cluster)
    yield from _pods(cluster)


# ----------------------------------------------------------------------------------------- the cloud's API


def _api(cluster: ClusterFile, key: Key, node_config: dict[str, Any]) -> Iterator[Finding]:
    """Keys and values that the cloud's API would refuse; Ray passes them on unseen."""
    if cluster.provider == "aws":
        yield from _aws(cluster, key, node_config)
    elif cluster.provider == "gcp":
        yield from _unknown(cluster, key, node_config, _gcp_keys(), "a Compute Engine instance")
    elif cluster.provider == "kuberay":
        yield from _unknown(cluster, key, node_config, _POD_KEYS, "a pod, as `raylm render` makes it,")
        memory = node_config.get("memory")
        if not re.fullmatch(r"\d+(\.\d+)?[KMGT]i?", str(memory)):
            yield cluster.error((*key, "memory"), f"found {memory!r}", "Kubernetes wants an amount such as 64Gi")
    elif cluster.provider == "azure":
        known = {"azure_arm_parameters"}
        yield from _unknown(cluster, key, node_config, known, "Ray's Azure provider")
        parameters = node_config.get("azure_arm_parameters")
        if isinstance(parameters, dict):
            yield from _unknown(
                cluster, (*key, "azure_arm_parameters"), parameters, _azure_keys(), "Ray's template of a machine"
            )


def _aws(cluster: ClusterFile, key: Key, node_config: dict[str, Any]) -> Iterator[Finding]:
    model = _aws_model()
    if model is None:
        yield cluster.warning(key, "not held against AWS's API: boto3 is absent", "pip install 'raylm[aws]'")
        return
    shape, instance_types = model
    passed = {name: value for name, value in node_config.items() if name not in _RAYS_OWN["aws"]}
    yield from _shaped(cluster, key, passed, shape)
    if str(node_config.get("ImageId", "latest_dlami")).lower() == "latest_dlami":
        yield cluster.error(
            (*key, "ImageId"), "Ray fills in an image of 2022, too old for torch and for today's GPU drivers",
            "name one, or resolve:ssm: and AWS's parameter for its newest, as in clusters/aws.yaml",
        )  # fmt: skip
    kind = node_config.get("InstanceType")
    if isinstance(kind, str) and kind not in instance_types:
        remedy = remedy_for(kind, instance_types, "name one that it has, such as m6i.large")
        yield cluster.error((*key, "InstanceType"), f"AWS has no '{kind}'", remedy)


def _shaped(cluster: ClusterFile, key: Key, value: Any, shape: Any) -> Iterator[Finding]:
    """Where a value is not what AWS's API model says it takes."""
    if shape.type_name == "structure":
        if not isinstance(value, dict):
            yield cluster.error(key, f"found {value!r}", "AWS takes a mapping here")
            return
        yield from _unknown(cluster, key, value, shape.members, f"AWS's {shape.name}")
        for name in set(value) & set(shape.members):
            yield from _shaped(cluster, (*key, name), value[name], shape.members[name])
    elif shape.type_name == "list":
        if not isinstance(value, list):
            yield cluster.error(key, f"found {value!r}", "AWS takes a list here")
            return
        for number, item in enumerate(value):
            yield from _shaped(cluster, (*key, number), item, shape.member)
    else:
        kinds = {"integer": int, "long": int, "boolean": bool, "string": str}
        wanted = kinds.get(shape.type_name)
        if wanted and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
            yield cluster.error(key, f"found {value!r}", f"AWS takes a {shape.type_name} here")
        elif wanted is str and shape.name != "InstanceType" and value not in (shape.enum or [value]):
            yield cluster.error(key, f"found '{value}'", f"AWS takes one of {', '.join(sorted(shape.enum)[:8])}")


@cache
def _aws_model() -> tuple[Any, frozenset[str]] | None:
    """What a request for machines may say, and the names of all machine types; None without AWS's library."""
    try:
        import botocore.session
    except ImportError:
        return None
    model = botocore.session.get_session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape, frozenset(model.shape_for("InstanceType").enum)


@cache
def _gcp_keys() -> frozenset[str] | None:
    """The keys of an instance by Google's own description; None without Google's library."""
    try:
        import googleapiclient.discovery_cache.documents as documents
    except ImportError:
        return None
    [folder] = documents.__path__
    description = json.loads((Path(folder) / "compute.v1.json").read_text(encoding="utf-8"))
    return frozenset(description["schemas"]["Instance"]["properties"])


@cache
def _azure_keys() -> frozenset[str]:
    import ray.autoscaler._private._azure as azure

    [folder] = azure.__path__
    template = json.loads((Path(folder) / "azure-vm-template.json").read_text(encoding="utf-8"))
    return frozenset(template["parameters"]) | _RAYS_OWN["azure"]


def _unknown(
    cluster: ClusterFile, key: Key, value: Mapping[str, Any], known: Iterable[str] | None, whose: str
) -> Iterator[Finding]:
    if known is None:
        yield cluster.warning(
            key, "not held against the cloud's API: its library is absent", f"pip install 'raylm[{cluster.provider}]'"
        )
        return
    for name in sorted(set(value) - set(known)):
        yield cluster.error((*key, name), f"{whose} has no such key", remedy_for(name, known, "take it out"))


# -------------------------------------------------------------------------------------------- resources


def _resources(
    cluster: ClusterFile, key: Key, node_type: dict[str, Any], node_config: dict[str, Any]
) -> Iterator[Finding]:
    """Resources that are not those of the machine: Ray would wait for, or fill, CPUs and GPUs that are not there."""
    machine = machine_of(cluster.provider, node_config)
    said = node_type.get("resources")
    if not isinstance(said, dict) or machine is None:
        return
    for name, there in (("CPU", machine.cpus), ("GPU", machine.gpus)):
        found = said.get(name)
        # No CPUs are what keeps work off the head; Ray finds out what is not said.
        if isinstance(found, int) and found != there and not (name == "CPU" and found == 0):
            yield cluster.error((*key, "resources", name), f"says {found}, the machine has {there}", f"say {there}")


def _market(cluster: ClusterFile, key: Key, name: str) -> Iterator[Finding]:
    spot = is_spot(cluster.provider, cluster.node_types[name])
    label = cluster.get("available_node_types", name, "labels", MARKET)
    if spot and name == cluster.head_type:
        yield cluster.error((*key, "node_config"), "the head is a spot machine: all jobs end when it is taken away",
                            "make it on-demand")  # fmt: skip
    elif spot and label != "spot":
        yield cluster.warning(key, f"spot machines without the label {MARKET}: spot",
                              f"add labels: {{{MARKET}: spot}}, by which jobs can tell them")  # fmt: skip
    elif not spot and label == "spot":
        yield cluster.error((*key, "labels", MARKET), "says spot, the machines are on-demand", "say on-demand")


def is_spot(provider: str, node_type: Mapping[str, Any]) -> bool:
    """Whether a cloud may take machines of a type away; of pods, their label says so."""
    node_config = node_type.get("node_config") or {}
    if provider == "kuberay":
        return (node_type.get("labels") or {}).get(MARKET) == "spot"
    if provider == "aws":
        return (node_config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
    if provider == "gcp":
        found = node_config.get("scheduling") or {}
        parts = found if isinstance(found, list) else [found]
        return any(part.get("preemptible") or part.get("provisioningModel") == "SPOT" for part in parts)
    return (node_config.get("azure_arm_parameters") or {}).get("priority") == "Spot"


# ----------------------------------------------------------------------------------------------- bounds


def _bounds(cluster: ClusterFile) -> Iterator[Finding]:
    """How many machines there may be."""
    if cluster.head_type in cluster.node_types and "max_workers" not in cluster.node_types[cluster.head_type]:
        yield cluster.warning(
            ("available_node_types", cluster.head_type),
            "without max_workers, Ray may start more machines of the head's type as workers",
            "add max_workers: 0",
        )
    total = cluster.get("max_workers")
    for name, node_type in cluster.node_types.items():
        key = ("available_node_types", name)
        fewest, most = node_type.get("min_workers", 0), node_type.get("max_workers")
        if isinstance(most, int) and isinstance(fewest, int) and fewest > most:
            yield cluster.error((*key, "min_workers"), f"says {fewest}, max_workers says {most}", "lower one of them")
        if isinstance(most, int) and isinstance(total, int) and most > total:
            yield cluster.warning(
                (*key, "max_workers"), f"says {most}, all types together may have {total}", "raise max_workers above"
            )
    if cluster.get("idle_timeout_minutes") == 0:
        yield cluster.error(("idle_timeout_minutes",), "0: machines end as soon as they are up", "say 5")


def _pods(cluster: ClusterFile) -> Iterator[Finding]:
    """What the pods of Kubernetes run, and what is left of a head."""
    if cluster.provider != "kuberay":
        return
    image = cluster.get("provider", "image")
    if not isinstance(image, str):
        yield cluster.error(("provider",), "no image: pods have nothing to run", "add image: with raylm in it")
    elif image.endswith(":latest") or ":" not in image.rsplit("/", 1)[-1]:
        yield cluster.error(("provider", "image"), f"{image} is another one after every push", "name a version")
    key = ("provider", FAULT_TOLERANCE)
    kept = cluster.get(*key)
    if isinstance(kept, dict):
        yield from _unknown(cluster, key, kept, _FAULT_TOLERANCE_KEYS, "a RayCluster's gcsFaultToleranceOptions")
    elif kept is not None:
        yield cluster.error(
            key, f"found {kept!r}", "say {backend: rocksdb, storage: {size: 2Gi}}, or {redisAddress: …}"
        )


def _places(cluster: ClusterFile) -> Iterator[Finding]:
    """Where the machines are."""
    region, zones = cluster.get("provider", "region"), cluster.get("provider", "availability_zone")
    if cluster.provider in ("aws", "gcp") and isinstance(region, str) and isinstance(zones, str):
        pattern = re.escape(region) + (r"[a-z]" if cluster.provider == "aws" else r"-[a-z]")
        for zone in zones.split(","):
            if not re.fullmatch(pattern, zone.strip()):
                yield cluster.error(
                    ("provider", "availability_zone"), f"'{zone.strip()}' is not in the region {region}",
                    f"name a zone of {region}, such as {region}{'a' if cluster.provider == 'aws' else '-a'}",
                )  # fmt: skip
    if cluster.provider == "local":
        head, workers = cluster.get("provider", "head_ip"), cluster.get("provider", "worker_ips", default=[])
        for number, worker in enumerate(workers if isinstance(workers, list) else []):
            if worker == head or worker in workers[:number]:
                what = "the head" if worker == head else "there twice"
                yield cluster.error(("provider", "worker_ips", number), f"{worker} is {what}", "name each machine once")
