"""What stands in a file: its rows one after the other, with their positions; a damaged row costs itself alone.

Files are streamed, decompressed where their names end in `.gz` or `.zst`, and may be read in ranges. Ranges that follow
each other give the rows of the whole, each row once: a row belongs to the range that it begins in.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from babel.messages.catalog import Catalog
from babel.messages.mofile import read_mo
from babel.messages.pofile import PoFileError, read_po

from raylm.corpus.records import Rejected
from raylm.errors import InputError
from raylm.storage import StoragePath

CODECS = {".gz": "gzip", ".zst": "zstd"}
END = (1 << 63) - 1
"""Where the range of a file stops whose length nobody knows before it was read."""
EXCERPT_CHARS = 200
_MAX_RECORD_BYTES = 64 << 20
"""A longer line, block or cell is a file of another kind; it is dropped rather than held in memory."""
_BUFFER_BYTES = 4 << 20
_BATCH_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Row:
    """The wanted values of a row, as the file has them.

    :param position: the row's number, or the byte at which it begins in the uncompressed file.
    """

    position: int
    values: Sequence[Any]


def uncompressed_name(file: StoragePath) -> str:
    """The file's name without the suffix of a compression."""
    return file.name.removesuffix(".gz").removesuffix(".zst")


def is_compressed(file: StoragePath) -> bool:
    return file.name.endswith(tuple(CODECS))


@contextmanager
def _damage_named(file: StoragePath, what: str) -> Iterator[None]:
    """:raises InputError: the file ends early or breaks the rules of its format."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{file}: not readable as {what}: {reason}") from error


def opened(file: StoragePath) -> io.BufferedReader:
    """The bytes of a file, decompressed."""
    if not is_compressed(file):
        return io.BufferedReader(file.open_input(), _BUFFER_BYTES)
    codec = next(codec for suffix, codec in CODECS.items() if file.name.endswith(suffix))
    stream = file.filesystem.open_input_stream(file.path, compression=codec, buffer_size=_BUFFER_BYTES)
    return io.BufferedReader(stream, _BUFFER_BYTES)


# ------------------------------------------------------------------------------------------ lines of bytes


def _lines(stream: io.BufferedReader, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """`(byte, line)` of the lines that begin in a range, where a line begins at its start; the last one to its end.

    A line that is too long comes as its beginning, without a line end.
    """
    at = start
    while at < stop and (line := stream.readline(_MAX_RECORD_BYTES)):
        if at == 0 and line.startswith(_UTF16_BOMS):
            raise UnicodeError("it is UTF-16, UTF-8 is expected (iconv -f UTF-16 -t UTF-8)")
        yield at, line.removeprefix(_BOM) if at == 0 else line
        at += len(line)
        if not line.endswith(b"\n"):
            at = _line_end(stream, at, stop)


def _line_end(stream: io.BufferedReader, at: int, stop: int) -> int:
    """Where the line that the stream is in ends, the stream standing there; or any place beyond the range."""
    while at < stop and (piece := stream.readline(_MAX_RECORD_BYTES)):
        at += len(piece)
        if piece.endswith(b"\n"):
            break
    return at


def _lines_from(stream: io.BufferedReader, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """`(byte, line)` of the lines that begin in a range of bytes."""
    if start:
        stream.seek(start - 1)
        start = _line_end(stream, start - 1, stop)  # of the line before, be it only its line end
    return _lines(stream, start, stop)


def _too_long(position: int, beginning: bytes, what: str) -> Rejected:
    return Rejected(f"longer than {_MAX_RECORD_BYTES >> 20} MiB; {what}", position, _excerpt(beginning))


def _excerpt(found: object) -> str:
    """The beginning of what was found, for the dead letter."""
    if isinstance(found, bytes):
        found = found[: 4 * EXCERPT_CHARS].decode("utf-8", "replace")
    return str(found)[:EXCERPT_CHARS].rstrip("\r\n")


# ----------------------------------------------------------------------------------------- values of a row


def row_texts(row: Row, columns: Sequence[str]) -> tuple[str, ...] | Rejected:
    """The values of a row as texts."""
    texts = []
    for name, value in zip(columns, row.values, strict=True):
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                found = f"{name}: not UTF-8 text, see its byte {error.start}"
                return Rejected(found, row.position, _excerpt(value))
        if not isinstance(value, str):
            found = "nothing (null)" if value is None else f"a value of type {type(value).__name__}"
            return Rejected(f"{name}: {found} where a text is expected", row.position, _excerpt(value))
        texts.append(value)
    return tuple(texts)


def check_column(file: StoragePath, names: Sequence[str], wanted: str) -> None:
    """:raises InputError: the column is not there; the text names the nearest one."""
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise InputError(f"{file}: no column '{wanted}' among {', '.join(names)}{hint}")


# ----------------------------------------------------------------------------------------------- Parquet


def opened_parquet(file: StoragePath) -> pq.ParquetFile:
    """An open parquet file.

    :raises InputError: it is not one.
    """
    try:
        # Buffered: a column of a row group is read piece by piece, however large the row group is.
        return pq.ParquetFile(file.open_input(), buffer_size=_BUFFER_BYTES)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def parquet_rows(file: StoragePath, start: int, stop: int, columns: Sequence[str]) -> Iterator[Row]:
    """The rows with the numbers [start, stop)."""
    with _damage_named(file, "parquet"), opened_parquet(file) as parquet:
        for name in columns:
            check_column(file, parquet.schema_arrow.names, name)
        metadata = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
        bounds = [0, *itertools.accumulate(group.num_rows for group in metadata)]
        groups = [group for group in range(len(metadata)) if bounds[group] < stop and start < bounds[group + 1]]
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
    with _damage_named(file, "an Arrow stream"):
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
    with _damage_named(file, "an Arrow stream"), opened_arrow(file) as reader:
        for name in columns:
            check_column(file, reader.schema.names, name)
        position = 0
        for whole in reader:
            for offset in range(0, len(whole), 1_024):
                batch = whole.slice(offset, 1_024)
                yield from _batch_rows(batch, position, columns)
                position += len(batch)


# -------------------------------------------------------------------------------------------- JSON Lines


def jsonl_rows(file: StoragePath, start: int, stop: int, columns: Sequence[str]) -> Iterator[Row | Rejected]:
    """The objects on the lines that begin in a range of bytes."""
    with _damage_named(file, "JSON Lines"), opened(file) as stream:
        for position, line in _lines_from(stream, start, stop):
            if line.strip():
                yield _json_row(position, line, columns)


def _json_row(position: int, line: bytes, columns: Sequence[str]) -> Row | Rejected:
    if len(line) >= _MAX_RECORD_BYTES:
        return _too_long(position, line, "one JSON object a line is expected")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Rejected(f"not UTF-8 text, see byte {error.start} of the line", position, _excerpt(line))
    except (ValueError, RecursionError) as error:
        return Rejected(f"not JSON: {error}", position, _excerpt(line))
    if not isinstance(row, dict):
        kind = "an array" if isinstance(row, list) else "a bare value"
        return Rejected(f"{kind} where an object, {{…}}, is expected on the line", position, _excerpt(line))
    for name in columns:
        if name not in row:
            found = ", ".join(row) or "none"
            return Rejected(f"no '{name}' among the line's keys: {_excerpt(found)}", position, _excerpt(line))
    values = [row[name] for name in columns]
    if b"\\ud" in line or b"\\uD" in line:
        for name, value in zip(columns, values, strict=True):
            if isinstance(value, str) and not _is_encodable(value):
                return Rejected(f"{name}: half of a surrogate pair (\\ud800 to \\udfff)", position, _excerpt(line))
    return Row(position, values)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --------------------------------------------------------------------------------------------------- CSV


def csv_header(file: StoragePath) -> list[str]:
    """The names of the columns.

    :raises InputError: there is no header, or it is not UTF-8 text.
    """
    with _damage_named(file, "CSV"), opened(file) as stream:
        return _header(file, _lines(stream, 0, END))


def _header(file: StoragePath, lines: Iterator[tuple[int, bytes]]) -> list[str]:
    for _, line in lines:
        cells = _Cells(line, lines, _delimiter(file)).row
        if cells:
            return [cell.encode("latin-1").decode() for cell in cells]
        break
    raise InputError(f"{file}: the first line is not a header of column names")


def csv_rows(file: StoragePath, start: int, stop: int, columns: Sequence[str]) -> Iterator[Row | Rejected]:
    """The rows of a range of bytes; its ends are those of the file or among its `csv_cuts`."""
    with _damage_named(file, "CSV"), opened(file) as stream:
        lines = _lines(stream, 0, END if start else stop)
        header = _header(file, lines)
        for name in columns:
            check_column(file, header, name)
        numbers = [header.index(name) for name in columns]
        if start:
            stream.seek(start)
            lines = _lines(stream, start, stop)
        for position, line in lines:
            cells = _Cells(line, lines, _delimiter(file))
            if cells.row is None or len(cells.row) not in (0, len(header)):
                counts = f"{len(cells.row or ())} cells where the header has {len(header)}"
                hint = f"; the row is {cells.lines} lines long: is a quote left open?" if cells.lines > 1 else ""
                yield Rejected((cells.error or counts) + hint, position, _excerpt(line))
            elif cells.row:
                yield Row(position, [cells.row[number].encode("latin-1") for number in numbers])


def csv_cuts(file: StoragePath, unit_bytes: int) -> list[int]:
    """0, and beginnings of rows about `unit_bytes` apart; line ends inside of quoted cells begin no row."""
    cuts = [0]
    with _damage_named(file, "CSV"), opened(file) as stream:
        lines = _lines(stream, 0, END)
        _header(file, lines)
        for position, line in lines:
            if position - cuts[-1] >= unit_bytes:
                cuts.append(position)
            if b'"' in line:
                _Cells(line, lines, _delimiter(file))  # takes the lines that the row goes on over
    return cuts


def _delimiter(file: StoragePath) -> str:
    return "\t" if uncompressed_name(file).endswith(".tsv") else ","


class _Cells:
    """The cells of one row, as Latin-1 so that no byte is lost; `row` is None where RFC 4180 is broken.

    :param lines: where the lines come from that a quoted cell goes on over.
    """

    def __init__(self, line: bytes, lines: Iterator[tuple[int, bytes]], delimiter: str) -> None:
        self.row: list[str] | None = None
        self.error = ""
        self.lines = 0
        csv.field_size_limit(_MAX_RECORD_BYTES - 1)  # the csv module's own is 128 KiB
        try:
            row = next(csv.reader(self._texts(line, lines), delimiter=delimiter, strict=True))
            self.row = None if self.error else row
        except csv.Error as error:
            self.error = self.error or str(error)

    def _texts(self, line: bytes, lines: Iterator[tuple[int, bytes]]) -> Iterator[str]:
        for _, text in itertools.chain([(0, line)], lines):
            self.lines += 1
            yield text.decode("latin-1")
        # Asked for one line more than there are: only inside of a quoted cell.
        self.error = "the file ends inside of quotes"


# -------------------------------------------------------------------------------------------------- text


def text_blocks(file: StoragePath, start: int, stop: int) -> Iterator[Row | Rejected]:
    """What blank lines part: the blocks whose blank line before them begins in a range of bytes.

    The first block of a file needs none.
    """
    with _damage_named(file, "text"), opened(file) as stream:
        lines = _lines_from(stream, start, END)
        if start and next((at for at, line in lines if at >= stop or not line.strip()), stop) >= stop:
            return
        block: list[bytes] = []
        begin = size = 0
        for position, line in lines:
            if line.strip():
                begin = begin if block else position
                size += len(line)
                if size < _MAX_RECORD_BYTES or not block:
                    block.append(line)
                continue
            if block:
                yield _block(begin, block, size)
                block, size = [], 0
            if position >= stop:
                return
        if block:
            yield _block(begin, block, size)


def _block(position: int, lines: list[bytes], size: int) -> Row | Rejected:
    if size >= _MAX_RECORD_BYTES:
        return _too_long(position, lines[0], "blank lines part the documents of a text file")
    return Row(position, [b"".join(lines)])


def whole_file(file: StoragePath) -> Row | Rejected:
    """The bytes of a file as its one row."""
    with _damage_named(file, "text"), opened(file) as stream:
        data = stream.read(_MAX_RECORD_BYTES)
    if len(data) >= _MAX_RECORD_BYTES:
        return _too_long(0, data, "one file is one document")
    return Row(0, [data.removeprefix(_BOM)]) if data.strip() else Rejected("the file is empty")


# ------------------------------------------------------------------------------------------ aligned lines


@dataclass(frozen=True, slots=True)
class AlignedRange:
    """Bytes of two files that hold the same lines."""

    start: int
    stop: int
    target_start: int
    target_stop: int


def aligned_rows(file: StoragePath, target: StoragePath, part: AlignedRange) -> Iterator[Row | Rejected]:
    """Line n of one file with line n of the other, for the lines of a range.

    :raises InputError: they differ in their numbers of lines.
    """
    with _damage_named(file, "text"), opened(file) as source_stream, opened(target) as target_stream:
        if part.start:
            source_stream.seek(part.start)
            target_stream.seek(part.target_start)
        sources = _lines(source_stream, part.start, part.stop)
        targets = _lines(target_stream, part.target_start, part.target_stop)
        for number, (source, wanted) in enumerate(itertools.zip_longest(sources, targets)):
            if source is None or wanted is None:
                lines, target_lines = (
                    number + sum(1 for _ in itertools.chain([one] if one else [], more))
                    for one, more in ((source, sources), (wanted, targets))
                )
                raise _uneven(file, target, lines, target_lines)
            if max(len(source[1]), len(wanted[1])) >= _MAX_RECORD_BYTES:
                yield _too_long(source[0], source[1], "one text a line is expected")
            else:
                yield Row(source[0], [source[1].rstrip(b"\r\n"), wanted[1].rstrip(b"\r\n")])


def aligned_ranges(file: StoragePath, target: StoragePath, unit_bytes: int) -> list[AlignedRange]:
    """Ranges of equal lines in two files, about `unit_bytes` of the first each.

    :raises InputError: the files differ in their numbers of lines.
    """
    starts, numbers, lines = [0], [0], 0
    with _damage_named(file, "text"), opened(file) as stream:
        for position, _ in _lines(stream, 0, END):
            if position - starts[-1] >= unit_bytes:
                starts.append(position)
                numbers.append(lines)
            lines += 1
    target_starts: list[int] = []
    target_lines = 0
    with _damage_named(target, "text"), opened(target) as stream:
        for position, _ in _lines(stream, 0, END):
            if len(target_starts) < len(numbers) and target_lines == numbers[len(target_starts)]:
                target_starts.append(position)
            target_lines += 1
    if lines != target_lines:
        raise _uneven(file, target, lines, target_lines)
    stops, target_stops = [*starts[1:], END], [*target_starts[1:], END]
    return list(map(AlignedRange, starts, stops, target_starts, target_stops))


def _uneven(file: StoragePath, target: StoragePath, lines: int, target_lines: int) -> InputError:
    return InputError(f"{file} has {lines} lines and {target} {target_lines}: line n is to be the target of line n")


# ----------------------------------------------------------------------------------------------- gettext


_CHARSET = re.compile(rb"charset=([\w.:-]+)", re.IGNORECASE)
_PO_LINE = re.compile(r'\s*(?:#.*|(?:msg(?:ctxt|id|id_plural|str(?:\[\d\])?)\s*)?"(?:[^"\\]|\\.)*")?\s*')
# In front of a message alone: the head of its catalog says how many plural forms there are.
_ANY_PLURALS = 'msgid ""\nmsgstr "Plural-Forms: nplurals=6; plural=0;\\n"\n\n'


def gettext_rows(file: StoragePath) -> Iterator[Row | Rejected]:
    """Source and target of the translated messages of a `.po` or `.mo` catalog; of plurals, both forms.

    The position is the line, or the number of the message in a `.mo` file.

    :raises InputError: a `.mo` file is damaged. In a `.po` file a malformed message costs itself alone.
    """
    with _damage_named(file, "gettext"), opened(file) as stream:
        data = stream.read()
    if uncompressed_name(file).endswith(".mo"):
        try:
            catalog = read_mo(io.BytesIO(data))
        except (OSError, ValueError, LookupError, struct.error) as error:
            raise InputError(f"{file}: not readable as a gettext catalog: {error}") from error
        yield from _messages(catalog)
        return
    data = data.removeprefix(_BOM)
    named = _CHARSET.search(data)
    charset = named[1].decode() if named and named[1] != b"CHARSET" else "utf-8"
    try:
        rows = list(_messages(_parsed(data.decode(charset))))
    except (PoFileError, ValueError, LookupError):
        yield from _messages_one_by_one(data, charset)
    else:
        yield from rows


def _parsed(text: str) -> Catalog:
    for line in io.StringIO(text):
        if not _PO_LINE.fullmatch(line):  # Babel would take the line, and cut its last sign off
            raise ValueError(f"{_excerpt(line)!r} is neither a comment nor a keyword with a quoted string")
    return read_po(io.StringIO(text), ignore_obsolete=True, abort_invalid=True)


def _messages(catalog: Catalog, first_line: int | None = None) -> Iterator[Row]:
    for number, message in enumerate(catalog):
        if not message.id or message.fuzzy:
            continue
        forms = [(message.id, message.string)]
        if not isinstance(message.id, str):
            # The last plural form is that of most numbers; a language with one form has it for the singular too.
            filled = [form for form in message.string if form]
            forms = list(zip(message.id, (message.string[0], filled[-1]), strict=True)) if filled else []
        for source, target in forms:
            if source and target:
                yield Row(first_line or message.lineno or number, [source, target])


def _messages_one_by_one(data: bytes, charset: str) -> Iterator[Row | Rejected]:
    """As blank lines part them, so that a malformed one harms no other."""
    line = 1
    for number, part in enumerate(re.split(rb"(\r?\n(?:[ \t]*\r?\n)+)", data)):
        if number % 2 == 0 and part.strip():
            try:
                yield from list(_messages(_parsed(_ANY_PLURALS + part.decode(charset)), first_line=line))
            except (PoFileError, ValueError, LookupError) as error:
                yield Rejected(f"not a gettext message: {error}", line, _excerpt(part))
        line += part.count(b"\n")
