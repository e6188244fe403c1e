"""Input tables of a batch job: Parquet, Arrow, JSON Lines and CSV files, listed, checked, read by ranges of rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.errors import InputError, NothingThereError, did_you_mean, first_line
from raylm.inference.answers import Row
from raylm.inference.parquet import open_parquet, parquet_reader
from raylm.inference.prompts import Prompt
from raylm.inference.tabular import PREPARED_ROWS, prepare
from raylm.storage import StoragePath, find_files, fingerprint, reason

Format = Literal["parquet", "arrow", "jsonl", "csv", "po"]

FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".po": "po",
}


@dataclass(frozen=True)
class InputFile:
    """A file of the input, found but not opened."""

    uri: str
    relative: str
    """Its path below the input directory; the name alone for a single file."""
    format: Format
    bytes: int
    mtime_ns: int

    @property
    def place(self) -> StoragePath:
        return StoragePath(self.uri)

    @property
    def identity(self) -> str:
        """Changes when the file does: a hash of path, size and time of change."""
        return fingerprint([str(self.place), self.bytes, self.mtime_ns])


@dataclass(frozen=True)
class InputTable:
    """An opened file: its rows are counted, its columns known."""

    file: InputFile
    rows: int
    columns: pa.Schema
    prepared: str | None = None
    """For all but Parquet: the Arrow file of equal batches that its rows were copied to."""


# -------------------------------------------------------------------------------------------- finding


def format_of(name: str) -> Format:
    """The format that a file's suffix names.

    :raises InputError: none that is known.
    """
    suffix = suffix_of(name)
    if suffix not in FORMATS:
        raise InputError(f"{name}: unknown suffix '{suffix}'; expected one of {', '.join(FORMATS)}")
    return FORMATS[suffix]


def suffix_of(name: str) -> str:
    """The last suffix of a file's name, in lower case."""
    return PurePosixPath(name).suffix.lower()


def is_glob(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[") and not StoragePath(pattern).is_file()


def list_inputs(pattern: str) -> list[InputFile]:
    """The files of an input, in the order of their paths.

    :param pattern: a file, a directory or a glob, on any storage.
    :raises NothingThereError: there are none.
    :raises InputError: one is empty, or has an unknown suffix.
    """
    place = StoragePath(pattern)
    found = list(find_files(pattern, tuple(FORMATS)))
    if not found:
        if place.is_dir():
            raise NothingThereError(f"{place}: the directory holds no file that ends in {', '.join(FORMATS)}")
        what = "no file matches" if is_glob(pattern) else "there is no such file or directory"
        raise NothingThereError(f"{place}: {what}")
    if place.is_file():
        root = place.parent.path
    elif place.is_dir():
        root = place.path
    else:
        root = os.path.commonpath([info.path.rpartition("/")[0] for _, info in found])
    files = []
    for child, info in found:
        if info.size == 0:
            raise InputError(f"{child}: the file is empty (0 bytes)")
        relative = info.path[len(root.rstrip("/")) + 1 :]
        files.append(InputFile(child.uri, relative, format_of(child.name), info.size, info.mtime_ns or 0))
    return files


def open_table(file: InputFile, work: StoragePath) -> InputTable:
    """The file's rows and columns. All but Parquet is copied once to an Arrow file in the work directory.

    :raises InputError: it cannot be read as what its suffix says.
    """
    if file.format != "parquet":
        place = work / f"input-{file.identity}.arrow"
        rows, columns = prepare(file.place, file.format, place)
        return InputTable(file, rows, columns, prepared=place.uri)
    try:
        with file.place.open_input() as stream:
            parquet = pq.ParquetFile(stream)
            return InputTable(file, parquet.metadata.num_rows, parquet.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def check_same_columns(tables: Sequence[InputTable]) -> None:
    """Typed files of one directory are one table: their columns have to be the same.

    :raises InputError: one of them has other columns than the first.
    """
    typed = [table for table in tables if table.file.format in ("parquet", "arrow")]
    for table in typed[1:]:
        first = typed[0]
        for name in dict.fromkeys([*first.columns.names, *table.columns.names]):
            kinds = [_type_in(one, name) for one in (first, table)]
            if kinds[0] != kinds[1]:
                raise InputError(
                    f"{table.file.place}: column '{name}' is {kinds[1]}, in {first.file.place} it is {kinds[0]};"
                    " the files of a directory need the same columns, others are a job of their own"
                )


def _type_in(table: InputTable, column: str) -> str:
    return str(table.columns.field(column).type) if column in table.columns.names else "absent"


def _unreadable(file: InputFile, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.errno:  # the system's, not the format's
        return InputError(f"{file.place}: not readable: {reason(error)}")
    return InputError(f"{file.place}: not readable as {file.format}, corrupt or cut off: {first_line(error)}")


def check_unchanged(files: Sequence[InputFile]) -> None:
    """:raises InputError: a file is not the one that was listed: its rows are not those that were answered."""
    for file in files:
        info = file.place.info()
        if (info.size, info.mtime_ns or 0) != (file.bytes, file.mtime_ns):
            raise InputError(f"{file.place}: changed while the job ran; the same command does it anew, as it is now")


# --------------------------------------------------------------------------------------------- column


def choose_columns(table: InputTable, prompt: Prompt, named: Mapping[str, str]) -> tuple[str, ...]:
    """The column of each field of a prompt: the one named for it, else the one of its name.

    A prompt's `text` may have another name where a table has only one column that holds text.

    :raises InputError: there is no such column, it holds nothing to be read as text, or there are several to choose.
    """
    if prompt.fields == ("text",) and not named:
        return (_text_column(table),)
    only_text = prompt.template is None
    return tuple(_checked_column(table, named.get(field, field), only_text) for field in prompt.fields)


def _text_column(table: InputTable) -> str:
    textual = [column.name for column in table.columns if _is_text(column)]
    if len(textual) == 1 or "text" in textual:
        return "text" if "text" in textual else str(textual[0])
    where = table.file.place
    if textual:
        raise InputError(f"{where}: several columns hold text, name one with --column: {', '.join(textual)}")
    raise InputError(f"{where}: no column holds text; its columns: {_listed(table)}")


def _checked_column(table: InputTable, wanted: str, only_text: bool) -> str:
    columns, where = table.columns, table.file.place
    if wanted not in columns.names:
        hint = did_you_mean(wanted, columns.names) or "."
        raise InputError(f"{where}: there is no column '{wanted}'{hint} Its columns: {_listed(table)}")
    field = columns.field(wanted)
    if _is_text(field) or pa.types.is_null(field.type) or _is_marked(field, b"number"):
        return wanted
    if only_text or pa.types.is_nested(field.type) or pa.types.is_binary(field.type):
        raise InputError(f"{where}: column '{wanted}' holds {field.type}, text (string) is expected")
    return wanted


def _listed(table: InputTable) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in table.columns) or "none"


def _is_text(field: pa.Field) -> bool:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    textual = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return textual and not _is_marked(field, b"number", b"json")


def _is_marked(field: pa.Field, *kinds: bytes) -> bool:
    return bool(field.metadata) and field.metadata.get(b"raylm") in kinds


# -------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class FieldRows:
    """What a range of rows says in some columns, and for each row what is wrong with it, if anything."""

    values: list[Row]
    problems: list[str | None]


def read_fields(table: InputTable, columns: Sequence[str], start: int, stop: int, is_worded: bool = False) -> FieldRows:
    """What the rows [start, stop) say in some columns.

    A process that reads range after range of a Parquet file, in their order, decodes each row once.

    :param is_worded: the values stand among words, where numbers and dates are as good as text.
    :raises InputError: the file became unreadable.
    """
    cells = _cells(table, columns, start, stop)
    if is_worded:
        kept = (str, bytes, list, dict, type(None))
        cells = [[value if isinstance(value, kept) else str(value) for value in values] for values in cells]
    problems: list[str | None] = [None] * (stop - start)
    for column, values in zip(columns, cells, strict=True):
        for number, value in enumerate(values):
            if problems[number] is None and (problem := _problem(value)):
                problems[number] = f"{column}: {problem}" if len(columns) > 1 else problem
    texts = [[value if isinstance(value, str) else None for value in values] for values in cells]
    return FieldRows(list(zip(*texts, strict=True)), problems)


def _cells(table: InputTable, columns: Sequence[str], start: int, stop: int) -> list[list[Any]]:
    """The values of each column in the rows [start, stop)."""
    if start >= stop:
        return [[] for _ in columns]
    try:
        if table.prepared is None:
            return parquet_reader(table.file.uri, table.file.mtime_ns, tuple(columns)).take(start, stop)
        return _prepared_cells(table, columns, start, stop)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(table.file, error) from error


def _prepared_cells(table: InputTable, columns: Sequence[str], start: int, stop: int) -> list[list[Any]]:
    cells: list[list[Any]] = [[] for _ in columns]
    for batch in _prepared_rows(table, start, stop):
        if table.file.format == "jsonl":
            objects = [json.loads(line) for line in batch["line"].to_pylist()]
            parts = [[one.get(column) for one in objects] for column in columns]
        else:
            parts = [batch[column].to_pylist() for column in columns]
        for values, part in zip(cells, parts, strict=True):
            values += part
    return cells


def _problem(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value.isascii()):
        return None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate
            return "text is not valid Unicode"
        return None
    if isinstance(value, bytes):
        return "text is not valid UTF-8"
    return f"not a text but a JSON {_JSON_NAMES.get(type(value), 'value')}"


_JSON_NAMES = {bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}


def _prepared_rows(table: InputTable, start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """The rows [start, stop) of a prepared file, read in its batches of equal size."""
    if start >= stop:
        return
    assert table.prepared is not None
    with StoragePath(table.prepared).open_input() as stream:
        reader = pa.ipc.open_file(stream)
        for index in range(start // PREPARED_ROWS, (stop - 1) // PREPARED_ROWS + 1):
            first = index * PREPARED_ROWS
            batch = reader.get_batch(index)
            low, high = max(start - first, 0), min(stop - first, batch.num_rows)
            yield batch.slice(low, high - low)


def read_rows(table: InputTable, rows: int) -> Iterator[pa.RecordBatch]:
    """The first `rows` rows with all columns, batch by batch; JSON Lines as one column `line` of raw JSON.

    :raises InputError: the file became unreadable.
    """
    if table.prepared is not None:
        for start in range(0, rows, PREPARED_ROWS):
            yield from _prepared_rows(table, start, min(start + PREPARED_ROWS, rows))
        return
    left = rows
    try:
        for batch in open_parquet(table.file.place).iter_batches(batch_size=PREPARED_ROWS, use_threads=False):
            if left <= 0:
                return
            yield batch.slice(0, left)
            left -= batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(table.file, error) from error
