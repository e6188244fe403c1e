"""What the machines of the connected cluster cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raylm.capacity import NODE_TYPE

OTHER = "other"
"""Names the price of machines whose node type has none of its own."""


def hourly_price(prices: Mapping[str, float]) -> float | None:
    """An hour of all the machines that are up now, in the currency of the prices; None where one has no price."""
    if not prices:
        return None
    import ray

    return price_of([(node.get("Labels") or {}).get(NODE_TYPE, OTHER) for node in ray.nodes() if node["Alive"]], prices)


def price_of(node_types: Iterable[str], prices: Mapping[str, float]) -> float | None:
    """An hour of machines of some types; None where one has no price."""
    found = [prices.get(name, prices.get(OTHER)) for name in node_types]
    known = [price for price in found if price is not None]
    return sum(known) if len(known) == len(found) else None


def cost(price_per_hour: float, seconds: float) -> float:
    """What a time of machines costs."""
    return price_per_hour * seconds / 3_600
