"""GCP's machines by Ray's own provider, spot ones with on-demand ones behind them."""

from __future__ import annotations

from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

from raylm.cluster.providers.spot import SpotFallback


class GcpProvider(SpotFallback, GCPNodeProvider):  # type: ignore[misc]
    """`type: external` with `module: raylm.cluster.providers.gcp.GcpProvider`; the rest as with `type: gcp`."""
