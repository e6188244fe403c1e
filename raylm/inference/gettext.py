"""gettext catalogs: their untranslated messages as rows, and the catalog again with the answers in their places.

An answer is marked fuzzy, as a machine's work is to be looked at: gettext's tools show it and do not use it before.
What is translated already, comments, references and obsolete messages stay; the file is written by Babel, which orders
the header's lines its own way, and in UTF-8, as an answer may have letters that the catalog's own encoding lacks.
"""

from __future__ import annotations

import gettext
import io
import re
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raylm.errors import InputError
from raylm.storage import StoragePath, reason

if TYPE_CHECKING:
    from babel.messages.catalog import Catalog, Message

_NO_CHARSET = re.compile(rb"(Content-Type:.*charset=)CHARSET")
"""The header of a catalog in which nobody has said its encoding yet."""
_NUMBERS = 200
"""Numbers of things that are tried out to learn which form says them."""
COLUMNS = pa.schema([("text", pa.string()), ("context", pa.string()), ("form", pa.int32())])
"""What is to be translated, its `msgctxt`, and of a message with plurals the number of the form, which is the
singular at 0."""


def untranslated(place: StoragePath) -> list[dict[str, Any]]:
    """The strings of a catalog that have no translation, in its order, as rows of `COLUMNS`.

    :raises InputError: it is no catalog.
    """
    return [
        {"text": text, "context": message.context, "form": form if message.pluralizable else None}
        for message, form, text in _gaps(_read(place))
    ]


def filled(place: StoragePath, answers: Iterable[str | None]) -> bytes:
    """The catalog with an answer in each place that `untranslated` gave; one without an answer stays empty."""
    from babel.messages.pofile import write_po

    catalog = _read(place)
    for (message, form, _), answer in zip(list(_gaps(catalog)), chain(answers, repeat(None)), strict=False):
        if answer is None:
            continue
        if message.pluralizable:
            forms = list(message.string) + [""] * (catalog.num_plurals - len(message.string))
            forms[form] = answer
            message.string = tuple(forms)
        else:
            message.string = answer
        message.flags.add("fuzzy")
    catalog.charset = "utf-8"
    file = io.BytesIO()
    write_po(file, catalog, width=0)
    return file.getvalue()


def _read(place: StoragePath) -> Catalog:
    from babel.messages.pofile import PoFileError, read_po

    try:
        data = _NO_CHARSET.sub(rb"\1utf-8", place.read_bytes(), count=1)
        return read_po(io.BytesIO(data), abort_invalid=True)
    except OSError as error:
        raise InputError(f"{place}: not readable: {reason(error)}") from error
    except (PoFileError, UnicodeDecodeError, ValueError, LookupError) as error:
        raise InputError(f"{place}: not readable as a gettext catalog: {error}") from error


def _gaps(catalog: Catalog) -> Iterator[tuple[Message, int, str]]:
    """Each string without a translation: its message, the number of its form, and what is to be translated."""
    for message in catalog:
        if not message.id:
            continue  # the header
        if not message.pluralizable:
            if not message.string:
                yield message, 0, message.id
            continue
        singular = _singular_form(catalog)
        for form in range(catalog.num_plurals):
            if form >= len(message.string) or not message.string[form]:
                yield message, form, message.id[0 if form == singular else 1]


def _singular_form(catalog: Catalog) -> int | None:
    """The number of the form for one thing alone; None in a language where that form says other numbers as well."""
    select = gettext.c2py(catalog.plural_expr)
    one = int(select(1))
    return None if any(select(number) == one for number in (0, *range(2, _NUMBERS))) else one
