"""Parquet files read by ranges of rows, a page or two at a time."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.inference.tabular import PREPARED_ROWS
from raylm.storage import StoragePath

_READ_BYTES = 2 << 20
"""Of a column at a time."""
_KEPT_BATCHES = 16


class ParquetReader:
    """Columns of a Parquet file, read by ranges of rows that mostly follow one another.

    What lies between is passed over page by page, so that no row group, however large, is ever held as a whole. Several
    threads may take; one that comes a little late finds its rows among those that were read last.
    """

    def __init__(self, place: StoragePath, columns: Sequence[str]) -> None:
        self._place, self._columns = place, list(columns)
        self._turn = threading.Lock()
        self._starts: list[int] = []
        """The first row of each row group."""
        self._kept: deque[tuple[int, pa.RecordBatch]] = deque(maxlen=_KEPT_BATCHES)
        """The batches that were read last, each with its first row."""
        self._unread: Iterator[tuple[int, pa.RecordBatch]] = iter(())

    def take(self, start: int, stop: int) -> list[list[Any]]:
        """The values of each column in the rows [start, stop)."""
        cells: list[list[Any]] = [[] for _ in self._columns]
        with self._turn:
            try:
                self._go_to(start)
                for first, batch in self._batches():
                    part = batch.slice(max(start - first, 0), max(stop - max(start, first), 0))
                    for values, column in zip(cells, self._columns, strict=True):
                        values += _to_texts(part[column])
                    if first + batch.num_rows >= stop:
                        break
            except BaseException:
                self._kept.clear()  # what a failed read leaves is not gone on with
                raise
        return cells

    def _go_to(self, row: int) -> None:
        """Begin anew where a row has been passed, or stands in a later row group."""
        if self._kept:
            following = self._kept[-1][0] + self._kept[-1][1].num_rows
            if self._kept[0][0] <= row and self._starts[bisect_right(self._starts, row) - 1] <= following:
                return
        parquet = open_parquet(self._place)
        sizes = [parquet.metadata.row_group(number).num_rows for number in range(parquet.metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes[:-1])]
        group = bisect_right(self._starts, row) - 1
        self._kept.clear()
        self._unread = self._read(parquet, group)

    def _read(self, parquet: pq.ParquetFile, group: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The batches from a row group on, each with its first row."""
        first, columns = self._starts[group], list(dict.fromkeys(self._columns))
        for number in range(group, parquet.metadata.num_row_groups):
            for batch in parquet.iter_batches(PREPARED_ROWS, row_groups=[number], columns=columns, use_threads=False):
                yield first, batch
                first += batch.num_rows

    def _batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Those that are kept, and then those that have not been read."""
        yield from list(self._kept)
        for numbered in self._unread:
            self._kept.append(numbered)
            yield numbered
        raise pa.ArrowInvalid("it has fewer rows than at the beginning of the job")


@lru_cache(maxsize=2)
def parquet_reader(uri: str, mtime_ns: int, columns: tuple[str, ...]) -> ParquetReader:
    """The reader of this process; another one once the file has changed."""
    return ParquetReader(StoragePath(uri), columns)


def open_parquet(place: StoragePath) -> pq.ParquetFile:
    """A file whose columns are read a page or two at a time, as they are asked for."""
    return pq.ParquetFile(place.open_input(), buffer_size=_READ_BYTES, pre_buffer=False)


def _to_texts(cells: pa.Array) -> list[Any]:
    """The cells as str; one that is not UTF-8 stays bytes."""
    try:
        values: list[Any] = cells.to_pylist()
        return values
    except UnicodeDecodeError:
        if pa.types.is_dictionary(cells.type):
            cells = cells.cast(cells.type.value_type)
        return [_decoded(value) for value in cells.cast(pa.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> Any:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value
