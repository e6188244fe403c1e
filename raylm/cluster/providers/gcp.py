"""GCP's machines by Ray's own provider, spot ones with on-demand ones behind them."""

from __future__ import annotations

from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

from raylm.cluster.providers.spot import SpotFallback


class GcpProvider(SpotFallback, GCPNodeProvider):  # type: ignore[misc]
    """`type: external` with `module: raylm.cluster.providers.gcp.GcpProvider`; the rest as with `type: gcp`."""

    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        """Also those that have shut themselves down: they are stopped, and their disks still cost."""
        with self.lock:
            stopped = [
                str(instance["name"])
                for resource in self.resources.values()
                for instance in resource.list_instances(tag_filters, is_terminated=True)
            ]
        return [*super().nodes_for_teardown(tag_filters), *stopped]
