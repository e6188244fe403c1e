"""Spot machines with on-demand ones behind them, over any provider of Ray's.

Ray asks a cloud that has no spot machines left again and again, for as long as the work waits. Here it is asked at most
three times a minute; after a few failures in a row machines of an on-demand type stand in, and spot has a rest. Which
type stands in for which is said by `metadata.raylm.spot`, which `ray up` carries to the head's autoscaler.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from ray._private.ray_constants import LABELS_ENVIRONMENT_VARIABLE, RESOURCES_ENVIRONMENT_VARIABLE
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

from raylm.capacity import MARKET, NODE_TYPE
from raylm.errors import first_line
from raylm.settings import SpotSettings

logger = logging.getLogger(__name__)

STANDS_IN = "raylm-node-type"
"""The tag of a machine that stands in for one of another type: the type that it is of."""

_MOST_FAILURES, _WINDOW_S = 3, 60.0
_FIRST_PAUSE_S = 5.0


class Attempts:
    """When a cloud may be asked for machines of a type.

    Failures are followed by a pause that doubles, and no more than three fall into any minute.

    :param clock: seconds since some time.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._failed_at: list[float] = []
        self.in_a_row = 0
        """Failures since machines were last had."""

    def wait(self) -> None:
        """Sleep until the next attempt may be made."""
        if self._failed_at:
            pause = _FIRST_PAUSE_S * 2 ** (min(self.in_a_row, _MOST_FAILURES) - 1) if self.in_a_row else 0.0
            due = self._failed_at[-1] + pause
            if len(self._failed_at) >= _MOST_FAILURES:
                due = max(due, self._failed_at[-_MOST_FAILURES] + _WINDOW_S)
            self._sleep(max(due - self._clock(), 0))

    def failed(self) -> None:
        self._failed_at = [*self._failed_at[1 - _MOST_FAILURES :], self._clock()]
        self.in_a_row += 1

    def succeeded(self) -> None:
        self.in_a_row = 0

    def rests(self, after: int, seconds: float) -> bool:
        """Whether so many attempts in a row have failed, the last of them less than some seconds ago."""
        return self.in_a_row >= after and self._clock() - self._failed_at[-1] < seconds


class SpotFallback:
    """To be named before a node provider of Ray's among the bases of a class, whose machines it makes.

    Launches wait in the thread that asks for them, which Ray's autoscaler has for that alone.
    """

    provider_config: dict[str, Any]

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)  # type: ignore[call-arg]
        known = provider_config.get("spot_fallback", {})
        self._settings = SpotSettings.model_validate(known.get("settings", {}))
        self._node_types: dict[str, dict[str, Any]] = known.get("node_types", {})
        self._attempts: defaultdict[str, Attempts] = defaultdict(Attempts)
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    @classmethod
    def bootstrap_config(cls, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """As the provider does it, and with what the head's autoscaler has to know in the provider's own section."""
        config: dict[str, Any] = super().bootstrap_config(cluster_config)  # type: ignore[misc]
        said = ((config.get("metadata") or {}).get("raylm") or {}).get("spot") or {}
        settings = SpotSettings.model_validate(said)
        config["provider"]["spot_fallback"] = {
            "settings": settings.model_dump(mode="json"),
            "node_types": {name: config["available_node_types"][name] for name in settings.fallback.values()},
        }
        return config

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """As many machines as are asked for: spot ones while there are some, else those that stand in for them.

        :raises NodeLaunchException: as many machines stand in as the on-demand type's `max_workers` allows.
        """
        spot = tags.get(TAG_RAY_USER_NODE_TYPE, "")
        on_demand = self._settings.fallback.get(spot)
        if on_demand is None:
            return self._make(node_config, tags, count)
        with self._turns[spot]:
            made = self._make_spot(spot, node_config, tags, count)
            if len(made) < count:
                made |= self._make_stand_ins(spot, on_demand, tags, count - len(made))
        return made

    def _make_spot(self, spot: str, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """As many as can be had before too many attempts have failed."""
        attempts, made = self._attempts[spot], dict[str, Any]()
        while len(made) < count and not attempts.rests(self._settings.after, self._settings.retry_minutes * 60):
            attempts.wait()
            try:
                made |= self._make(node_config, tags, count - len(made))
            except Exception as error:  # each cloud has its own
                logger.warning("%s: no spot machine: %s", spot, first_line(error))
            if len(made) == count:
                attempts.succeeded()
            else:
                attempts.failed()
        return made

    def _make_stand_ins(self, spot: str, on_demand: str, tags: dict[str, str], count: int) -> dict[str, Any]:
        most = self._node_types[on_demand].get("max_workers")
        room = count if most is None else most - self._count_of(on_demand)
        attempts = self._attempts[on_demand]
        if room < count:
            attempts.failed()
            attempts.wait()
            raise NodeLaunchException(
                "SpotUnavailable",
                f"{count} machines of {on_demand} were to stand in for {spot}, whose max_workers leaves {room}",
                None,
            )
        logger.warning("%s: %d machines of %s stand in", spot, count, on_demand)
        attempts.wait()
        try:
            made = self._make(self._node_types[on_demand]["node_config"], tags | {STANDS_IN: on_demand}, count)
        except Exception:
            attempts.failed()
            raise
        attempts.succeeded()
        return made

    def _count_of(self, node_type: str) -> int:
        """Machines of a type, and those of it that stand in for others."""
        own = set(self.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: node_type}))  # type: ignore[attr-defined]
        return len(own | set(self.non_terminated_nodes({STANDS_IN: node_type})))  # type: ignore[attr-defined]

    def _make(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Machines by the provider itself, by their ids; a provider that does not say which has made them all."""
        made = super().create_node(node_config, tags, count)  # type: ignore[misc]
        return dict.fromkeys(map(str, range(count))) if made is None else made

    def get_command_runner(self, log_prefix: str, node_id: str, *words: Any, **named: Any) -> CommandRunnerInterface:
        """Of a machine that stands in: one by which Ray starts with the labels of the type that the machine is of."""
        runner = super().get_command_runner(log_prefix, node_id, *words, **named)  # type: ignore[misc]
        on_demand = self.node_tags(node_id).get(STANDS_IN)  # type: ignore[attr-defined]
        if on_demand is None:
            return runner
        labels = {MARKET: "on-demand"} | self._node_types[on_demand].get("labels", {}) | {NODE_TYPE: on_demand}
        return _Relabelled(runner, labels)


class _Relabelled:
    """A command runner by which Ray starts with other labels."""

    def __init__(self, runner: CommandRunnerInterface, labels: dict[str, str]) -> None:
        self._runner, self._labels = runner, labels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, *words: Any, environment_variables: dict[str, object] | None = None, **named: Any) -> Any:
        if environment_variables and RESOURCES_ENVIRONMENT_VARIABLE in environment_variables:  # Ray is started
            environment_variables = environment_variables | {LABELS_ENVIRONMENT_VARIABLE: self._labels}
        return self._runner.run(*words, environment_variables=environment_variables, **named)
