"""Files other than Parquet as Arrow files of equal batches, so that any range of rows is read at once."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from raylm.errors import InputError, first_line
from raylm.inference import gettext
from raylm.storage import StoragePath, reason

PREPARED_ROWS = 1_024
"""Rows of each batch of a prepared file, but for the last."""

_BLOCK_BYTES = 16 << 20
_LINE = pa.schema([("line", pa.large_string())])


def prepare(place: StoragePath, kind: str, target: StoragePath) -> tuple[int, pa.Schema]:
    """Rows and columns of a file that is not Parquet, which is copied to `target` unless an earlier run did so.

    JSON Lines keep their lines as they are, in one column `line`; the columns given back are their keys, with
    the types that fit all rows. CSV columns stay text, as written. A column's metadata `raylm` marks what is
    no plain text: `number` (CSV cells that read as numbers or dates), `mixed` and `json` (keys whose values
    have no common type, with and without text among them).

    :raises InputError: a line or row is malformed; its number is named.
    """
    noted = target.parent / f"{target.name}.json"
    if noted.is_file():
        note = noted.read_json()
        return note["rows"], pa.ipc.read_schema(pa.py_buffer(base64.b64decode(note["columns"])))
    copy = {"arrow": _prepare_arrow, "jsonl": _prepare_jsonl, "csv": _prepare_csv, "po": _prepare_po}[kind]
    rows, columns = copy(place, target)
    encoded = base64.b64encode(columns.serialize().to_pybytes()).decode()
    noted.write_json({"rows": rows, "columns": encoded})
    return rows, columns


# ----------------------------------------------------------------------------------------------- Arrow


def _prepare_arrow(place: StoragePath, target: StoragePath) -> tuple[int, pa.Schema]:
    """Arrow's IPC formats: that of files, which Feather 2 is, and that of streams."""
    with _opened(place, StoragePath.open_input) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        with _damage_named(place):
            reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)

        def batches() -> Iterator[pa.RecordBatch]:
            with _damage_named(place):
                if is_file:
                    yield from map(reader.get_batch, range(reader.num_record_batches))
                else:
                    yield from reader

        return _write(batches(), reader.schema, target), reader.schema


@contextmanager
def _damage_named(place: StoragePath) -> Iterator[None]:
    """:raises InputError: the file ends early or breaks the rules of its format."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{place}: not readable as an Arrow IPC file: {first_line(error)}") from error


def _prepare_po(place: StoragePath, target: StoragePath) -> tuple[int, pa.Schema]:
    """The messages of a gettext catalog that are to be translated."""
    table = pa.Table.from_pylist(gettext.untranslated(place), gettext.COLUMNS)
    return _write(table.to_batches(), table.schema, target), table.schema


def _write(batches: Iterable[pa.RecordBatch], columns: pa.Schema, target: StoragePath) -> int:
    """Write batches as equal ones; gives back how many rows they have."""
    rows = 0
    with target.writing() as sink, new_arrow_file(sink, columns) as writer:
        for batch in equal_batches(batches, PREPARED_ROWS):
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def new_arrow_file(sink: pa.NativeFile, columns: pa.Schema) -> pa.RecordBatchFileWriter:
    """A writer of batches, whose dictionaries may differ."""
    return pa.ipc.new_file(sink, columns, options=pa.ipc.IpcWriteOptions(unify_dictionaries=True))


# ------------------------------------------------------------------------------------------ JSON Lines


def _prepare_jsonl(place: StoragePath, target: StoragePath) -> tuple[int, pa.Schema]:
    columns = _Columns()
    rows = 0
    with target.writing() as sink, pa.ipc.new_file(sink, _LINE) as writer:
        for block in _blocks(_json_rows(place)):
            columns.observe([row for _, row in block])
            writer.write_batch(pa.record_batch([pa.array([line for line, _ in block], pa.large_string())], _LINE))
            rows += len(block)
        if not rows:
            raise InputError(f"{place}: no rows: every line is blank")
    return rows, columns.schema()


def _blocks(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    block = []
    for row in rows:
        block.append(row)
        if len(block) == PREPARED_ROWS:
            yield block
            block = []
    if block:
        yield block


def _json_rows(place: StoragePath) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that is not blank, with the object it holds."""
    for number, raw in enumerate(_lines(place), start=1):
        line = _decoded(place, number, raw).strip()
        try:
            row = json.loads(line) if line else None
        except ValueError as error:
            raise InputError(f"{place}: line {number}: not JSON: {error}; one object a line is expected") from None
        except RecursionError:
            raise InputError(f"{place}: line {number}: JSON that is nested too deeply to be read") from None
        if not line:
            continue
        if not isinstance(row, dict):
            raise InputError(f"{place}: line {number}: holds a JSON {_name(row)}; an object is expected")
        yield line, row


def _name(value: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _opened(
    place: StoragePath,
    way: Callable[[StoragePath], pa.NativeFile] = lambda place: place.filesystem.open_input_stream(place.path),
) -> pa.NativeFile:
    """:raises InputError: the system or the storage does not let it be read."""
    try:
        return way(place)
    except OSError as error:
        raise InputError(f"{place}: not readable: {reason(error)}") from error


def _lines(place: StoragePath) -> Iterator[bytes]:
    rest = b""
    with _opened(place) as stream:
        while block := stream.read(_BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
    if rest:
        yield rest


def _decoded(place: StoragePath, number: int, line: bytes) -> str:
    """The text of a line, of the first one without a byte order mark.

    :raises InputError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: line {number}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


class _Columns:
    """The keys of all rows in the order they first appear, with the Arrow type that fits all their values."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType | None] = {}
        self._with_text: set[str] = set()
        self._with_large: set[str] = set()
        """Keys with integers that are no floating-point numbers, as those beyond 2^53."""

    def observe(self, rows: Sequence[dict[str, Any]]) -> None:
        for name in dict.fromkeys(key for row in rows for key in row):
            values = [row.get(name) for row in rows]
            if any(isinstance(value, str) for value in values):
                self._with_text.add(name)
            found = _type_of(values)
            if found is not None and _has_large(values, found):
                self._with_large.add(name)
            before = self._types.get(name, found)
            common = _common_type(before, found)
            loses = name in self._with_large and (_is_widened(before, common) or _is_widened(found, common))
            self._types[name] = None if loses else common

    def schema(self) -> pa.Schema:
        fields = []
        for name, kind in self._types.items():
            if kind is None or "struct<>" in str(kind):
                mark = "mixed" if name in self._with_text else "json"
                fields.append(pa.field(name, pa.string(), metadata={"raylm": mark}))
            else:
                fields.append(pa.field(name, kind))
        return pa.schema(fields)


def _type_of(values: Sequence[Any]) -> pa.DataType | None:
    """The Arrow type of JSON values; None where they have none in common."""
    if all(value is None or isinstance(value, str) for value in values):
        return pa.null() if all(value is None for value in values) else pa.string()
    try:
        return pa.array(values).type
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return None


def _common_type(a: pa.DataType | None, b: pa.DataType | None) -> pa.DataType | None:
    if a is None or b is None:
        return None
    try:
        schemas = [pa.schema([("x", a)]), pa.schema([("x", b)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowException, TypeError):
        return None


def _has_large(values: Sequence[Any], kind: pa.DataType) -> bool:
    """Whether some integers, at any depth, cannot be floating-point numbers."""
    floating = _with_floats(kind)
    if floating == kind:
        return False
    try:
        pa.array(values, floating)
    except pa.ArrowInvalid:
        return True
    return False


def _with_floats(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _with_floats(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_with_floats(kind.value_type))
    return pa.float64() if pa.types.is_int64(kind) else kind


def _is_widened(kind: pa.DataType | None, common: pa.DataType | None) -> bool:
    """Whether some integers of a type are floating-point numbers in one that it has in common with others."""
    if kind is None or common is None:
        return False
    if pa.types.is_struct(kind):
        return any(_is_widened(field.type, common.field(field.name).type) for field in kind)
    if pa.types.is_list(kind):
        return _is_widened(kind.value_type, common.value_type)
    return bool(pa.types.is_int64(kind) and pa.types.is_floating(common))


def typed_rows(rows: Sequence[dict[str, Any]], columns: pa.Schema) -> pa.RecordBatch:
    """JSON rows as Arrow columns; values without a common type become JSON text."""
    arrays = []
    for field in columns:
        values = [row.get(field.name) for row in rows]
        if field.metadata and b"raylm" in field.metadata:
            values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        if pa.types.is_string(field.type):
            values = [None if v is None else v.encode("utf-8", "replace").decode() for v in values]
        arrays.append(pa.array(values, field.type))
    return pa.record_batch(arrays, unmarked(columns))


def unmarked(columns: pa.Schema) -> pa.Schema:
    """The columns without raylm's marks, as they are written out."""
    return pa.schema(
        [field.remove_metadata() if b"raylm" in (field.metadata or {}) else field for field in columns],
        metadata=columns.metadata,
    )


# ------------------------------------------------------------------------------------------------ CSV


def _prepare_csv(place: StoragePath, target: StoragePath) -> tuple[int, pa.Schema]:
    import pyarrow.csv as pcsv

    names = _header(place)
    columns = pa.schema([(name, pa.string()) for name in names])
    try:
        with _opened(place) as stream:
            reader = pcsv.open_csv(
                stream,
                read_options=pcsv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),  # which numbers bad rows
                parse_options=pcsv.ParseOptions(newlines_in_values=True),
                convert_options=pcsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
                ),
            )
            batches = iter(reader)
            first = list(islice(batches, 1))
            rows = _write(chain(first, batches), columns, target)
    except pa.ArrowInvalid as error:
        for number, line in enumerate(_lines(place), start=1):  # Arrow does not say which is not UTF-8
            _decoded(place, number, line)
        raise InputError(f"{place}: not readable as CSV: {first_line(error)}") from error
    return rows, _mark_numbers(first[0].slice(0, PREPARED_ROWS)) if first else columns


def _header(place: StoragePath) -> list[str]:
    with _opened(place) as stream:
        head = bytes(stream.read(1 << 20))
    lines = head[: head.rfind(b"\n") + 1 or None].split(b"\n")
    text = "\n".join(_decoded(place, number, line) for number, line in enumerate(lines, start=1))
    names = next(csv.reader(io.StringIO(text, newline="")), [])
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names:
        raise InputError(f"{place}: the first line is blank; a header with the names of the columns is expected")
    if twice:
        raise InputError(f"{place}: the header names a column twice: {', '.join(twice)}")
    return names


def _mark_numbers(batch: pa.RecordBatch) -> pa.Schema:
    """The columns, marked `number` where all cells of the first rows read as numbers, truths or dates."""
    fields = []
    for field, cells in zip(batch.schema, batch.columns, strict=True):
        filled = pa.array([cell for cell in cells.to_pylist() if cell.strip()], pa.string())
        is_number = len(filled) > 0 and any(
            _reads_as(filled, kind) for kind in (pa.float64(), pa.bool_(), pa.timestamp("s"))
        )
        fields.append(field.with_metadata({"raylm": "number"}) if is_number else field)
    return pa.schema(fields)


def _reads_as(cells: pa.Array, kind: pa.DataType) -> bool:
    try:
        cells.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def equal_batches(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `rows` each; the last may be shorter."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += batch.num_rows
        if count >= rows:
            table = pa.Table.from_batches(held)
            whole = count - count % rows
            for start in range(0, whole, rows):
                yield _one_batch(table.slice(start, rows))
            held, count = table.slice(whole).to_batches(), count - whole
    if count:
        yield _one_batch(pa.Table.from_batches(held))


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0]
