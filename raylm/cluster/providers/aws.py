"""AWS's machines by Ray's own provider, spot ones with on-demand ones behind them."""

from __future__ import annotations

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from raylm.cluster.providers.spot import SpotFallback


class AwsProvider(SpotFallback, AWSNodeProvider):  # type: ignore[misc]
    """`type: external` with `module: raylm.cluster.providers.aws.AwsProvider`; the rest as with `type: aws`."""
