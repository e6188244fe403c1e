"""Requests that are worked on together: all that have come while the last ones were.

Ray Serve's own `serve.batch` makes its batches as requests arrive, before it is their turn: under load they stay small.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class Gathering(Generic[Request, Result]):
    """Hands requests to a thread, first come, first served, as many at once as fit. For one event loop.

    :param work: the results of requests, in their order, or why there is none; runs in the executor.
    :param size: of a request; those of one batch add up to `most` at most, but for a larger one alone.
    :param wait_s: how long a request that finds nobody at work waits for others.
    """

    def __init__(
        self,
        work: Callable[[list[Request]], Sequence[Result | Exception]],
        executor: Executor,
        size: Callable[[Request], int],
        most: int,
        wait_s: float,
    ) -> None:
        self._work, self._executor = work, executor
        self._size, self._most, self._wait_s = size, most, wait_s
        self._waiting: deque[tuple[Request, asyncio.Future[Result]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def result(self, request: Request) -> Result:
        """What comes of a request; where the caller is cancelled before its turn, nothing is done for it."""
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, done))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._run())
        return await done

    async def _run(self) -> None:
        await asyncio.sleep(self._wait_s)
        while batch := self._next_batch():
            try:
                work = asyncio.get_running_loop().run_in_executor(self._executor, self._work, [one for one, _ in batch])
                results: Sequence[Result | Exception] = await work
            except Exception as error:
                results = [error] * len(batch)
            for (_, done), result in zip(batch, results, strict=True):
                if done.done():  # its caller has gone
                    continue
                if isinstance(result, Exception):
                    done.set_exception(result)
                else:
                    done.set_result(result)

    def _next_batch(self) -> list[tuple[Request, asyncio.Future[Result]]]:
        batch: list[tuple[Request, asyncio.Future[Result]]] = []
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
