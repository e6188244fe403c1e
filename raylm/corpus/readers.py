"""What stands in a file of lines: its rows one after the other, with their positions; a damaged row costs itself alone.

Files are streamed, decompressed where their names end in `.gz` or `.zst`, and may be read in ranges. Ranges that follow
each other give the rows of the whole, each row once: a row belongs to the range that it begins in.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raylm.corpus.records import Rejected
from raylm.errors import InputError, did_you_mean, first_line
from raylm.storage import StoragePath

CODECS = {".gz": "gzip", ".zst": "zstd"}
END = (1 << 63) - 1
"""Where the range of a file stops whose length nobody knows before it was read."""
EXCERPT_CHARS = 200
_MAX_RECORD_BYTES = 64 << 20
"""A longer line, block or cell is a file of another kind; it is dropped rather than held in memory."""
BUFFER_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Row:
    """The wanted values of a row, as the file has them.

    :param position: the row's number, or the byte at which it begins in the uncompressed file.
    """

    position: int
    values: Sequence[Any]


def uncompressed_name(file: StoragePath) -> str:
    """The file's name in lower case, without the suffix of a compression."""
    return file.name.lower().removesuffix(".gz").removesuffix(".zst")


def is_compressed(file: StoragePath) -> bool:
    return file.name.lower().endswith(tuple(CODECS))


@contextmanager
def damage_named(file: StoragePath, what: str) -> Iterator[None]:
    """:raises InputError: the file ends early or breaks the rules of its format."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{file}: not readable as {what}: {first_line(error)}") from error


def opened(file: StoragePath) -> io.BufferedReader:
    """The bytes of a file, decompressed."""
    if not is_compressed(file):
        return io.BufferedReader(file.open_input(), BUFFER_BYTES)
    codec = next(codec for suffix, codec in CODECS.items() if file.name.lower().endswith(suffix))
    stream = file.filesystem.open_input_stream(file.path, compression=codec, buffer_size=BUFFER_BYTES)
    return io.BufferedReader(stream, BUFFER_BYTES)


# ------------------------------------------------------------------------------------------ lines of bytes


def _lines(stream: io.BufferedReader, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """`(byte, line)` of the lines that begin in a range, where a line begins at its start; the last one to its end.

    A line that is too long comes as its beginning, without a line end.
    """
    at = start
    while at < stop and (line := stream.readline(_MAX_RECORD_BYTES)):
        if at == 0 and line.startswith(_UTF16_BOMS):
            raise UnicodeError("it is UTF-16, UTF-8 is expected (iconv -f UTF-16 -t UTF-8)")
        yield at, line.removeprefix(BOM) if at == 0 else line
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
    return Rejected(f"longer than {_MAX_RECORD_BYTES >> 20} MiB; {what}", position, excerpt(beginning))


def excerpt(found: object) -> str:
    """The beginning of what was found, for the dead letter."""
    if isinstance(found, bytes):
        found = found[: 4 * EXCERPT_CHARS].decode("utf-8", "replace")
    text = str(found)[:EXCERPT_CHARS].rstrip("\r\n")
    return text.encode(errors="replace").decode()  # half of a surrogate pair cannot be written


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
                return Rejected(found, row.position, excerpt(value))
        if not isinstance(value, str):
            found = "nothing (null)" if value is None else f"a value of type {type(value).__name__}"
            return Rejected(f"{name}: {found} where a text is expected", row.position, excerpt(value))
        texts.append(value)
    return tuple(texts)


def check_column(file: StoragePath, names: Sequence[str], wanted: str) -> None:
    """:raises InputError: the column is not there; the text names the nearest one."""
    if wanted not in names:
        raise InputError(f"{file}: no column '{wanted}' among {', '.join(names)}{did_you_mean(wanted, names)}")


# -------------------------------------------------------------------------------------------- JSON Lines


def jsonl_rows(file: StoragePath, start: int, stop: int, columns: Sequence[str]) -> Iterator[Row | Rejected]:
    """The objects on the lines that begin in a range of bytes."""
    with damage_named(file, "JSON Lines"), opened(file) as stream:
        for position, line in _lines_from(stream, start, stop):
            if line.strip():
                yield _json_row(position, line, columns)


def jsonl_objects(file: StoragePath) -> Iterator[dict[str, Any]]:
    """The objects of a file; lines that hold none are passed over."""
    with damage_named(file, "JSON Lines"), opened(file) as stream:
        for _, line in _lines(stream, 0, END):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def _json_row(position: int, line: bytes, columns: Sequence[str]) -> Row | Rejected:
    if len(line) >= _MAX_RECORD_BYTES:
        return _too_long(position, line, "one JSON object a line is expected")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Rejected(f"not UTF-8 text, see byte {error.start} of the line", position, excerpt(line))
    except (ValueError, RecursionError) as error:
        return Rejected(f"not JSON: {error}", position, excerpt(line))
    if not isinstance(row, dict):
        kind = "an array" if isinstance(row, list) else "a bare value"
        return Rejected(f"{kind} where an object, {{…}}, is expected on the line", position, excerpt(line))
    for name in columns:
        if name not in row:
            found = ", ".join(row) or "none"
            return Rejected(f"no '{name}' among the line's keys: {excerpt(found)}", position, excerpt(line))
    values = [row[name] for name in columns]
    if b"\\ud" in line or b"\\uD" in line:
        for name, value in zip(columns, values, strict=True):
            if isinstance(value, str) and not _is_encodable(value):
                return Rejected(f"{name}: half of a surrogate pair (\\ud800 to \\udfff)", position, excerpt(line))
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
    with damage_named(file, "CSV"), opened(file) as stream:
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
    with damage_named(file, "CSV"), opened(file) as stream:
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
                yield Rejected((cells.error or counts) + hint, position, excerpt(line))
            elif cells.row:
                yield Row(position, [cells.row[number].encode("latin-1") for number in numbers])


def csv_cuts(file: StoragePath, unit_bytes: int) -> list[int]:
    """0, and beginnings of rows about `unit_bytes` apart; line ends inside of quoted cells begin no row."""
    cuts = [0]
    with damage_named(file, "CSV"), opened(file) as stream:
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
    with damage_named(file, "text"), opened(file) as stream:
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
    with damage_named(file, "text"), opened(file) as stream:
        data = stream.read(_MAX_RECORD_BYTES)
    if len(data) >= _MAX_RECORD_BYTES:
        return _too_long(0, data, "one file is one document")
    return Row(0, [data.removeprefix(BOM)]) if data.strip() else Rejected("the file is empty")


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
    with damage_named(file, "text"), opened(file) as source_stream, opened(target) as target_stream:
        if part.start:
            source_stream.seek(part.start)
            target_stream.seek(part.target_start)
        sources = _lines(source_stream, part.start, part.stop)
        targets = _named_lines(target, target_stream, part.target_start, part.target_stop)
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


def _named_lines(file: StoragePath, stream: io.BufferedReader, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """As `_lines`; damage is that of this file."""
    with damage_named(file, "text"):
        yield from _lines(stream, start, stop)


def aligned_ranges(file: StoragePath, target: StoragePath, unit_bytes: int) -> list[AlignedRange]:
    """Ranges of equal lines in two files, about `unit_bytes` of the first each.

    :raises InputError: the files differ in their numbers of lines.
    """
    starts, numbers, lines = [0], [0], 0
    with damage_named(file, "text"), opened(file) as stream:
        for position, _ in _lines(stream, 0, END):
            if position - starts[-1] >= unit_bytes:
                starts.append(position)
                numbers.append(lines)
            lines += 1
    target_starts: list[int] = []
    target_lines = 0
    with damage_named(target, "text"), opened(target) as stream:
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
