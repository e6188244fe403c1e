"""Azure's machines by Ray's own provider, spot ones with on-demand ones behind them."""

from __future__ import annotations

from ray.autoscaler._private._azure.node_provider import AzureNodeProvider

from raylm.cluster.providers.spot import SpotFallback


class AzureProvider(SpotFallback, AzureNodeProvider):  # type: ignore[misc]
    """`type: external` with `module: raylm.cluster.providers.azure.AzureProvider`; the rest as with `type: azure`."""
