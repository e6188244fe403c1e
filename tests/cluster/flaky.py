"""Machines of this one whose spot market is empty, for clusters of tests to name as their provider."""

from __future__ import annotations

import time
from typing import Any

from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

from raylm.cluster.providers.processes import ProcessNodeProvider
from raylm.cluster.providers.spot import SpotFallback

ATTEMPTS = "spot-attempts"
"""The file beside the machines with the time of each attempt, and how many machines it asked for."""


class EmptyMarket(ProcessNodeProvider):
    """Has no machines of the type `spot`."""

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        if tags.get(TAG_RAY_USER_NODE_TYPE) == "spot" and node_config["market"] == "spot":
            with (self._place / ATTEMPTS).open("a") as file:
                file.write(f"{time.time()} {count}\n")
            raise RuntimeError("InsufficientInstanceCapacity: there is no Spot capacity")
        return super().create_node(node_config, tags, count)


class FallingBack(SpotFallback, EmptyMarket):
    """As the clouds' providers are put together."""
