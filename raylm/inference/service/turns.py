"""Who computes next where online requests and batch jobs share a model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

QUIET_S = 10.0
"""After so long without an online request a model is all the batch jobs'."""
_LOOK_S = 0.05


class Turns:
    """Turns of one engine batch each, first come, first served; batch jobs rest between theirs while people ask.

    So an online request waits for one batch of a batch job at most, and a batch job gets no more than its share of the
    time, however many of its chunks are here.

    :param share: of the time, between 0 and 1.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._waiting: deque[object] = deque()
        """Tickets in the order of their turns; whose is first computes."""
        self._changed = threading.Condition()
        self._one_job = threading.Lock()
        self._asked = -float("inf")
        """When an online request was here last."""
        self._rested = -float("inf")
        """When the last batch of a batch job has been made up for."""
        self._began: float | None = None
        """When the one whose turn it is began to compute."""

    @property
    def held_s(self) -> float:
        """How long the one whose turn it is has been computing; 0 where nobody does."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @contextmanager
    def online(self) -> Iterator[None]:
        """The turn of an online request."""
        self._asked = time.monotonic()
        with self._turn():
            yield
        self._asked = time.monotonic()

    @contextmanager
    def bulk(self) -> Iterator[None]:
        """The turn of a batch job."""
        with self._one_job:
            while (now := time.monotonic()) < (until := min(self._rested, self._asked + QUIET_S)):
                time.sleep(min(until - now, _LOOK_S))
            with self._turn():
                start = time.monotonic()
                try:
                    yield
                finally:
                    end = time.monotonic()
                    self._rested = end + (end - start) * (1 / self._share - 1)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._waiting[0] is ticket)
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()
