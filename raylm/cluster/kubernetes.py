"""A cluster file as KubeRay's resources: what its node types are as pods, and its settings as a config map.

Field names are those of the custom resources of KubeRay 1.7.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml

from raylm.cluster.file import ClusterFile
from raylm.cluster.jobs import DASHBOARD_PORT
from raylm.errors import SettingsError
from raylm.settings import Settings, model_directory
from raylm.storage import fingerprint

_SETTINGS_AT = "/etc/raylm"
_API = "ray.io/v1"
_KEPT_S = 600
"""How long a job that has ended can still be looked at."""
_SERVE_PORT = 8_000

FAULT_TOLERANCE = "gcsFaultToleranceOptions"
"""What a cluster's head leaves on a volume or in Redis, in the words of a RayCluster; a key of `provider`."""

Resource = dict[str, Any]


def ray_cluster(cluster: ClusterFile) -> list[Resource]:
    """A cluster that stays until it is deleted."""
    return [_settings_map(cluster), _resource(cluster, "RayCluster", cluster_spec(cluster))]


def ray_job(cluster: ClusterFile, settings: Settings, command: str) -> list[Resource]:
    """A cluster that is made for a command of raylm, and ends with it."""
    name, *options = shlex.split(command)
    suffix = f"{name}-{fingerprint(options)[:6]}" if options else name  # each is a resource of its own
    return [_settings_map(cluster), _resource(cluster, "RayJob", _job_spec(cluster, settings, command), suffix=suffix)]


def ray_cron_job(cluster: ClusterFile, settings: Settings) -> list[Resource]:
    """A cluster for each night."""
    nightly = settings.nightly
    spec = {
        "schedule": nightly.schedule,
        "timeZone": nightly.timezone,
        "jobTemplate": _job_spec(cluster, settings, "nightly"),
    }
    return [_settings_map(cluster), _resource(cluster, "RayCronJob", spec, suffix="nightly")]


def ray_service(cluster: ClusterFile, settings: Settings) -> list[Resource]:
    """A cluster that serves the model."""
    from raylm.inference.service.start import application

    served = settings.serve.model_copy(update={"host": "0.0.0.0", "port": _SERVE_PORT})
    config = {"applications": [application(served, model_directory(settings), settings.topology)]}
    spec = {
        "serveConfigV2": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "rayClusterConfig": cluster_spec(cluster),
    }
    return [_settings_map(cluster), _resource(cluster, "RayService", spec, suffix="service")]


def cron_job(cluster: ClusterFile, settings: Settings) -> list[Resource]:
    """Kubernetes' own cron job, which submits the night to a cluster that stays."""
    name = _name(cluster)
    head = f"http://{name}-head-svc:{DASHBOARD_PORT}"
    container = {
        "name": "raylm",
        "image": _image(cluster),
        "command": ["raylm", "submit", "--address", head, "jobs/nightly.py"],
        "env": [
            *_environment(),
            {"name": "RAY_AUTH_MODE", "value": "token"},
            # KubeRay keeps a cluster's token in a secret of the cluster's name.
            {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": name, "key": "auth_token"}}},
        ],
        "volumeMounts": _mounts(),
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}},
    }
    pod = {**_account(cluster), "restartPolicy": "Never", "containers": [container], "volumes": _volumes(cluster)}
    spec = {
        "schedule": settings.nightly.schedule,
        "timeZone": settings.nightly.timezone,
        "concurrencyPolicy": "Forbid",
        "jobTemplate": {"spec": {"backoffLimit": 0, "template": {"spec": pod}}},  # `raylm submit` tries again itself
    }
    metadata = {"name": f"{name}-nightly", **namespace_of(cluster)}
    return [
        _settings_map(cluster),
        {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": metadata, "spec": spec},
    ]


# ------------------------------------------------------------------------------------------------ parts


def cluster_spec(cluster: ClusterFile) -> Resource:
    """The spec of a RayCluster."""
    from ray import __version__

    workers = [name for name in cluster.node_types if name != cluster.head_type]
    kept = cluster.get("provider", FAULT_TOLERANCE)
    return {
        "rayVersion": __version__,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": round(60 * float(cluster.get("idle_timeout_minutes", default=5))),
        },
        "authOptions": {"mode": "token"},
        **({FAULT_TOLERANCE: kept} if kept else {}),
        "headGroupSpec": {
            "rayStartParams": {
                "num-cpus": str(cluster.get("available_node_types", cluster.head_type, "resources", "CPU", default=0))
            },
            "template": _pod(cluster, cluster.head_type, "ray-head"),
        },
        "workerGroupSpecs": [_worker_group(cluster, name) for name in workers],
    }


def _worker_group(cluster: ClusterFile, name: str) -> Resource:
    node_type = cluster.node_types[name]
    least = int(node_type.get("min_workers", 0))
    group: Resource = {
        "groupName": name,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": int(node_type.get("max_workers", least)),
        "rayStartParams": _own_resources(node_type),
        "template": _pod(cluster, name, "ray-worker"),
    }
    if labels := node_type.get("labels"):
        group["labels"] = labels
    if priority := node_type.get("priority"):
        group["priority"] = priority
    return group


def _own_resources(node_type: dict[str, Any]) -> dict[str, str]:
    """Resources that Ray cannot see in a pod, as `ray start` takes them."""
    own = {name: amount for name, amount in node_type["resources"].items() if name not in ("CPU", "GPU", "memory")}
    return {"resources": json.dumps(json.dumps(own))} if own else {}


def _pod(cluster: ClusterFile, name: str, container_name: str) -> Resource:
    node_type = cluster.node_types[name]
    node_config, resources = node_type["node_config"], node_type["resources"]
    amounts: dict[str, Any] = {
        "cpu": node_config.get("cpu", resources.get("CPU")),
        "memory": node_config.get("memory"),
        "nvidia.com/gpu": resources.get("GPU"),
    }
    limits = {kind: amount if isinstance(amount, str) else str(amount) for kind, amount in amounts.items() if amount}
    container = {
        "name": container_name,
        "image": _image(cluster),
        "resources": {"limits": limits, "requests": limits},
        "env": _environment(),
        "volumeMounts": _mounts(),
    }
    more = node_config.get("pod") or {}
    return {"spec": {**_account(cluster), **more, "containers": [container], "volumes": _volumes(cluster)}}


def _job_spec(cluster: ClusterFile, settings: Settings, command: str) -> Resource:
    spec: Resource = {
        "entrypoint": shlex.join(["python", "-m", "raylm", *shlex.split(command)]),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _KEPT_S,
        "backoffLimit": settings.job.retries,
        "rayClusterSpec": cluster_spec(cluster),
    }
    if settings.job.entrypoint_resources:
        spec["entrypointResources"] = json.dumps(settings.job.entrypoint_resources)
    return spec


def _settings_map(cluster: ClusterFile) -> Resource:
    """The whole file, which every pod finds by `$RAYLM_CLUSTER`."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{_name(cluster)}-settings", **namespace_of(cluster)},
        "data": {"cluster.yaml": yaml.safe_dump(cluster.values, sort_keys=False, allow_unicode=True)},
    }


def _resource(cluster: ClusterFile, kind: str, spec: Resource, suffix: str = "") -> Resource:
    name = _name(cluster) + (f"-{suffix}" if suffix else "")
    return {"apiVersion": _API, "kind": kind, "metadata": {"name": name, **namespace_of(cluster)}, "spec": spec}


def _name(cluster: ClusterFile) -> str:
    return str(cluster.get("cluster_name"))


def namespace_of(cluster: ClusterFile) -> Resource:
    """The metadata that says where a resource of a cluster is."""
    namespace = cluster.get("provider", "namespace")
    return {"namespace": namespace} if namespace else {}


def _account(cluster: ClusterFile) -> Resource:
    account = cluster.get("provider", "service_account")
    return {"serviceAccountName": account} if account else {}


def _image(cluster: ClusterFile) -> str:
    """:raises SettingsError: the file names none."""
    image = cluster.get("provider", "image")
    if not isinstance(image, str):
        raise SettingsError(f"{cluster.path}: provider.image is missing; name an image with raylm in it")
    return image


def _environment() -> list[Resource]:
    return [{"name": "RAYLM_CLUSTER", "value": f"{_SETTINGS_AT}/cluster.yaml"}]


def _mounts() -> list[Resource]:
    return [{"name": "settings", "mountPath": _SETTINGS_AT, "readOnly": True}]


def _volumes(cluster: ClusterFile) -> list[Resource]:
    return [{"name": "settings", "configMap": {"name": f"{_name(cluster)}-settings"}}]
