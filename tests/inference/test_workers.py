"""How many engine actors there are, and what each computes on."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from raylm.inference.workers import plan_workers
from raylm.settings import Topology

GROWING = Topology("head", ({"CPU": 2}, {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}))


@pytest.mark.parametrize(
    ("wanted", "machines", "topology", "expected"),
    [
        ("auto", [("", {"CPU": 4.0})], None, ((4, 4), "cpu")),
        ("auto", [("", {"CPU": 4.0})], GROWING, ((4, 4), "cpu")),  # another cluster's file
        ("auto", [("head", {"CPU": 2.0})], GROWING, ((1, 8), "cuda")),
        ("auto", [("head", {"CPU": 2.0}), ("gpu", {"CPU": 8.0, "GPU": 4.0})], GROWING, ((4, 4), "cuda")),
        ((1, 6), [("head", {"CPU": 2.0})], GROWING, ((1, 6), "cuda")),
        (3, [("", {"CPU": 4.0})], None, ((3, 3), "cpu")),
        (40, [("", {"CPU": 4.0})], None, ((10, 10), "cpu")),  # no more than there is work for
    ],
)
def test_workers_are_those_that_the_cluster_has_or_may_get(
    monkeypatch: pytest.MonkeyPatch,
    wanted: Any,
    machines: list[tuple[str, dict[str, float]]],
    topology: Topology | None,
    expected: Any,
) -> None:
    nodes = [{"Alive": True, "Resources": has, "Labels": {"ray.io/node-group": name}} for name, has in machines]
    total: dict[str, float] = {}
    for _, has in machines:
        for name, amount in has.items():
            total[name] = total.get(name, 0) + amount
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    assert plan_workers(wanted, 10, topology) == expected
