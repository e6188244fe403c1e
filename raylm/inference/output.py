"""Output tables: the input's rows and columns in the input's order, with the answers behind them."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import chain, islice
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.inference import gettext
from raylm.inference.io import Format, InputTable, read_rows
from raylm.inference.tabular import new_arrow_file, typed_rows, unmarked
from raylm.storage import StoragePath

_GROUP_ROWS = 32_768
_GROUP_BYTES = 64 << 20


def write_output(
    table: InputTable, rows: int, answers: Iterable[pa.RecordBatch], place: StoragePath, kind: Format
) -> None:
    """Publish the first `rows` rows of a table with their answers, batch by batch, whole or not at all.

    :param answers: batches with the result columns for all rows in order, cut in any way.
    :raises OutputError: the place is read-only or full.
    """
    if kind == "po":
        columns = (batch.column(0).to_pylist() for batch in answers)
        place.write_bytes(gettext.filled(table.file.place, islice(chain.from_iterable(columns), rows)))
        return
    cursor = _Cursor(answers)
    is_json = table.file.format == "jsonl"
    with place.writing() as sink:
        schema = unmarked(table.columns)
        writer: _Writer | None = None
        for batch in read_rows(table, rows):
            answer = cursor.take(batch.num_rows)
            if writer is None:
                writer = _writer(kind, sink, _with(schema, answer.schema))
            if is_json:
                dicts = [json.loads(line) for line in batch["line"].to_pylist()]
                if kind == "jsonl":
                    assert isinstance(writer, _JsonlWriter)
                    writer.write_dicts(dicts, answer.to_pylist())
                    continue
                batch = typed_rows(dicts, table.columns)
            writer.write(pa.record_batch([*batch.columns, *answer.columns], _with(schema, answer.schema)))
        if writer is None:
            writer = _writer(kind, sink, _with(schema, cursor.schema))
        writer.close()


def _with(columns: pa.Schema, answers: pa.Schema) -> pa.Schema:
    return pa.schema([*columns, *answers], metadata=columns.metadata)


class _Cursor:
    """Takes rows from a stream of batches, as many as are asked for. The first may be empty, never absent."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches: Iterator[pa.RecordBatch] = iter(batches)
        self._held: pa.RecordBatch = next(self._batches)
        self.schema: pa.Schema = self._held.schema

    def take(self, rows: int) -> pa.RecordBatch:
        taken = []
        while rows:
            if not self._held.num_rows:
                following = next(self._batches, None)
                if following is None:
                    raise ValueError(f"{rows} rows have no answers")
                self._held = following
                continue
            part = self._held.slice(0, rows)
            self._held = self._held.slice(part.num_rows)
            rows -= part.num_rows
            taken.append(part)
        if not taken:
            return self._held.slice(0, 0)
        return pa.Table.from_batches(taken).combine_chunks().to_batches()[0]


class _Writer(Protocol):
    def write(self, batch: pa.RecordBatch) -> None: ...

    def close(self) -> None: ...


def _writer(kind: Format, sink: pa.NativeFile, schema: pa.Schema) -> _Writer:
    if kind == "parquet":
        return _ParquetWriter(sink, schema)
    if kind == "arrow":
        return _ArrowWriter(sink, schema)
    return _JsonlWriter(sink) if kind == "jsonl" else _CsvWriter(sink, schema)


class _ParquetWriter:
    """Gathers batches to row groups of a size that readers like."""

    def __init__(self, sink: pa.NativeFile, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(sink, schema)
        self._schema = schema
        self._held: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        self._held.append(batch)
        rows = sum(held.num_rows for held in self._held)
        if rows >= _GROUP_ROWS or sum(held.nbytes for held in self._held) >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            table = pa.Table.from_batches(self._held, self._schema)
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
            self._held = []
            del table
            pa.default_memory_pool().release_unused()

    def close(self) -> None:
        self._flush()
        self._writer.close()


class _ArrowWriter:
    def __init__(self, sink: pa.NativeFile, schema: pa.Schema) -> None:
        self._writer = new_arrow_file(sink, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)

    def close(self) -> None:
        self._writer.close()


class _JsonlWriter:
    def __init__(self, sink: pa.NativeFile) -> None:
        self._sink = sink

    def write(self, batch: pa.RecordBatch) -> None:
        self.write_dicts([plain(row) for row in batch.to_pylist()], [{}] * batch.num_rows)

    def write_dicts(self, rows: Iterable[dict[str, Any]], answers: Iterable[dict[str, Any]]) -> None:
        lines = (_json_line(row | answer) for row, answer in zip(rows, answers, strict=True))
        self._sink.write("".join(lines).encode())

    def close(self) -> None:
        pass


def _json_line(row: dict[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row)  # lone surrogates can only be written escaped, as they were read
    return line + "\n"


class _CsvWriter:
    def __init__(self, sink: pa.NativeFile, schema: pa.Schema) -> None:
        self._sink = sink
        self._write([schema.names])

    def write(self, batch: pa.RecordBatch) -> None:
        self._write([[_csv_cell(plain(value)) for value in row.values()] for row in batch.to_pylist()])

    def _write(self, rows: Iterable[Iterable[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._sink.write(text.getvalue().encode())

    def close(self) -> None:
        pass


def _csv_cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def plain(value: Any) -> Any:
    """An Arrow value as JSON says it: ISO 8601 dates, seconds, decimals as text, base64 bytes, no NaN."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return str(value)
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value
