"""How many workers there are, and what each of them has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from raylm.errors import TrainingError
from raylm.settings import FinetuneSettings, Topology, load, with_options
from raylm.training.groups import Width, choose_width


@pytest.mark.parametrize(
    ("workers", "machines", "for_data", "expected"),
    [
        ("auto", [2], 0, Width(1, 1, False, cpus=2)),
        ("auto", [16], 0, Width(4, 4, False, cpus=4)),
        ("auto", [16], 1, Width(3, 3, False, cpus=5, cpus_for_data=1)),
        ((1, 4), [4], 1, Width(1, 3, False, cpus=1, cpus_for_data=1)),
        ("auto", [64], 0, Width(4, 4, False, cpus=16)),
        (1, [8], 0, Width(1, 1, False, cpus=8)),
        (3, [8], 0, Width(3, 3, False, cpus=2)),
        (4, [4, 2, 2], 0, Width(4, 4, False, cpus=2)),
        (3, [4, 2], 0, Width(3, 3, False, cpus=2)),
        (2, [5, 1], 0, Width(2, 2, False, cpus=2)),
        ((1, 4), [8, 8], 0, Width(1, 4, False, cpus=1)),
    ],
)
def test_cpus_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, workers: Any, machines: list[int], for_data: int, expected: Width
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in machines]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0}}])
    assert choose_width(FinetuneSettings(workers=workers), for_data) == expected


def up(monkeypatch: pytest.MonkeyPatch, *machines: tuple[str, dict[str, float]]) -> None:
    """Machines that are up, by node type."""
    nodes = [
        {"Alive": True, "Resources": resources, "Labels": {"ray.io/node-group": name}} for name, resources in machines
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)


def test_a_worker_for_each_gpu_has_one_cpu_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    up(monkeypatch, ("gpu", {"CPU": 32.0, "GPU": 8.0}))
    width = choose_width(FinetuneSettings(), 0)
    assert width == Width(8, 8, True)
    assert width.resources == {"CPU": 1, "GPU": 1}
    with pytest.raises(TrainingError, match=r"finetune.workers is 9, the cluster has 8 GPUs"):
        choose_width(FinetuneSettings(workers=9), 0)


CLUSTER = {
    "head_node_type": "head",
    "max_workers": 6,
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 16}, "max_workers": 2},
        "gpu": {"resources": {"CPU": 8, "GPU": 4}, "max_workers": 4},
    },
}


def test_machines_that_may_come_count_on_their_own_cluster_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology.of(CLUSTER)
    up(monkeypatch, ("head", {"CPU": 4.0}))
    assert choose_width(FinetuneSettings(), 0, topology) == Width(16, 16, True)
    assert choose_width(FinetuneSettings(workers=(4, 16)), 0, topology) == Width(4, 16, True)
    assert choose_width(FinetuneSettings(), 0, None) == Width(1, 1, False, cpus=4)
    up(monkeypatch, ("", {"CPU": 8.0}))  # a laptop that reads the file of a cluster
    assert choose_width(FinetuneSettings(), 0, topology) == Width(2, 2, False, cpus=4)


def test_the_topology_is_read_from_the_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    values = CLUSTER | {"metadata": {"raylm": {"pretrain": {"steps": 3}}}}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    settings = load(path)
    assert settings.topology == Topology.of(CLUSTER)
    assert settings.topology and len(settings.topology.machines) == 7
    assert with_options(settings, "pretrain", {"steps": 4}).topology == settings.topology
    assert "topology" not in settings.model_dump()
    assert Topology.of({"cluster_name": "x"}) is None
