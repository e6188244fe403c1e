"""Requests that are worked on together."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from raylm.inference.service.gathering import Gathering


def gathering(batches: list[list[int]], gate: threading.Event, most: int = 10) -> Gathering[int, int]:
    """Doubles numbers, whose sizes they are, once the gate is open."""

    def work(numbers: list[int]) -> list[int | Exception]:
        gate.wait(10)
        batches.append(numbers)
        if 13 in numbers and len(numbers) == 1:
            raise ZeroDivisionError
        return [ValueError(number) if number == 7 else 2 * number for number in numbers]

    return Gathering(work, ThreadPoolExecutor(1), lambda number: number, most, 0.01)


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
