"""What the connected cluster can hold: the machines that are up, and those that its autoscaler may add."""

from __future__ import annotations

from raylm.settings import Topology

NODE_TYPE = "ray.io/node-group"
"""The label by which Ray tells a machine's node type, which it sets from `RAY_NODE_TYPE_NAME`."""
NODE_IP = "RAYLM_NODE_IP"
"""The variable that says a machine's address to its processes, where several machines are one."""
MARKET = "ray.io/market-type"
"""The label by which Ray tells spot machines from others."""


def machines(resource: str, topology: Topology | None) -> list[int]:
    """How much of a resource each machine has: of those that are up, or of all that may be, where those are more.

    :param topology: of the cluster file that was read.
    """
    import ray

    up = [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]
    if topology is None or not is_of(topology):
        return up
    promised = [int(machine.get(resource, 0)) for machine in topology.machines]
    return promised if sum(promised) > sum(up) else up


def is_of(topology: Topology) -> bool:
    """Whether the connected cluster is one that `ray up` made of a file with these machines."""
    import ray

    return topology.head in {(node.get("Labels") or {}).get(NODE_TYPE) for node in ray.nodes() if node["Alive"]}
