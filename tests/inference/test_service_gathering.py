"""Requests that are worked on together."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from raylm.inference.service.gathering import Gathering


def gathering(batches: list[list[int]], gate: threading.Event, most: int = 10) -> Gathering[int, int]:
    """Doubles numbers, whose sizes they are, on a thread, once the gate is open."""
    thread = ThreadPoolExecutor(1)

    async def work(numbers: list[int]) -> list[int | Exception]:
        return await asyncio.get_running_loop().run_in_executor(thread, doubled, numbers)

    def doubled(numbers: list[int]) -> list[int | Exception]:
        gate.wait(10)
        batches.append(numbers)
        if 13 in numbers and len(numbers) == 1:
            raise ZeroDivisionError
        return [ValueError(number) if number == 7 else 2 * number for number in numbers]

    return Gathering(work, lambda number: number, most, 0.01)


def test_what_comes_while_others_are_worked_on_goes_together() -> None:
    batches: list[list[int]] = []
    gate = threading.Event()

    async def main() -> list[int]:
        together = gathering(batches, gate)
        first = asyncio.create_task(together.result(1))
        await asyncio.sleep(0.1)
        rest = [asyncio.create_task(together.result(number)) for number in (2, 3, 4, 5, 1)]
        await asyncio.sleep(0.1)
        gate.set()
        return await asyncio.gather(first, *rest)

    assert asyncio.run(main()) == [2, 4, 6, 8, 10, 2]
    assert batches == [[1], [2, 3, 4], [5, 1]], "in their order, ten at most"


def test_one_that_is_too_large_goes_alone_and_one_that_has_gone_does_not() -> None:
    batches: list[list[int]] = []
    gate = threading.Event()

    async def main() -> list[int]:
        together = gathering(batches, gate)
        tasks = [asyncio.create_task(together.result(number)) for number in (1, 30, 2, 3)]
        await asyncio.sleep(0.1)
        tasks[2].cancel()
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(tasks[0], tasks[1], tasks[3])

    assert asyncio.run(main()) == [2, 60, 6]
    assert batches == [[1], [30], [3]]


def test_an_error_is_that_of_its_request() -> None:
    gate = threading.Event()
    gate.set()

    async def main() -> list[int | BaseException]:
        together = gathering([], gate, most=100)
        found = await asyncio.gather(*map(together.result, (1, 7, 2)), return_exceptions=True)
        with pytest.raises(ZeroDivisionError):
            await together.result(13)
        return [*found, await together.result(3)]

    one, seven, two, three = asyncio.run(main())
    assert (one, two, three) == (2, 4, 6) and isinstance(seven, ValueError)


def test_lanes_are_used_before_anything_gathers_and_what_is_full_needs_none() -> None:
    batches: list[list[int]] = []

    async def main() -> None:
        gate = asyncio.Event()

        async def work(numbers: list[int]) -> list[int]:
            batches.append(numbers)
            await gate.wait()
            return numbers

        together: Gathering[int, int] = Gathering(work, lambda _: 1, 3, lanes=2, is_open=True)
        tasks = [asyncio.create_task(together.result(number)) for number in range(7)]
        await asyncio.sleep(0.01)
        assert batches == [[0], [1], [2, 3, 4]], "5 and 6 wait"
        gate.set()
        assert await asyncio.gather(*tasks) == list(range(7))

    asyncio.run(main())
    assert batches == [[0], [1], [2, 3, 4], [5, 6]]


def test_work_that_nobody_waits_for_is_cancelled() -> None:
    cancelled: list[list[int]] = []

    async def main() -> None:
        async def work(numbers: list[int]) -> list[int]:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                cancelled.append(numbers)
                raise
            return numbers

        together: Gathering[int, int] = Gathering(work, lambda _: 1, 2, wait_s=0.01)
        one, two, three = (asyncio.create_task(together.result(number)) for number in (1, 2, 3))
        await asyncio.sleep(0.05)
        one.cancel()
        await asyncio.sleep(0.01)
        assert cancelled == [], "the second still waits"
        two.cancel()
        await asyncio.sleep(0.01)
        assert cancelled == [[1, 2]] and not three.done()
        three.cancel()

    asyncio.run(main())


def test_the_request_that_begins_a_batch_lends_it_nothing() -> None:
    """Ray cancels calls by what their context says: of one caller, with all others in the batch."""
    caller = contextvars.ContextVar("caller", default="nobody")
    seen = []

    async def main() -> None:
        async def work(numbers: list[int]) -> list[int]:
            seen.append(caller.get())
            await asyncio.sleep(0.01)
            return numbers

        async def ask(number: int) -> None:
            caller.set(str(number))
            assert await together.result(number) == number

        together: Gathering[int, int] = Gathering(work, lambda _: 1, 2)
        await asyncio.gather(*map(ask, range(6)))

    asyncio.run(main())
    assert seen == ["nobody"] * 4


def test_work_that_is_cancelled_by_others_leaves_nobody_waiting() -> None:
    async def main() -> None:
        async def work(_: list[int]) -> list[int]:
            raise asyncio.CancelledError

        together: Gathering[int, int] = Gathering(work, lambda _: 1, 2)
        with pytest.raises(RuntimeError, match="cancelled"):
            await asyncio.wait_for(together.result(1), 5)

    asyncio.run(main())
