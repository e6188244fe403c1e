"""What Prometheus asks a cluster for, and a Grafana dashboard of what it answers."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import yaml

from raylm.cluster.file import ClusterFile
from raylm.cluster.kubernetes import namespace_of
from raylm.errors import SettingsError

_FOUND = "/tmp/ray/prom_metrics_service_discovery.json"
"""Where a head keeps the addresses of its cluster's machines for Prometheus, as Ray documents it."""
_EVERY = "15s"
_WIDTH, _HEIGHT, _IN_A_ROW = 8, 8, 3
"""Of panels; Grafana's page is 24 wide."""


class Panel(NamedTuple):
    """:param queries: what is drawn, each with its legend, in which `{{tag}}` is a tag's value.
    :param unit: as Grafana names it.
    """

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]


def _quantiles(name: str, by: str) -> tuple[tuple[str, str], ...]:
    rates = f"sum by (le, {by}) (rate({name}_bucket[5m]))"
    shares = (0.5, 0.99)
    return tuple((f"histogram_quantile({share}, {rates})", f"p{100 * share:.0f} {{{{{by}}}}}") for share in shares)


DASHBOARD: dict[str, tuple[Panel, ...]] = {
    "Training": (
        Panel("Loss", "none", (("ray_raylm_train_loss", "{{run}}"),)),
        Panel("Validation loss", "none", (("ray_raylm_train_validation_loss", "{{run}}"),)),
        Panel("Step", "none", (("ray_raylm_train_step", "{{run}}"),)),
        Panel("Tokens a second, without padding", "none", (("ray_raylm_train_real_tokens_per_s", "{{run}}"),)),
        Panel("Model FLOPs utilisation", "percentunit", (("ray_raylm_train_mfu", "{{run}}"),)),
        Panel("Time spent waiting", "percentunit", (
            ("ray_raylm_train_data_wait", "for data, {{run}}"),
            ("ray_raylm_train_checkpoint_stall", "for checkpoints, {{run}}"),
        )),
    ),
    "Service": (
        Panel("Requests a second", "reqps", (
            ("sum by (route, status) (rate(ray_raylm_requests_total[1m]))", "{{route}} {{status}}"),
        )),
        Panel("Time to answer", "s", _quantiles("ray_raylm_request_seconds", "route")),
        Panel("Open requests", "none", (("sum(ray_raylm_open_requests)", "open"),)),
        Panel("Tokens a second", "none", (("sum by (kind) (rate(ray_raylm_tokens_total[1m]))", "{{kind}}"),)),
    ),
    "Machines": (
        Panel("Machines", "none", (("sum by (node_type) (ray_cluster_active_nodes)", "{{node_type}}"),)),
        Panel("CPU", "percent", (("ray_node_cpu_utilization", "{{instance}}"),)),
        Panel("GPU", "percent", (("ray_node_gpus_utilization", "{{instance}} {{GpuIndex}}"),)),
        Panel("Memory", "bytes", (("ray_node_mem_used", "{{instance}}"),)),
    ),
}  # fmt: skip


def prometheus(cluster: ClusterFile) -> str:
    """For `prometheus.yml` on the head; of a cluster on Kubernetes, a PodMonitor for the Prometheus operator.

    :raises SettingsError: its machines are processes of this one, each with logs and addresses in a place of its own.
    """
    if cluster.provider == "external":
        raise SettingsError(f"{cluster.path}: machines that are processes of this one are not for Prometheus to watch")
    name = str(cluster.get("cluster_name"))
    if cluster.provider == "kuberay":
        monitor = {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PodMonitor",
            "metadata": {
                "name": f"{name}-metrics",
                **namespace_of(cluster),  # where alone it finds pods
                "labels": {"release": "prometheus"},
            },
            "spec": {
                # Also those of jobs and services, whose clusters KubeRay gives names of their own.
                "selector": {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]},
                "podMetricsEndpoints": [{"port": "metrics", "interval": _EVERY}],
            },
        }
        return str(yaml.safe_dump(monitor, sort_keys=False))
    config = {
        "global": {"scrape_interval": _EVERY},
        "scrape_configs": [{"job_name": name, "file_sd_configs": [{"files": [_FOUND]}]}],
    }
    return str(yaml.safe_dump(config, sort_keys=False))


def grafana(cluster: ClusterFile) -> str:
    """A dashboard to be imported, which asks for its source of data."""
    name = cluster.get("cluster_name")
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in DASHBOARD.items():
        place = {"x": 0, "y": top, "w": _WIDTH * _IN_A_ROW, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place, "panels": []})
        for number, panel in enumerate(row):
            below, beside = divmod(number, _IN_A_ROW)
            place = {"x": beside * _WIDTH, "y": top + 1 + below * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            panels.append({"id": len(panels) + 1, "gridPos": place} | _drawn(panel))
        top += 1 + -(-len(row) // _IN_A_ROW) * _HEIGHT
    dashboard = {
        "title": f"raylm: {name}",
        "uid": f"raylm-{name}"[:40],
        "tags": ["raylm"],
        "schemaVersion": 39,
        "refresh": _EVERY,
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}]},
        "panels": panels,
    }
    return json.dumps(dashboard, indent=2) + "\n"


def _drawn(panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    targets = [
        {"datasource": source, "expr": query, "legendFormat": legend, "refId": chr(ord("A") + number)}
        for number, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": targets,
    }
