"""What the panels of the Grafana dashboard ask Prometheus for."""

from __future__ import annotations

import re

from raylm.cluster.monitoring import DASHBOARD


def metrics_of(row: str) -> set[str]:
    """The names that the panels of a row ask for."""
    return {name for panel in DASHBOARD[row] for query, _ in panel.queries for name in re.findall(r"ray_\w+", query)}
