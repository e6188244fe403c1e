"""What the machines of the connected cluster cost."""

from __future__ import annotations

from collections.abc import Mapping

from raylm.capacity import NODE_TYPE

OTHER = "other"
"""Names the price of machines whose node type has none of its own."""


def hourly_price(prices: Mapping[str, float]) -> float | None:
    """An hour of all the machines that are up now, in the currency of the prices; None where one has no price."""
    if not prices:
        return None
    import ray

    total = 0.0
    for node in ray.nodes():
        if node["Alive"]:
            price = prices.get((node.get("Labels") or {}).get(NODE_TYPE, OTHER), prices.get(OTHER))
            if price is None:
                return None
            total += price
    return total


def cost(price_per_hour: float, seconds: float) -> float:
    """What a time of machines costs."""
    return price_per_hour * seconds / 3_600
