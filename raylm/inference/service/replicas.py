"""The replicas of the model, as Ray Serve counts them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray import serve

APPLICATION = "raylm"
MODEL = "model"
"""The deployment of the model's replicas."""
CALLS_A_REPLICA = 2
"""One that it works on and one that waits for it: with more of them a replica is busy."""
_LOOK_S = 2.0
_RUNNING, _STOPPING = "RUNNING", "STOPPING"


class Replicas:
    """How many there are.

    :param wanted: so many, or between so many.
    """

    def __init__(self, wanted: int | tuple[int, int]) -> None:
        self._fewest, self._most = wanted if isinstance(wanted, tuple) else (wanted, wanted)
        self.running = max(self._fewest, 1)
        """That can be asked, as was seen last; one where none is, for a request to have it started."""
        self._due = 0.0
        self._looking: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Have them counted again where that was long ago and their number may change; nobody waits for it."""
        if self._fewest < self._most and time.monotonic() >= self._due:
            self._due = time.monotonic() + _LOOK_S
            self._looking = asyncio.create_task(self._count())

    async def are_ready(self) -> bool:
        """Whether one has loaded the model, or would for a request that comes."""
        states = await asyncio.to_thread(_states)
        if states is None:
            return False
        return _RUNNING in states or (self._fewest == 0 and not states.keys() - {_STOPPING})

    async def _count(self) -> None:
        states = await asyncio.to_thread(_states)
        self.running = max((states or {}).get(_RUNNING, 0), 1)


def _states() -> dict[str, int] | None:
    """How many replicas are in which state; None where the model is not deployed."""
    application: Any = serve.status().applications.get(APPLICATION)
    found = application.deployments.get(MODEL) if application else None
    return found and {str(state): number for state, number in found.replica_states.items() if number}
