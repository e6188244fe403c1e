"""How many workers there are, and what each of them has."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from raylm.errors import TrainingError
from raylm.settings import FinetuneSettings
from raylm.training.groups import Width, choose_width


@pytest.mark.parametrize(
    ("workers", "machines", "for_data", "expected"),
    [
        ("auto", [2], 0, Width(1, 1, False, cpus=2)),
        ("auto", [16], 0, Width(4, 4, False, cpus=4)),
        ("auto", [16], 1, Width(3, 3, False, cpus=5)),
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
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(sum(machines))})
    assert choose_width(FinetuneSettings(workers=workers), for_data) == expected


def test_a_worker_for_each_gpu_has_one_cpu_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 32.0, "GPU": 8.0})
    width = choose_width(FinetuneSettings(), 0)
    assert width == Width(8, 8, True)
    assert width.resources == {"CPU": 1, "GPU": 1}
    with pytest.raises(TrainingError, match=r"finetune.workers is 9, the cluster has 8 GPUs"):
        choose_width(FinetuneSettings(workers=9), 0)
