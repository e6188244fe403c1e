"""Rows in batches of like length: distinct ones once, and a batch that fails halved until one row has the error."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from raylm.errors import first_line
from raylm.inference import watchdog
from raylm.inference.answers import Output
from raylm.inference.prompts import Fields

_LOST_DEVICE = re.compile("CUDA error|CUDA failed|cuBLAS failed|device-side assert")
"""What PyTorch and CTranslate2 say of a GPU that computes nothing more for this process, whatever it is asked."""

Turn = Callable[[], AbstractContextManager[object]]
"""A context to be in while a batch is computed: where callers share a model, it waits until it is one's turn."""


@dataclass(frozen=True)
class Source:
    """A row as ids, ready to be put into a batch."""

    key: Hashable
    """What tells it from others: its fields, or its number where each row is to have an answer of its own."""
    ids: list[int]
    cut: bool
    """Whether some of its text was left out."""


def in_batches(
    rows: Sequence[Fields],
    encode: Callable[[Fields], tuple[list[int], bool] | Output],
    run: Callable[[list[Source]], list[Output]],
    batch_tokens: int,
    distinct: bool = True,
    turn: Turn = nullcontext,
) -> list[Output]:
    """The output of each row, in the order of the rows.

    :param encode: a row's ids and whether it was cut, or its output where it cannot be asked about.
    :param run: the outputs of a batch; raises for all of it.
    :param batch_tokens: padded tokens of a batch; a longer row is one alone.
    :param distinct: whether equal rows have one answer.
    """

    def run_in_turn(batch: list[Source]) -> list[Output]:
        with turn():
            return run(batch)

    keys: Sequence[Hashable] = rows if distinct else range(len(rows))
    outputs: dict[Hashable, Output] = {}
    sources: list[Source] = []
    for key, row in dict(zip(keys, rows, strict=True)).items():
        encoded = encode(row)
        if isinstance(encoded, Output):
            outputs[key] = encoded
        else:
            sources.append(Source(key, *encoded))
    sources.sort(key=lambda source: -len(source.ids))
    for batch in _token_batches(sources, batch_tokens):
        for source, output in zip(batch, _run_or_halve(run_in_turn, batch), strict=True):
            outputs[source.key] = output
        watchdog.beat()
    return [outputs[key] for key in keys]


def _token_batches(sources: Sequence[Source], batch_tokens: int) -> Iterator[list[Source]]:
    """Runs of sources, longest first, whose padded size stays within the budget; never an empty one."""
    start = 0
    while start < len(sources):
        rows = max(batch_tokens // max(len(sources[start].ids), 1), 1)
        yield list(sources[start : start + rows])
        start += rows


def _run_or_halve(run: Callable[[list[Source]], list[Output]], batch: list[Source]) -> list[Output]:
    try:
        return run(batch)
    except (RuntimeError, ValueError, IndexError, MemoryError) as error:
        if _LOST_DEVICE.search(str(error)) and "out of memory" not in str(error):
            watchdog.end(f"the GPU does not compute any more: {first_line(error)}")
        if len(batch) == 1:
            return [Output(None, f"engine: {first_line(error)}", source_tokens=len(batch[0].ids))]
        middle = len(batch) // 2
        return _run_or_halve(run, batch[:middle]) + _run_or_halve(run, batch[middle:])
