"""The rows of Parquet and Arrow files, streamed, with their numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.corpus.readers import BUFFER_BYTES, Row, check_column, damage_named
from raylm.storage import StoragePath

_BATCH_BYTES = 4 << 20


def opened_parquet(file: StoragePath) -> pq.ParquetFile:
    """An open parquet file.

    :raises InputError: it is not one.
    """
    with damage_named(file, "parquet"):
        # Buffered: a column of a row group is read piece by piece, however large the row group is.
        return pq.ParquetFile(file.open_input(), buffer_size=BUFFER_BYTES)


def parquet_rows(file: StoragePath, start: int, stop: int, columns: Sequence[str]) -> Iterator[Row]:
    """The rows with the numbers [start, stop)."""
    with damage_named(file, "parquet"), opened_parquet(file) as parquet:
        for name in columns:
            check_column(file, parquet.schema_arrow.names, name)
        metadata = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
        bounds = [0, *itertools.accumulate(group.num_rows for group in metadata)]
        groups = [group for group in range(len(metadata)) if bounds[group] < stop and start < bounds[group + 1]]
        groups = [group for group in groups if metadata[group].num_rows]
        if not groups:
            return
        row_bytes = max(column_bytes(metadata[group], columns) / metadata[group].num_rows for group in groups)
        batch_rows = min(max(int(_BATCH_BYTES / max(row_bytes, 1)), 1), 8_192)
        position = bounds[groups[0]]
        for batch in parquet.iter_batches(batch_rows, row_groups=groups, columns=list(dict.fromkeys(columns))):
            first, last = max(start, position), min(stop, position + len(batch))
            if first < last:
                yield from _batch_rows(batch.slice(first - position, last - first), first, columns)
            position += len(batch)
            if position >= stop:
                return


def column_bytes(group: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    """The uncompressed size of some columns of a row group."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)


def _batch_rows(batch: pa.RecordBatch, first: int, columns: Sequence[str]) -> Iterator[Row]:
    values = {name: _values(batch.column(name)) for name in set(columns)}
    for number in range(len(batch)):
        yield Row(first + number, [values[name][number] for name in columns])


def _values(array: pa.Array) -> list[Any]:
    """The values of a column; bytes where a text is not UTF-8."""
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        return list(array.cast(pa.large_binary()).to_pylist())


# --------------------------------------------------------------------- Arrow files, as `save_to_disk` writes them


def opened_arrow(file: StoragePath) -> pa.RecordBatchReader:
    """The record batches of an Arrow file in the streaming format, or in the file format.

    :raises InputError: it is neither.
    """
    with damage_named(file, "an Arrow stream"):
        stream = file.open_input()
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if not is_file:
            return pa.ipc.open_stream(stream)
        reader = pa.ipc.open_file(stream)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        return pa.RecordBatchReader.from_batches(reader.schema, batches)


def arrow_rows(file: StoragePath, columns: Sequence[str]) -> Iterator[Row]:
    """All rows of an Arrow file."""
    with damage_named(file, "an Arrow stream"), opened_arrow(file) as reader:
        for name in columns:
            check_column(file, reader.schema.names, name)
        position = 0
        for whole in reader:
            for offset in range(0, len(whole), 1_024):
                batch = whole.slice(offset, 1_024)
                yield from _batch_rows(batch, position, columns)
                position += len(batch)
