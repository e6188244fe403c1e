"""Requests that are worked on together: all that have come while the last ones were.

Ray Serve's own `serve.batch` makes its batches as requests arrive, before it is their turn: under load they stay small.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Generic, TypeAlias, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")
_Batch: TypeAlias = list[tuple[Request, asyncio.Future[Result]]]


class Gathering(Generic[Request, Result]):
    """Has requests worked on, first come, first served, as many at once as fit. For one event loop.

    :param work: the results of requests, in their order, or why there is none; cancelled when nobody waits for any.
    :param size: of a request; those of one batch add up to `most` at most, but for a larger one alone.
    :param wait_s: how long a request that finds nobody at work waits for others.
    :param lanes: how many batches may be worked on at a time.
    :param is_open: whether a batch that is full is worked on at once, beyond the lanes.
    """

    def __init__(
        self,
        work: Callable[[list[Request]], Awaitable[Sequence[Result | Exception]]],
        size: Callable[[Request], int],
        most: int,
        wait_s: float = 0,
        lanes: int = 1,
        is_open: bool = False,
    ) -> None:
        self._work, self._size, self._most = work, size, most
        self._wait_s, self._lanes, self._is_open = wait_s, lanes, is_open
        self._waiting: deque[tuple[Request, asyncio.Future[Result]]] = deque()
        self._at_work: set[asyncio.Task[None]] = set()
        self._begins: asyncio.TimerHandle | None = None
        # The request that happens to begin a batch does not take the others with it: Ray cancels by the context.
        self._context = contextvars.Context()

    async def result(self, request: Request) -> Result:
        """What comes of a request; where the caller is cancelled before its turn, nothing is done for it."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((request, done))
        if self._at_work or not self._wait_s:
            self._begin()
        elif self._begins is None:
            self._begins = loop.call_later(self._wait_s, self._begin)
        return await done

    def _begin(self) -> None:
        """Begin on what waits, as far as there are lanes."""
        self._begins = None
        while self._waiting and (len(self._at_work) < self._lanes or (self._is_open and self._is_full())):
            if batch := self._next_batch():
                task = asyncio.get_running_loop().create_task(self._work_on(batch), context=self._context)
                self._at_work.add(task)
                task.add_done_callback(self._end, context=self._context)
                for _, done in batch:
                    done.add_done_callback(partial(_cancel_unwanted, task, batch))

    def _end(self, task: asyncio.Task[None]) -> None:
        self._at_work.discard(task)
        self._begin()

    async def _work_on(self, batch: _Batch[Request, Result]) -> None:
        try:
            results = await self._work([request for request, _ in batch])
        except (Exception, asyncio.CancelledError) as error:  # who is cancelled by others leaves nobody waiting
            results = [error if isinstance(error, Exception) else RuntimeError("the work was cancelled")] * len(batch)
        for (_, done), result in zip(batch, results, strict=True):
            if done.done():  # its caller has gone
                continue
            if isinstance(result, Exception):
                done.set_exception(result)
            else:
                done.set_result(result)

    def _is_full(self) -> bool:
        return sum(self._size(request) for request, done in self._waiting if not done.done()) >= self._most

    def _next_batch(self) -> _Batch[Request, Result]:
        batch: _Batch[Request, Result] = []
        room = self._most
        while self._waiting:
            request, done = self._waiting[0]
            if not done.done():
                room -= self._size(request)
                if batch and room < 0:
                    break
                batch.append((request, done))
            self._waiting.popleft()
        return batch


def _cancel_unwanted(task: asyncio.Task[None], batch: _Batch[Request, Result], _: object) -> None:
    """End work whose callers have all gone."""
    if all(done.done() for _, done in batch):
        task.cancel()
