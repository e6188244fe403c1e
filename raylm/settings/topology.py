"""The machines that a cluster file describes beside `metadata.raylm`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_UNBOUNDED = 1 << 31
"""Workers of all types together, where a file does not say: KubeRay bounds each type alone."""


@dataclass(frozen=True)
class Topology:
    """The machines that a cluster file lets be up at once.

    :param head: the head's node type.
    :param machines: the resources of each machine, the head's among them.
    """

    head: str
    machines: tuple[Mapping[str, float], ...]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Topology | None:
        """That of a cluster file; None where it does not name the types of its machines.

        :raises ValueError: a number of machines is none.
        """
        head, node_types = document.get("head_node_type"), document.get("available_node_types")
        if not isinstance(head, str) or not isinstance(node_types, dict):
            return None
        most = _number("max_workers", document.get("max_workers"), _UNBOUNDED)
        machines: list[Mapping[str, float]] = []
        for name, node_type in node_types.items():
            described = node_type if isinstance(node_type, dict) else {}
            resources = described.get("resources") or {}
            usual = 0 if name == head or most == _UNBOUNDED else most
            own = _number(f"available_node_types.{name}.max_workers", described.get("max_workers"), usual)
            workers = min(own, most)
            machines += [resources] * (workers + (name == head))
        return cls(head, tuple(machines))


def _number(key: str, found: Any, usual: int) -> int:
    if found is None:
        return usual
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(f"{key}: found {found!r}, a whole number is expected")
    return found
