"""Where text comes from: each source is cut into units that one worker reads at once, each unit gives records.

A unit is plain data. Which units there are never shows in the result: records are put in order by a hash of their
content afterwards.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.corpus import cldr, docstrings
from raylm.errors import InputError
from raylm.settings import CldrSource, CorpusSettings, DocstringsSource, FileSource, PairFileSource
from raylm.storage import StoragePath, find_files

Split = Literal["train", "validation", "test"]

_UNIT_BYTES = 8 << 20
_CLDR_UNIT_ROWS = 10_000
_CLDR_BYTES_PER_ROW = 100
_SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".md", ".text"),
}


@dataclass(frozen=True)
class Document:
    """Monolingual text. `split` None: a hash of the content decides."""

    text: str
    split: Split | None = None


@dataclass(frozen=True)
class Pair:
    """What a task gets and what it should answer. `split` None: a hash of the source decides."""

    task: str
    to: str | None
    source: str
    target: str
    split: Split | None = None
    with_document: bool = False
    """The source is part of a document of this corpus too, which must not reach training where the pair may not."""


@dataclass(frozen=True)
class Rejected:
    """A row that could not be read."""

    reason: str


Record = Document | Pair | Rejected


@dataclass(frozen=True)
class Unit:
    """A piece of a source.

    :param identity: tells whether the piece changed: names, sizes and times of its files, or the generator's arguments.
    :param bytes: roughly what it holds, for progress and for the number of shards.
    """

    kind: Literal["file", "docstrings", "cldr"]
    identity: dict[str, Any]
    bytes: int
    documents: bool
    pairs: bool
    arguments: dict[str, Any] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------- planning


def plan_units(corpus: CorpusSettings) -> list[Unit]:
    """The units of all sources.

    :raises InputError: a source has no files, a file lacks a column or is damaged, a package is not installed, a
        language has no CLDR data.
    """
    units: list[Unit] = []
    for number, source in enumerate(corpus.documents):
        if isinstance(source, FileSource):
            units += _file_units(source, f"corpus.documents[{number}]", documents=True)
    for number, pair_source in enumerate(corpus.pairs):
        if isinstance(pair_source, CldrSource):
            units += _cldr_units(pair_source, f"corpus.pairs[{number}]")
        elif isinstance(pair_source, PairFileSource):
            units += _file_units(pair_source, f"corpus.pairs[{number}]", documents=False)
    return [*units, *_docstring_units(corpus)]


def _file_units(source: FileSource | PairFileSource, key: str, documents: bool) -> Iterator[Unit]:
    files = list(find_files(source.path, _SUFFIXES[source.type]))
    if not files:
        endings = " or ".join(_SUFFIXES[source.type])
        raise InputError(f"{key}.path: {source.path}: no such file, and no directory or glob with {endings} files")
    for file, info in files:
        if info.size == 0:
            raise InputError(f"{file}: the file is empty; {source.type} rows are expected")
        arguments = {"file": file.uri, "type": source.type, "source": source.model_dump(mode="json")}
        identity = {"file": file.uri, "bytes": info.size, "mtime_ns": info.mtime_ns}
        for piece in _pieces(file, info.size, source):
            yield Unit(
                kind="file",
                identity=identity | piece,
                bytes=piece["bytes"],
                documents=documents,
                pairs=not documents,
                arguments=arguments | piece,
            )


def _pieces(file: StoragePath, size: int, source: FileSource | PairFileSource) -> Iterator[dict[str, int]]:
    """Ranges of a file: row groups of parquet, bytes of line files; csv, whose cells may hold line ends, is whole."""
    if source.type == "parquet":
        with opened_parquet(file) as parquet:
            for column in _columns(source):
                check_column(file, parquet.schema_arrow.names, column)
            for group in range(parquet.num_row_groups):
                yield {"start": group, "stop": group + 1, "bytes": parquet.metadata.row_group(group).total_byte_size}
    elif source.type == "jsonl":
        for start in range(0, size, _UNIT_BYTES):
            stop = min(start + _UNIT_BYTES, size)
            yield {"start": start, "stop": stop, "bytes": stop - start}
    else:
        yield {"start": 0, "stop": size, "bytes": size}


def _columns(source: FileSource | PairFileSource) -> list[str]:
    return [source.column] if isinstance(source, FileSource) else [source.source, source.target]


def opened_parquet(file: StoragePath) -> pq.ParquetFile:
    """An open parquet file.

    :raises InputError: it is not one.
    """
    try:
        return pq.ParquetFile(file.open_input())
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def check_column(file: StoragePath, names: Sequence[str], wanted: str) -> None:
    """:raises InputError: the column is not there; the text names the nearest one."""
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise InputError(f"{file}: no column '{wanted}' among {', '.join(names)}{hint}")


def _cldr_units(source: CldrSource, key: str) -> Iterator[Unit]:
    try:
        cldr.check_language(source.to)
    except ValueError as error:
        raise InputError(f"{key}.to: {error}") from error
    for start in range(0, source.rows, _CLDR_UNIT_ROWS):
        stop = min(start + _CLDR_UNIT_ROWS, source.rows)
        arguments = {"to": source.to, "seed": source.seed, "start": start, "stop": stop}
        size = (stop - start) * _CLDR_BYTES_PER_ROW
        yield Unit("cldr", arguments, size, documents=False, pairs=True, arguments=arguments)


def _docstring_units(corpus: CorpusSettings) -> Iterator[Unit]:
    """One parse of a file serves both: its documents for pretraining and its pairs for summarising."""
    document_packages = {p for s in corpus.documents if isinstance(s, DocstringsSource) for p in s.packages}
    pair_packages = {p for s in corpus.pairs if s.type == "docstrings" for p in s.packages}
    for package in sorted(document_packages | pair_packages):
        try:
            files = docstrings.python_files(package)
        except LookupError as error:
            raise InputError(f"corpus: docstrings of package '{package}': {error}") from error
        sized = [(name, path, path.stat().st_size) for name, path in files]
        batch: list[tuple[str, Path, int]] = []
        for entry in [*sized, None]:
            if batch and (entry is None or sum(size for *_, size in batch) + entry[2] > _UNIT_BYTES):
                yield Unit(
                    kind="docstrings",
                    identity={"package": package, "files": [[name, size] for name, _, size in batch]},
                    bytes=sum(size for *_, size in batch),
                    documents=package in document_packages,
                    pairs=package in pair_packages,
                    arguments={"paths": [str(path) for _, path, _ in batch]},
                )
                batch = []
            if entry is not None:
                batch.append(entry)


# ------------------------------------------------------------------------------------------ reading


def read_unit(unit: Unit) -> Iterator[Record]:
    """The records of a unit.

    :raises InputError: its file is damaged.
    """
    if unit.kind == "cldr":
        for pair in cldr.pairs(**unit.arguments):
            split: Split | None = "test" if pair.split == "test" else None
            yield Pair("translate", unit.arguments["to"], pair.source, pair.target, split)
    elif unit.kind == "docstrings":
        yield from _read_docstrings(unit)
    else:
        yield from _read_file(unit)


def _read_docstrings(unit: Unit) -> Iterator[Record]:
    for path in unit.arguments["paths"]:
        try:
            found = list(docstrings.docstrings(Path(path).read_bytes()))
        except (SyntaxError, OSError):
            yield Rejected("unparsable_python")
            continue
        for _, text in found:
            pair = docstrings.summary_pair(text) if unit.pairs else None
            if pair is not None:
                yield Pair("summarize", None, *pair, with_document=unit.documents)
            if unit.documents:
                yield Document(text)


def _read_file(unit: Unit) -> Iterator[Record]:
    file, settings = StoragePath(unit.arguments["file"]), unit.arguments["source"]
    start, stop = unit.arguments["start"], unit.arguments["stop"]
    if unit.arguments["type"] == "text":
        split: Split | None = "validation" if settings["validation"] else None
        for block in _decoded(file, file.read_bytes()).replace("\r\n", "\n").split("\n\n"):
            if block.strip():
                yield Document(block, split)
        return
    columns = [settings["column"]] if unit.documents else [settings["source"], settings["target"]]
    rows = {"parquet": _parquet_rows, "jsonl": _jsonl_rows, "csv": _csv_rows}[unit.arguments["type"]]
    for values in rows(file, start, stop, columns):
        if values is None:
            yield Rejected("malformed_row")
        elif not all(isinstance(value, str) for value in values):
            yield Rejected("not_text")
        elif unit.documents:
            yield Document(values[0], "validation" if settings["validation"] else None)
        else:
            yield Pair(settings["task"], settings["to"], values[0], values[1], settings["split"])


Row = list[Any] | None
"""The wanted values of a row; None where it is malformed."""


def _parquet_rows(file: StoragePath, start: int, stop: int, columns: list[str]) -> Iterator[Row]:
    with opened_parquet(file) as parquet:
        try:
            table = parquet.read_row_groups(list(range(start, stop)), columns=list(dict.fromkeys(columns)))
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{file}: damaged in row group {start}: {str(error).splitlines()[0]}") from error
    yield from map(list, zip(*(table[column].to_pylist() for column in columns), strict=True))


def _jsonl_rows(file: StoragePath, start: int, stop: int, columns: list[str]) -> Iterator[Row]:
    for line in _lines(file, start, stop):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            yield None
            continue
        if not isinstance(row, dict):
            yield None
            continue
        yield [row.get(column) for column in columns]


def _csv_rows(file: StoragePath, start: int, stop: int, columns: list[str]) -> Iterator[Row]:
    text = io.StringIO(_decoded(file, file.read_bytes()), newline="")
    reader = csv.DictReader(text, delimiter="\t" if file.uri.endswith(".tsv") else ",")
    for column in columns:
        check_column(file, reader.fieldnames or [], column)
    for row in reader:
        yield [row[column] for column in columns]


def _lines(file: StoragePath, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in a range of bytes, the last one to its end."""
    with io.BufferedReader(file.open_input()) as stream:
        position = max(start - 1, 0)
        stream.seek(position)
        if start:
            position += len(stream.readline())  # the line that begins before the range, or the line end before it
        while position < stop:
            line = stream.readline()
            if not line:
                return
            position += len(line)
            yield line


def _decoded(file: StoragePath, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text, see the byte at offset {error.start}") from error
