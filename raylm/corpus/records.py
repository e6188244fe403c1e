"""What a source gives, row by row: a document, a labelled pair, or a row that could not be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Document:
    """Monolingual text. `split` None: a hash of the content decides."""

    text: str
    split: Split | None = None
    position: int = 0
    """Where in its file it stands: a row's number, or the byte at which a line or block begins."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What a task gets and what it should answer. `split` None: a hash decides, of the context or else the source."""

    task: str
    to: str | None
    source: str
    target: str
    split: Split | None = None
    context: str | None = None
    """What the source is a question about: all questions about it are learned, or none is."""
    with_document: bool = False
    """The source is part of the document that comes next, which must not reach training where the pair may not."""
    position: int = 0


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that could not be read or cleaned: it goes to the dead letter, and costs nothing but itself."""

    error: str
    """What is wrong and what would be right, for a person."""
    position: int = 0
    excerpt: str = ""
    """The beginning of what was found."""
    stage: Literal["read", "clean"] = "read"
    file: str | None = None
    """Where the unit has more than one file."""


Record = Document | Pair | Rejected
