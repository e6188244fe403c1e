"""What a unit of a source holds: documents, labelled pairs, and rows that could not be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from raylm.corpus import catalogs, cldr, docstrings, readers, tables
from raylm.corpus.markup import html_text, plain_text
from raylm.corpus.records import Document, Pair, Record, Rejected, Split
from raylm.corpus.sources import Unit, columns_of, list_files
from raylm.errors import InputError
from raylm.sentences import split_text
from raylm.settings import EvaluationSource, FileSource, PairFileSource
from raylm.settings.corpus import DocumentSource, PairSource
from raylm.storage import StoragePath
from raylm.tasks import CLASSIFY, TASKS

_PARAGRAPH_END = re.compile(r"\n\s*\n")


def read_unit(unit: Unit, source: DocumentSource | PairSource) -> Iterator[Record]:
    """The records of a unit of a source, in their order.

    :raises InputError: its file is damaged.
    """
    if unit.kind == "cldr":
        for number, pair in enumerate(cldr.pairs(**unit.arguments), unit.arguments["start"]):
            split: Split | None = "test" if pair.split == "test" else None
            yield Pair("translate", unit.arguments["to"], pair.source, pair.target, split, position=number)
    elif unit.kind == "docstrings":
        yield from _read_docstrings(unit)
    elif isinstance(source, FileSource | PairFileSource):
        several = len({piece["file"] for piece in unit.arguments["pieces"]}) > 1
        for piece in unit.arguments["pieces"]:
            for record in _read_piece(piece, source):
                if several and isinstance(record, Rejected):
                    record = replace(record, file=str(StoragePath(piece["file"])))
                yield record


def _read_docstrings(unit: Unit) -> Iterator[Record]:
    number = 0
    for path in unit.arguments["paths"]:
        try:
            found = list(docstrings.docstrings(Path(path).read_bytes()))
        except (SyntaxError, OSError) as error:
            yield Rejected(f"not Python source: {error}", file=path)
            continue
        for text in found:
            number += 1
            pair = docstrings.summary_pair(text) if unit.pairs else None
            if pair is not None:
                yield Pair("summarize", None, *pair, with_document=unit.documents, position=number)
            if unit.documents:
                yield Document(text, position=number)


def _read_piece(piece: dict[str, Any], source: FileSource | PairFileSource) -> Iterator[Record]:
    columns = columns_of(source)
    for row in _rows(piece, source.type, columns):
        if isinstance(row, Rejected):
            yield row
        elif isinstance(source, FileSource):
            yield from _documents(row, source)
        else:
            yield _pair(row, columns, source)


def _pair(row: readers.Row, columns: list[str], origin: PairFileSource) -> Pair | Rejected:
    task = TASKS[origin.task]
    texts = readers.row_texts(_with_text_label(row) if task == CLASSIFY else row, columns)
    if isinstance(texts, Rejected):
        return texts
    source, target, context = texts[0], texts[-1], texts[1] if len(texts) > 2 else None
    if context is not None and not (source.strip() and context.strip()):
        empty = columns[1] if source.strip() else columns[0]
        return Rejected(f"{empty}: empty where a text is expected", row.position)
    return Pair(task.name, origin.to, source, target, origin.split, context, position=row.position)


def _with_text_label(row: readers.Row) -> readers.Row:
    """The row of a text and its label, which may be a whole number, as two texts."""
    text, label = row.values
    is_number = isinstance(label, int) and not isinstance(label, bool)
    return replace(row, values=(text, str(label))) if is_number else row


def _documents(row: readers.Row, source: FileSource) -> Iterator[Document | Rejected]:
    split: Split | None = "validation" if source.validation else None
    if source.type == "html":
        text = html_text(row.values[0])
    else:
        texts = readers.row_texts(row, [source.column])
        if isinstance(texts, Rejected):
            yield texts
            return
        text = plain_text(texts[0], "markdown" if source.type == "markdown" else source.markup)
    for part in _parts(text, source.split_into):
        yield Document(part, split, row.position)


def _parts(text: str, into: str) -> Iterator[str]:
    if into == "document":
        yield text
    elif into == "paragraph":
        yield from filter(str.strip, _PARAGRAPH_END.split(text))
    else:
        yield from split_text(text).sentences


def _rows(piece: dict[str, Any], kind: str, columns: list[str]) -> Iterator[readers.Row | Rejected]:
    """The rows of a range of a file."""
    file, start, stop = StoragePath(piece["file"]), piece["start"], piece["stop"]
    if kind == "parquet":
        yield from tables.parquet_rows(file, start, stop, columns)
    elif kind == "datasets":
        yield from tables.arrow_rows(file, columns)
    elif kind == "jsonl":
        yield from readers.jsonl_rows(file, start, stop, columns)
    elif kind == "csv":
        yield from readers.csv_rows(file, start, stop, columns)
    elif kind == "gettext":
        yield from catalogs.gettext_rows(file)
    elif kind in ("markdown", "html"):
        yield readers.whole_file(file)
    elif piece["target"] is not None:
        part = readers.AlignedRange(start, stop, piece["target_start"], piece["target_stop"])
        yield from readers.aligned_rows(file, StoragePath(piece["target"]), part)
    else:
        yield from readers.text_blocks(file, start, stop)


def read_texts(source: EvaluationSource, key: str) -> Iterator[str]:
    """The texts of an evaluation set, column after column; rows without a text in a column are passed over.

    :param key: where in the YAML the source stands, such as `corpus.decontaminate.against[0]`.
    :raises InputError: a row cannot be read, or a column has no text at all: what is not read would not be kept out.
    """
    columns = ("text",) if source.type == "text" else source.columns
    for column in columns:
        texts = 0
        for found in list_files(source, key):
            piece = {"file": found.place.uri, "target": None, "start": 0, "stop": readers.END}
            for row in _rows(piece, source.type, [column]):
                if isinstance(row, readers.Row) and row.values[0] is None:
                    continue
                read = row if isinstance(row, Rejected) else readers.row_texts(row, [column])
                if isinstance(read, Rejected):
                    raise InputError(f"{found.place}, at {read.position}: {read.error}")
                texts += 1
                yield read[0]
        if not texts:
            raise InputError(f"{key}: {source.path}: no text in column '{column}'")
