"""Where text comes from: each source is cut into units, and a unit is what one worker reads at once.

A unit is plain data. Which units there are never shows in the result: one after the other they give the same records
however they are cut, and what comes after puts records in order by a hash of their content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow.fs import FileInfo

from raylm.corpus import cldr, docstrings, readers, tables
from raylm.corpus.markup import check_markup
from raylm.corpus.readers import check_column
from raylm.corpus.tables import opened_parquet
from raylm.errors import ArtifactError, InputError, OutputError, StoreError, first_line
from raylm.settings import (
    CldrSource,
    CorpusSettings,
    DocstringsSource,
    DocstringSummariesSource,
    EvaluationSource,
    FileSource,
    PairFileSource,
)
from raylm.storage import StoragePath, cache_directory, find_files, fingerprint
from raylm.tasks import CLASSIFY

STREAM_UNIT_BYTES = _MIN_UNIT_BYTES = 8 << 20
_MAX_UNIT_BYTES = 256 << 20  # of a terabyte; of more, units grow with the root of the size, as parts do (`plan`)
_WANTED_UNITS = 4_096
_MANY_FILES = 1_000
"""A source with more files has several small ones in a unit."""
_MAX_PARTS_OF_ROW_GROUP = 16
"""To come to its rows, a part decodes those before it: with 16, each row 8 times in the mean, at 500 MB/s."""
_FIRST_ROWS = 100
"""Of JSON Lines, in which a column is looked for before all of them are read."""
_CLDR_UNIT_ROWS = 10_000
_CLDR_BYTES_PER_ROW = 100
_TEXT_PER_COMPRESSED_BYTE = 3
_PLANNING_THREADS = 16
_SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "datasets": (".arrow",),
    "text": (".txt", ".text"),
    "markdown": (".md", ".markdown"),
    "html": (".html", ".htm", ".xhtml"),
    "gettext": (".po", ".mo"),
}
_WITHOUT_EFFECT_ON_RECORDS = {"path", "target_path", "weight", "epochs"}
_MAY_BE_TEXT = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null),
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
)

AnyFileSource = FileSource | PairFileSource | EvaluationSource


@dataclass(frozen=True)
class Unit:
    """A piece of a source.

    :param identity: tells whether the piece changed: names, sizes and times of its files, or the generator's arguments,
        and what the settings of its source say about reading.
    :param bytes: roughly what it holds, for progress and for the number of shards.
    :param source: the number of its source, documents' sources before pairs'.
    :param origin: its file or package, for people.
    :param order: its place among all units: by source, then by the file's name, then by the place in the file.
    """

    kind: Literal["file", "docstrings", "cldr"]
    identity: dict[str, Any]
    bytes: int
    documents: bool
    pairs: bool
    source: int
    origin: str
    order: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class FoundFile:
    """A file of a source, for two aligned files with the one that holds the targets."""

    place: StoragePath
    bytes: int
    mtime_ns: int | None
    target: FoundFile | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What tells whether the file changed."""
        own = {"file": str(self.place), "bytes": self.bytes, "mtime_ns": self.mtime_ns}
        return own | ({"target": self.target.identity} if self.target else {})


def plan_units(corpus: CorpusSettings, unit_bytes: int | None = None) -> list[Unit]:
    """The units of all sources, in the order of the sources, of their files' names, and of the places in a file.

    :param unit_bytes: about the size of a unit; by default larger ones for a large corpus.
    :raises InputError: a source has no files, a file lacks a column or is damaged, a package is not installed, a
        language has no CLDR data.
    """
    sources = [*corpus.documents, *corpus.pairs]
    keys = [f"corpus.documents[{number}]" for number in range(len(corpus.documents))]
    keys += [f"corpus.pairs[{number}]" for number in range(len(corpus.pairs))]
    files = {
        number: list_files(source, keys[number])
        for number, source in enumerate(sources)
        if isinstance(source, FileSource | PairFileSource)
    }
    unit_bytes = unit_bytes or _unit_bytes(sum(file.bytes for found in files.values() for file in found))
    units: list[Unit] = []
    for number, source in enumerate(sources):
        if isinstance(source, FileSource | PairFileSource):
            units += _file_units(source, number, keys[number], files[number], unit_bytes)
        elif isinstance(source, CldrSource):
            units += _cldr_units(source, number, keys[number])
        else:
            units += _docstring_units(corpus, source, number)
    return [replace(unit, order=order) for order, unit in enumerate(units)]


def _unit_bytes(total: int) -> int:
    """The size of a unit: a power of two, so that a corpus that grows a little is cut as before."""
    size, most = _MIN_UNIT_BYTES, _MAX_UNIT_BYTES * max(math.sqrt(total / 2**40), 1)
    while size < min(total / _WANTED_UNITS, most):
        size *= 2
    return size


def list_files(source: AnyFileSource, key: str) -> list[FoundFile]:
    """The files of a source, in the order of their names.

    :param key: where in the YAML the source stands, such as `corpus.documents[0]`.
    :raises InputError: there are none, one is empty, or aligned ones do not match in number.
    """
    target_path = source.target_path if isinstance(source, PairFileSource) else None
    files = _found(source.type, source.path, f"{key}.path")
    if target_path is None:
        return files
    targets = _found(source.type, target_path, f"{key}.target_path")
    if len(files) != len(targets):
        places = StoragePath(source.path), StoragePath(target_path)
        raise InputError(f"{key}: {places[0]} is {len(files)} files and {places[1]} {len(targets)}: give as many")
    return [replace(file, target=target) for file, target in zip(files, targets, strict=True)]


def _found(kind: str, path: str, key: str) -> list[FoundFile]:
    endings = _SUFFIXES[kind]
    packed = () if kind in ("parquet", "datasets") else readers.CODECS
    suffixes = (*endings, *(ending + codec for ending in endings for codec in packed))
    try:
        found = sorted(find_files(path, suffixes), key=lambda entry: str(entry[1].path))
    except (ArtifactError, StoreError) as error:
        raise InputError(f"{key}: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{key}: {StoragePath(path)}: cannot be looked at: {first_line(error)}") from error
    if kind == "datasets":
        found = _saved_files(found)
    if not found:
        raise InputError(
            f"{key}: {StoragePath(path)}: no such file, and no directory or glob with {' or '.join(endings)} files"
        )
    files = []
    for file, info in found:
        if info.size == 0 and kind not in ("markdown", "html"):
            raise InputError(f"{file}: the file is empty; {kind} rows are expected")
        # A worker may run in another directory.
        files.append(FoundFile(StoragePath(file.path) if file.is_local else file, info.size, info.mtime_ns))
    return files


def _saved_files(found: list[tuple[StoragePath, FileInfo]]) -> list[tuple[StoragePath, FileInfo]]:
    """The Arrow files that hold the data of saved datasets; beside them may lie what `map` cached.

    :raises InputError: a file that a dataset's `state.json` names is missing.
    """
    found = [(file, info) for file, info in found if not file.name.startswith("cache-")]
    for folder in dict.fromkeys(file.parent for file, _ in found):
        state = folder / "state.json"
        if state.is_file():
            there = {file.name for file, _ in folder.list()}
            for entry in state.read_json().get("_data_files", ()):
                if entry["filename"] not in there:
                    raise InputError(f"{folder / entry['filename']}: the file is missing; {state} names it")
    return found


def _file_units(
    source: FileSource | PairFileSource, number: int, key: str, files: list[FoundFile], unit_bytes: int
) -> Iterator[Unit]:
    if isinstance(source, FileSource):
        check_markup("html" if source.type == "html" else source.markup, key)
    if source.type == "jsonl":
        _check_keys(files, source)
    settings = source.model_dump(mode="json", exclude=_WITHOUT_EFFECT_ON_RECORDS)
    with ThreadPoolExecutor(_PLANNING_THREADS) as threads:  # on an object store each file is a matter of waiting
        cut = list(threads.map(lambda file: list(_pieces(file, source, unit_bytes)), files))
    pieces = [(file, piece) for file, pieces in zip(files, cut, strict=True) for piece in pieces]
    for batch in _batches(pieces, unit_bytes if len(files) > _MANY_FILES else 0):
        (file, _), others = batch[0], len({file.place for file, _ in batch}) - 1
        yield Unit(
            kind="file",
            identity={"pieces": [file.identity | piece for file, piece in batch], "settings": settings},
            bytes=sum(piece["bytes"] for _, piece in batch),
            documents=isinstance(source, FileSource),
            pairs=isinstance(source, PairFileSource),
            source=number,
            origin=f"{file.place} and {others} more" if others else str(file.place),
            arguments={
                "pieces": [
                    {"file": file.place.uri, "target": file.target and file.target.place.uri, **piece}
                    for file, piece in batch
                ],
            },
        )


Piece = dict[str, int]
"""A range of a file, `start` and `stop` in bytes or rows, and how many bytes it holds."""


def _batches(pieces: list[tuple[FoundFile, Piece]], limit: int) -> Iterator[list[tuple[FoundFile, Piece]]]:
    """Neighbours, as many as stay within a number of bytes; at least one."""
    batch: list[tuple[FoundFile, Piece]] = []
    size = 0
    for file, piece in pieces:
        if batch and size + piece["bytes"] > limit:
            yield batch
            batch, size = [], 0
        batch.append((file, piece))
        size += piece["bytes"]
    if batch:
        yield batch


def _pieces(found: FoundFile, source: FileSource | PairFileSource, unit_bytes: int) -> Iterator[Piece]:
    """The ranges that a file is cut into."""
    file, size = found.place, found.bytes
    if source.type == "parquet":
        yield from _row_ranges(file, source, unit_bytes)
        return
    if source.type == "datasets":
        with tables.opened_arrow(file) as reader:
            _check_text_columns(file, reader.schema, source)
    if source.type == "csv":
        header = readers.csv_header(file)
        for column in columns_of(source):
            check_column(file, header, column)
    packed = readers.is_compressed(file) or (found.target is not None and readers.is_compressed(found.target.place))
    if packed or size <= unit_bytes:
        held = size * _TEXT_PER_COMPRESSED_BYTE if packed else size
        whole = {"start": 0, "stop": readers.END, "bytes": held}
        yield whole | ({"target_start": 0, "target_stop": readers.END} if found.target else {})
    elif found.target is not None:
        target = found.target.place
        ranges = _scanned(
            found, unit_bytes, lambda: [asdict(p) for p in readers.aligned_ranges(file, target, unit_bytes)]
        )
        for part in ranges:
            yield part | {"bytes": min(part["stop"], size) - part["start"]}
    elif source.type in ("jsonl", "text", "csv"):
        starts = list(range(0, size, unit_bytes))
        if source.type == "csv":
            starts = _scanned(found, unit_bytes, lambda: readers.csv_cuts(file, unit_bytes))
        for start, stop in zip(starts, [*starts[1:], size], strict=True):
            yield {"start": start, "stop": stop, "bytes": stop - start}
    else:
        yield {"start": 0, "stop": readers.END, "bytes": size}


def _scanned(found: FoundFile, unit_bytes: int, scan: Callable[[], list[Any]]) -> list[Any]:
    """Where a file is cut, for which all of it has to be read; known from before where it was read already."""
    place = StoragePath(str(cache_directory() / "cuts" / f"{fingerprint([found.identity, unit_bytes])}.json"))
    if place.is_file():
        return list(place.read_json())
    cuts = scan()
    with suppress(OutputError):  # then it is read again the next time
        place.write_json(cuts)
    return cuts


def _row_ranges(file: StoragePath, source: FileSource | PairFileSource, unit_bytes: int) -> Iterator[Piece]:
    """Ranges of a parquet file's rows: small row groups together, large ones in parts."""
    columns = columns_of(source)
    with opened_parquet(file) as parquet:
        _check_text_columns(file, parquet.schema_arrow, source)
        start = stop = size = 0
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            group_bytes = tables.column_bytes(group, columns)
            if size and size + group_bytes > unit_bytes:
                yield {"start": start, "stop": stop, "bytes": size}
                start, size = stop, 0
            parts = min(-(-group_bytes // unit_bytes), group.num_rows, _MAX_PARTS_OF_ROW_GROUP)
            for part in range(1, parts):
                cut = stop + group.num_rows * part // parts
                yield {"start": start, "stop": cut, "bytes": group_bytes // parts}
                start = cut
            stop += group.num_rows
            size += group_bytes // max(parts, 1)
        if start < stop:
            yield {"start": start, "stop": stop, "bytes": size}


def columns_of(source: FileSource | PairFileSource) -> list[str]:
    """The columns that are read, of pairs the target's last."""
    if isinstance(source, FileSource):
        return [source.column]
    return [column for column in (source.source, source.context, source.target) if column is not None]


def _check_text_columns(file: StoragePath, schema: pa.Schema, source: FileSource | PairFileSource) -> None:
    """:raises InputError: a column is not there, or holds what never is text, nor a number as a label."""
    has_labels = isinstance(source, PairFileSource) and source.task == CLASSIFY.name
    for column in columns_of(source):
        check_column(file, schema.names, column)
        kind = schema.field(column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_label = has_labels and column == columns_of(source)[-1]
        if not any(is_kind(value) for is_kind in _MAY_BE_TEXT) and not (is_label and pa.types.is_integer(value)):
            raise InputError(f"{file}: column '{column}' holds {kind}, text (string) is expected")


def _check_keys(files: list[FoundFile], source: FileSource | PairFileSource) -> None:
    """:raises InputError: a column is a key of none of the first JSON objects."""
    objects = chain.from_iterable(readers.jsonl_objects(file.place) for file in files)
    keys = list(dict.fromkeys(chain.from_iterable(islice(objects, _FIRST_ROWS))))
    for column in columns_of(source) if keys else ():
        check_column(files[0].place, keys, column)


def _cldr_units(source: CldrSource, number: int, key: str) -> Iterator[Unit]:
    try:
        cldr.check_language(source.to)
    except ValueError as error:
        raise InputError(f"{key}.to: {error}") from error
    for start in range(0, source.rows, _CLDR_UNIT_ROWS):
        stop = min(start + _CLDR_UNIT_ROWS, source.rows)
        arguments = {"to": source.to, "seed": source.seed, "start": start, "stop": stop}
        yield Unit(
            kind="cldr",
            identity=arguments,
            bytes=(stop - start) * _CLDR_BYTES_PER_ROW,
            documents=False,
            pairs=True,
            source=number,
            origin=f"cldr {source.to}",
            arguments=arguments,
        )


def _docstring_units(
    corpus: CorpusSettings, source: DocstringsSource | DocstringSummariesSource, number: int
) -> Iterator[Unit]:
    """One parse of a file serves both: its documents for pretraining and its pairs for summarising.

    A package belongs to the first source that names it.
    """
    sources = [*corpus.documents, *corpus.pairs]
    earlier = {name for other in sources[:number] if other.type == "docstrings" for name in other.packages}
    document_packages = {name for other in corpus.documents if other.type == "docstrings" for name in other.packages}
    pair_packages = {name for other in corpus.pairs if other.type == "docstrings" for name in other.packages}
    for package in sorted(set(source.packages) - earlier):
        try:
            files = docstrings.python_files(package)
        except LookupError as error:
            raise InputError(f"corpus: docstrings of package '{package}': {error}") from error
        makes = {"documents": package in document_packages, "pairs": package in pair_packages}
        # A link may lead nowhere.
        sized = [(name, path, path.stat().st_size) for name, path in files if path.is_file()]
        batch: list[tuple[str, Path, int]] = []
        for entry in [*sized, None]:
            if batch and (entry is None or sum(size for *_, size in batch) + entry[2] > _MIN_UNIT_BYTES):
                yield Unit(
                    kind="docstrings",
                    identity={"package": package, "files": [[name, size] for name, _, size in batch], **makes},
                    bytes=sum(size for *_, size in batch),
                    source=number,
                    origin=package,
                    arguments={"paths": [str(path) for _, path, _ in batch]},
                    **makes,
                )
                batch = []
            if entry is not None:
                batch.append(entry)
