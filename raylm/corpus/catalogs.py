"""The translated messages of gettext catalogs; a malformed one costs itself alone."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator

from babel.messages.catalog import Catalog
from babel.messages.mofile import read_mo
from babel.messages.pofile import PoFileError, read_po

from raylm.corpus.readers import BOM, Row, damage_named, excerpt, opened, uncompressed_name
from raylm.corpus.records import Rejected
from raylm.errors import InputError
from raylm.storage import StoragePath

_CHARSET = re.compile(rb"charset=([\w.:-]+)", re.IGNORECASE)
_PO_LINE = re.compile(r'\s*(?:#.*|(?:msg(?:ctxt|id|id_plural|str(?:\[\d\])?)\s*)?"(?:[^"\\]|\\.)*")?\s*')
# In front of a message alone: the head of its catalog says how many plural forms there are.
_ANY_PLURALS = 'msgid ""\nmsgstr "Plural-Forms: nplurals=6; plural=0;\\n"\n\n'


def gettext_rows(file: StoragePath) -> Iterator[Row | Rejected]:
    """Source and target of the translated messages of a `.po` or `.mo` catalog; of plurals, both forms.

    The position is the line, or the number of the message in a `.mo` file.

    :raises InputError: a `.mo` file is damaged. In a `.po` file a malformed message costs itself alone.
    """
    with damage_named(file, "gettext"), opened(file) as stream:
        data = stream.read()
    if uncompressed_name(file).endswith(".mo"):
        try:
            catalog = read_mo(io.BytesIO(data))
        except (OSError, ValueError, LookupError, struct.error) as error:
            raise InputError(f"{file}: not readable as a gettext catalog: {error}") from error
        yield from _messages(catalog)
        return
    data = data.removeprefix(BOM)
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
            raise ValueError(f"{excerpt(line)!r} is neither a comment nor a keyword with a quoted string")
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
                yield Rejected(f"not a gettext message: {error}", line, excerpt(part))
        line += part.count(b"\n")
