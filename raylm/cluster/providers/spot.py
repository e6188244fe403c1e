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
from raylm.errors import SettingsError, first_line
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

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed_at: list[float] = []
        self._in_a_row = 0

    @property
    def due_s(self) -> float:
        """Seconds until the next attempt may be made; 0 where it may be made now."""
        if not self._failed_at:
            return 0.0
        pause = _FIRST_PAUSE_S * 2 ** (min(self._in_a_row, _MOST_FAILURES) - 1) if self._in_a_row else 0.0
        due = self._failed_at[-1] + pause
        if len(self._failed_at) == _MOST_FAILURES:
            due = max(due, self._failed_at[0] + _WINDOW_S)
        return max(due - self._clock(), 0.0)

    def failed(self) -> None:
        self._failed_at = [*self._failed_at[1 - _MOST_FAILURES :], self._clock()]
        self._in_a_row += 1

    def succeeded(self) -> None:
        self._in_a_row = 0

    def rests(self, after: int, seconds: float) -> bool:
        """Whether so many attempts in a row have failed, the last of them less than some seconds ago."""
        return self._in_a_row >= after and self._clock() - self._failed_at[-1] < seconds


class SpotFallback:
    """To be named before a node provider of Ray's among the bases of a class, whose machines it makes.

    A launch that has to wait is refused: Ray asks again, and launches machines of other types meanwhile.
    """

    provider_config: dict[str, Any]

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        known = provider_config.get("spot_fallback", {})
        self._settings = SpotSettings.model_validate(known.get("settings", {}))
        if self._settings.fallback:
            # One that stood in for another would be started again as what it never was.
            provider_config = provider_config | {"cache_stopped_nodes": False}
        super().__init__(provider_config, cluster_name)  # type: ignore[call-arg]
        self._node_types: dict[str, dict[str, Any]] = known.get("node_types", {})
        self._attempts: defaultdict[str, Attempts] = defaultdict(Attempts)
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    @classmethod
    def bootstrap_config(cls, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """As the provider does it, and with what the head's autoscaler has to know in the provider's own section.

        :raises SettingsError: `metadata.raylm.spot` names a node type that there is not.
        """
        config: dict[str, Any] = super().bootstrap_config(cluster_config)  # type: ignore[misc]
        said = ((config.get("metadata") or {}).get("raylm") or {}).get("spot") or {}
        settings, node_types = SpotSettings.model_validate(said), config["available_node_types"]
        for name in settings.fallback.values():
            if name not in node_types:
                known = ", ".join(sorted(node_types))
                raise SettingsError(f"metadata.raylm.spot.fallback: there is no node type '{name}'; known: {known}")
        config["provider"]["spot_fallback"] = {
            "settings": settings.model_dump(mode="json"),
            "node_types": {name: node_types[name] for name in settings.fallback.values()},
        }
        return config

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """As many machines as are asked for: spot ones while there are some, else those that stand in for them.

        :raises NodeLaunchException: some or all could not be made now: it is not time yet for another attempt, or as
            many stand in as the on-demand type's `max_workers` allows.
        """
        spot = tags.get(TAG_RAY_USER_NODE_TYPE, "")
        on_demand = self._settings.fallback.get(spot)
        if on_demand is None:
            return self._make(node_config, tags, count)
        with self._turns[spot]:
            made = {} if self._rests(spot) else self._make_spot(spot, node_config, tags, count)
            if len(made) < count:
                if not self._rests(spot):
                    raise _refused(f"{spot}: {count - len(made)} of {count} spot machines could not be had")
                made |= self._make_stand_ins(spot, on_demand, tags, count - len(made))
        return made

    def _rests(self, spot: str) -> bool:
        return self._attempts[spot].rests(self._settings.after, self._settings.retry_minutes * 60)

    def _make_spot(self, spot: str, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """As many as one attempt brings."""
        attempts = self._attempts[spot]
        if attempts.due_s:
            raise _refused(f"{spot}: spot machines are asked for again in {attempts.due_s:.0f} s")
        before = self._machines_of(spot)
        try:
            made = self._make(node_config, tags, count)
        except Exception as error:  # each cloud has its own
            logger.warning("%s: no spot machine: %s", spot, first_line(error))
            made = self._kept(self._machines_of(spot) - before)
        if len(made) < count:
            attempts.failed()
        else:
            attempts.succeeded()
        return made

    def _kept(self, begun: set[str]) -> dict[str, Any]:
        """Of the machines that a failed attempt has begun those that run; the others are ended."""
        running = {node for node in begun if self.is_running(node)}  # type: ignore[attr-defined]
        for node in begun - running:
            self.terminate_node(node)  # type: ignore[attr-defined]
        return dict.fromkeys(running)

    def _make_stand_ins(self, spot: str, on_demand: str, tags: dict[str, str], count: int) -> dict[str, Any]:
        attempts = self._attempts[on_demand]
        if attempts.due_s:
            raise _refused(f"{on_demand}: machines are asked for again in {attempts.due_s:.0f} s")
        most = self._node_types[on_demand].get("max_workers")
        room = count if most is None else min(most - len(self._machines_of(on_demand, STANDS_IN)), count)
        made: dict[str, Any] = {}
        if room > 0:
            logger.warning("%s: %d machines of %s stand in", spot, room, on_demand)
            try:
                made = self._make(self._node_types[on_demand]["node_config"], tags | {STANDS_IN: on_demand}, room)
            except Exception:
                attempts.failed()
                raise
            attempts.succeeded()
        if room < count:
            raise _refused(
                f"{count} machines of {on_demand} were to stand in for {spot}, its max_workers leaves {max(room, 0)}"
            )
        return made

    def _machines_of(self, node_type: str, *tags: str) -> set[str]:
        """Machines of a type, and those that name it under other tags."""
        every = (TAG_RAY_USER_NODE_TYPE, *tags)
        return {node for tag in every for node in self.non_terminated_nodes({tag: node_type})}  # type: ignore[attr-defined]

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
        # The type is gone from a file that names it no longer.
        known = self._node_types.get(on_demand, {}).get("labels", {})
        labels = {MARKET: "on-demand"} | known | {NODE_TYPE: on_demand}
        return _Relabelled(runner, labels)


def _refused(reason: str) -> NodeLaunchException:
    return NodeLaunchException("SpotUnavailable", reason, None)


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
