"""Spot machines that cannot be had: on-demand ones stand in, the cloud is asked seldom, and spot comes back."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

from raylm.cluster.file import OWN_PROVIDERS
from raylm.cluster.providers.processes import ProcessNodeProvider
from raylm.cluster.providers.spot import STANDS_IN, Attempts, SpotFallback
from raylm.errors import SettingsError
from raylm.settings import Settings
from tests.cluster.conftest import Cluster
from tests.cluster.flaky import ATTEMPTS

FALLBACK = {"fallback": {"spot": "steady"}, "after": 3, "retry_minutes": 15}
NODE_TYPES = {
    "head": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
    "spot": {"resources": {"CPU": 2}, "node_config": {"market": "spot"}, "min_workers": 0, "max_workers": 3,
             "labels": {"ray.io/market-type": "spot"}},
    "steady": {"resources": {"CPU": 2}, "node_config": {"market": "on-demand"}, "min_workers": 0, "max_workers": 2,
               "labels": {"ray.io/market-type": "on-demand"}},
}  # fmt: skip
WORKER = {TAG_RAY_USER_NODE_TYPE: "spot", "ray-node-type": "worker"}


class Clock:
    """A time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now

    def attempts(self) -> Attempts:
        return Attempts(self)


class Market(ProcessNodeProvider):
    """Has as many spot machines as it is told; more are refused after those have been made, as Google and Azure do."""

    spot = 0
    asked = 0

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        if node_config["market"] != "spot":
            return super().create_node(node_config, tags, count)
        self.asked += 1
        made = super().create_node(node_config, tags, min(count, self.spot)) if self.spot else {}
        self.spot -= len(made)
        if len(made) < count:
            raise RuntimeError("no capacity")
        return made


class Provider(SpotFallback, Market):
    pass


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def provider(clock: Clock) -> Iterator[Provider]:
    config = {"available_node_types": NODE_TYPES, "provider": {}, "metadata": {"raylm": {"spot": FALLBACK}}}
    provider = Provider(Provider.bootstrap_config(config)["provider"], f"s{os.getpid()}")
    provider._attempts.default_factory = clock.attempts
    yield provider
    shutil.rmtree(provider._place)


def launch(provider: Provider, clock: Clock, count: int) -> list[str | None]:
    """Which type stands in for each of so many spot machines, None for one that is spot; asked as often as Ray does.

    What a refused call has made counts for it.
    """
    before = set(provider.non_terminated_nodes({}))
    for _ in range(200):
        missing = count - len(set(provider.non_terminated_nodes({})) - before)
        if not missing:
            break
        with suppress(NodeLaunchException):
            provider.create_node(NODE_TYPES["spot"]["node_config"], WORKER, missing)
        clock.now += 1
    made = set(provider.non_terminated_nodes({})) - before
    return sorted((provider.node_tags(node).get(STANDS_IN) for node in made), key=str)


def test_attempts_are_three_in_any_minute() -> None:
    clock = Clock()
    attempts, at = clock.attempts(), []
    for _ in range(12):
        clock.now += attempts.due_s
        at.append(clock.now)
        attempts.failed()
    assert at[:4] == [1_000, 1_005, 1_015, 1_060]
    assert all(later - earlier >= 60 for earlier, later in zip(at, at[3:], strict=False))
    attempts.succeeded()
    assert attempts.due_s <= 60


def test_on_demand_stands_in_after_three_attempts_and_then_at_once(provider: Provider, clock: Clock) -> None:
    assert launch(provider, clock, 1) == ["steady"]
    assert (provider.asked, clock.now) == (3, 1_016)
    assert launch(provider, clock, 1) == ["steady"]
    assert (provider.asked, clock.now) == (3, 1_017)


def test_spot_is_asked_for_again_after_its_rest(provider: Provider, clock: Clock) -> None:
    launch(provider, clock, 1)
    provider.spot = 1
    assert launch(provider, clock, 1) == ["steady"]
    clock.now += 15 * 60
    assert launch(provider, clock, 1) == [None]


def test_spot_machines_that_there_are_are_taken_and_none_is_made_too_many(provider: Provider, clock: Clock) -> None:
    provider.spot = 1
    assert launch(provider, clock, 2) == [None, "steady"]
    assert len(provider.non_terminated_nodes({})) == 2


def test_no_more_stand_in_than_the_type_allows(provider: Provider, clock: Clock) -> None:
    assert launch(provider, clock, 3) == ["steady", "steady"]
    with pytest.raises(
        NodeLaunchException, match="1 machines of steady were to stand in for spot, its max_workers lea"
    ):
        provider.create_node(NODE_TYPES["spot"]["node_config"], WORKER, 1)
    provider.terminate_node(provider.non_terminated_nodes({STANDS_IN: "steady"})[0])
    assert launch(provider, clock, 1) == ["steady"]


def test_a_machine_whose_type_is_gone_from_the_file_is_still_reached(provider: Provider, clock: Clock) -> None:
    launch(provider, clock, 1)
    [node] = provider.non_terminated_nodes({STANDS_IN: "steady"})
    provider._node_types.clear()
    assert provider.get_command_runner("", node).run("echo here", with_output=True) == "here\n"


def test_a_type_that_there_is_not_is_named() -> None:
    config = {"available_node_types": NODE_TYPES, "provider": {}, "metadata": {"raylm": {"spot": {
        "fallback": {"spot": "stedy"}}}}}  # fmt: skip
    with pytest.raises(SettingsError, match=r"there is no node type 'stedy'; known: head, spot, steady"):
        Provider.bootstrap_config(config)


def test_other_types_are_made_as_ever(provider: Provider) -> None:
    tags = {TAG_RAY_USER_NODE_TYPE: "steady", "ray-node-type": "worker"}
    [node] = provider.create_node(NODE_TYPES["steady"]["node_config"], tags, 1)
    assert STANDS_IN not in provider.node_tags(node)
    assert provider.asked == 0


@pytest.mark.parametrize("cloud", OWN_PROVIDERS)
def test_the_clouds_providers_are_rays_with_the_fallback_before(cloud: str) -> None:
    from ray.autoscaler._private.providers import _NODE_PROVIDERS
    from ray.autoscaler.node_provider import NodeProvider

    try:
        [own, rays] = [_NODE_PROVIDERS[kind]({"module": OWN_PROVIDERS[cloud]}) for kind in ("external", cloud)]
    except ImportError as error:
        pytest.skip(f"needs raylm[{cloud}]: {error}")
    assert own.__mro__[1:3] == (SpotFallback, rays)
    assert issubclass(own, NodeProvider)
    assert own.create_node is SpotFallback.create_node


_JOB = """
import json, ray
ray.init()
group = ray.util.placement_group([{"CPU": 2}] * 2, strategy="STRICT_SPREAD")
ray.get(group.ready(), timeout=400)
print("LABELS", json.dumps([node["Labels"] for node in ray.nodes() if node["Alive"]]))
"""


@pytest.mark.slow
def test_a_job_gets_all_its_machines_on_demand(tmp_path: Path, small_settings: Settings) -> None:
    """With Ray's autoscaler and a spot market that is always empty."""

    def change(values: dict[str, Any]) -> None:
        values["provider"]["module"] = "tests.cluster.flaky.FallingBack"
        values["available_node_types"] = NODE_TYPES
        values["max_workers"] = 3
        values["metadata"]["raylm"]["spot"] = FALLBACK

    cluster = Cluster(tmp_path, small_settings, "127.77.6", change)
    with cluster.running():
        done = cluster.submit("--", sys.executable, "-c", _JOB)
        assert done.returncode == 0, done.stdout + done.stderr
        attempts = (cluster.provider._place / ATTEMPTS).read_text().splitlines()
    labels = done.stdout.partition("LABELS ")[2].partition("\n")[0]  # the autoscaler may have begun the line
    assert labels.count('"ray.io/market-type": "on-demand"') == 2
    assert labels.count('"ray.io/node-group": "steady"') == 2
    at = [float(line.split()[0]) for line in attempts]
    assert len(at) >= 3
    assert all(later - earlier >= 60 for earlier, later in zip(at, at[3:], strict=False))
