"""Row functions: what becomes of a record, from reading to the cleaned row or the reason against it.

Pure: the same functions run when a corpus is prepared and when training reads a stream.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import xxhash

from raylm.corpus.clean import clean, clean_line
from raylm.corpus.filters import reject_document
from raylm.corpus.pair_filters import reject_labelled, reject_pair
from raylm.corpus.pii import mask
from raylm.corpus.readers import excerpt
from raylm.corpus.records import Document, Pair, Record, Rejected
from raylm.language import identify
from raylm.settings import CldrSource, CorpusSettings, PairFileSource
from raylm.tasks import CLASSIFY, TASKS, TRANSLATE

DOCUMENT = "document"
"""The kind of a document; that of a pair is its task."""

CLEANED = pa.schema(
    [
        ("hash", pa.binary(16)),
        ("kind", pa.string()),
        ("to", pa.string()),
        ("split", pa.string()),
        ("split_hash", pa.uint64()),
        ("linked_hash", pa.uint64()),
        ("source", pa.string()),
        ("target", pa.string()),
        ("language", pa.string()),
        ("number", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A row to keep, as in the schema `CLEANED`."""

    hash: bytes
    """Equal for copies."""
    kind: str
    to: str | None
    split: str | None
    """Where the source says so; otherwise `split_hash` decides."""
    split_hash: int
    linked_hash: int | None
    """Of a document with a pair made out of it: that of the pair, with which it is held out."""
    source: str
    """The text of a document."""
    target: str | None
    language: str
    number: int
    """Of the record among those of its unit."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that a rule is against."""

    reason: str
    kind: str
    source: str
    target: str | None


Outcome = Cleaned | Dropped | Rejected


def cleaned_table(rows: list[Cleaned]) -> pa.Table:
    """The rows in the schema `CLEANED`."""
    columns = {field.name: pa.array([getattr(row, field.name) for row in rows], field.type) for field in CLEANED}
    return pa.table(columns, CLEANED)


def cleaned_records(
    records: Iterable[Record], corpus: CorpusSettings, origin: object, counts: Counter[str]
) -> Iterator[Outcome]:
    """What becomes of each record, with everything counted.

    A document out of which a held-out pair was made is held out as well. A row on which cleaning fails is rejected.

    :param origin: the settings of the source that the records are from.
    """
    linked: int | None = None
    for record in records:
        counts["read"] += 1
        if isinstance(record, Rejected):
            counts["rejected"] += 1
            yield record
            continue
        try:
            if isinstance(record, Pair):
                is_labelled = record.task == CLASSIFY.name
                outcome = _labelled(record, corpus, counts) if is_labelled else _pair(record, corpus, origin, counts)
                if record.with_document and isinstance(outcome, Cleaned):
                    linked = outcome.split_hash
            else:
                outcome = _document(record, corpus, linked, counts)
                linked = None
        except Exception as error:  # whatever a row does to a library, it costs that row alone
            counts["rejected"] += 1
            text = record.text if isinstance(record, Document) else record.source
            yield Rejected(f"{type(error).__name__}: {error}", record.position, excerpt(text), "clean")
            continue
        counts[f"dropped.{outcome.reason}" if isinstance(outcome, Dropped) else "kept"] += 1
        yield outcome


def _document(document: Document, corpus: CorpusSettings, linked: int | None, counts: Counter[str]) -> Outcome:
    text = clean(document.text, corpus.clean)
    text, found = _screened(text, corpus)
    if found and corpus.pii.action == "drop":
        return Dropped("pii", DOCUMENT, text, None)
    reason = reject_document(text, corpus.filters)
    if reason is not None:
        return Dropped(reason, DOCUMENT, text, None)
    _count_masked(found, counts)
    digest = xxhash.xxh3_128_digest(_normalised(text).encode())
    by = xxhash.xxh3_64_intdigest(text.encode())
    language, _ = identify(text)
    return Cleaned(digest, DOCUMENT, None, document.split, by, linked, text, None, language, counts["read"])


def _pair(pair: Pair, corpus: CorpusSettings, origin: object, counts: Counter[str]) -> Outcome:
    is_translation = pair.task == TRANSLATE.name
    cleaned = clean_line if is_translation else clean
    texts = [cleaned(text, corpus.clean).strip() for text in (pair.source, pair.context) if text is not None]
    screened = [_screened(text, corpus) for text in (*texts, clean_line(pair.target, corpus.clean))]
    *fields, target = (text for text, _ in screened)
    source = TASKS[pair.task].text(fields)
    if corpus.pii.action == "drop" and any(found for _, found in screened):
        return Dropped("pii", pair.task, source, target)
    reason = reject_pair(
        source,
        target,
        corpus.pair_filters,
        translation=is_translation,
        source_language=origin.source_language if isinstance(origin, PairFileSource) else None,
        target_language=pair.to,
        generated=isinstance(origin, CldrSource),
    )
    if reason is not None:
        return Dropped(reason, pair.task, source, target)
    for _, found in screened:
        _count_masked(found, counts)
    asked = "\0".join((pair.task, pair.to or "", source))
    if corpus.dedup.pairs == "target":
        digest = xxhash.xxh3_128_digest("\0".join((pair.task, pair.to or "", target)).encode())
    elif corpus.dedup.pairs == "source":
        digest = xxhash.xxh3_128_digest(asked.encode())
    else:
        digest = _side_by_side(asked, target)
    by = xxhash.xxh3_64_intdigest(fields[-1].encode())
    split = pair.split
    if split is None and isinstance(origin, CldrSource) and by >= corpus.validation * 2**64:
        split = "train"  # its test rows have values that no other has
    return Cleaned(digest, pair.task, pair.to, split, by, None, source, target, pair.to or "", counts["read"])


def _labelled(pair: Pair, corpus: CorpusSettings, counts: Counter[str]) -> Outcome:
    source, found = _screened(clean(pair.source, corpus.clean), corpus)
    label = pair.target.strip()
    if found and corpus.pii.action == "drop":
        return Dropped("pii", pair.task, source, label)
    reason = reject_labelled(source, label, corpus.pair_filters)
    if reason is not None:
        return Dropped(reason, pair.task, source, label)
    _count_masked(found, counts)
    by = xxhash.xxh3_64_intdigest(source.encode())
    digest = _side_by_side(f"{pair.task}\0{source}", label)
    return Cleaned(digest, pair.task, None, pair.split, by, None, source, label, "", counts["read"])


def _side_by_side(asked: str, answer: str) -> bytes:
    """A hash in whose order all answers to the same stand side by side: for a label to be chosen, and for none to be
    learned where another is held out."""
    return xxhash.xxh3_64_digest(asked.encode()) + xxhash.xxh3_64_digest(answer.encode())


def _screened(text: str, corpus: CorpusSettings) -> tuple[str, dict[str, int]]:
    """The text with personal data masked where that is wanted, and what was found."""
    if corpus.pii.action == "keep":
        return text, {}
    masked, found = mask(text, corpus.pii.kinds)
    return (masked if corpus.pii.action == "mask" else text), found


def _count_masked(found: dict[str, int], counts: Counter[str]) -> None:
    for kind, number in found.items():
        counts[f"masked.{kind}"] += number


def _normalised(text: str) -> str:
    """What copies have in common: case, width and white space do not tell documents apart."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
