"""The machines that a cluster file describes, as pools of equal ones."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Literal, NamedTuple

from raylm.cluster.file import ClusterFile
from raylm.cluster.machines import Gpu, machine_of
from raylm.cluster.nodes import is_spot
from raylm.prices import OTHER
from raylm.settings import FinetuneSettings, PretrainSettings, Settings
from raylm.training.estimate import Estimate, dry_run

Stage = Literal["pretrain", "finetune"]


class Pool(NamedTuple):
    """Machines of one node type.

    :param least: how many are always there; `most` is how many there may be. The head is one of them.
    :param cpus: of each; None where the file does not say and the machine is not known.
    :param gpu: what each of its GPUs is; None where it has none, or one that is not known.
    :param price: of an hour of one machine; None where none is given.
    """

    name: str
    least: int
    most: int
    cpus: int | None
    gpus: int
    gpu: Gpu | None
    is_spot: bool
    priority: int
    price: float | None


def pools_of(cluster: ClusterFile, settings: Settings) -> list[Pool]:
    """All pools of a cluster; of machines that are named by their addresses, one."""
    prices = settings.prices
    if cluster.provider == "local":
        machines = 1 + len(cluster.get("provider", "worker_ips", default=[]))
        return [Pool("machines", machines, machines, None, 0, None, False, 0, prices.get(OTHER))]
    found = []
    for name, node_type in cluster.node_types.items():
        node_config = node_type.get("node_config") or {}
        machine = machine_of(cluster.provider, node_config)
        said = node_type.get("resources") or {}
        is_head = name == cluster.head_type
        found.append(
            Pool(
                name,
                int(node_type.get("min_workers", 0)) + is_head,
                cluster.workers_of(name) + is_head,
                said.get("CPU", machine.cpus if machine else None),
                int(said.get("GPU", machine.gpus if machine else 0)),
                machine.gpu if machine else None,
                is_spot(cluster.provider, node_type),
                int(node_type.get("priority", 0)),
                prices.get(name, prices.get(OTHER)),
            )
        )
    return found


def gpus_in(pools: Sequence[Pool]) -> int:
    """How many GPUs there are when all machines are up."""
    return sum(pool.most * pool.gpus for pool in pools)


def cpus_in(pools: Sequence[Pool]) -> int | None:
    """How many CPUs there are when all machines are up; None where one does not say."""
    if any(pool.cpus is None for pool in pools):
        return None
    return sum(pool.most * (pool.cpus or 0) for pool in pools)


def estimate(settings: Settings, stage: Stage, workers: int, on_gpus: bool) -> Estimate:
    """What a training would take of each of so many workers, by the settings alone: no storage is asked.

    :raises RaylmError: it could not run as the settings say.
    """
    training: PretrainSettings | FinetuneSettings = getattr(settings, stage)
    precision = "bf16" if on_gpus and training.precision == "auto" else training.precision
    assumed = training.model_copy(update={"workers": workers, "precision": precision})
    with tempfile.TemporaryDirectory() as nowhere:
        return dry_run(settings.model_copy(update={"storage": nowhere, stage: assumed}), stage)
