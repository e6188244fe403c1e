"""A text for translation, parted into single sentences and put together again without losing a character."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raylm.language import IDEOGRAPHS, KANA

# Everything that `str.splitlines` takes for a line end, but for the control characters 1c-1e, which are data.
_LINE_END = re.compile(r"[\n\r\v\f\x85\u2028\u2029]+")
_BULLET = re.compile(r"(?:[-*+•‣◦▪>#]+|[-–—])[ \t]+")
# A stop with its closing signs, then white space (Latin and most scripts), or nothing (Chinese, Japanese; these are
# written with `!`, `?` and `．` too).
_IDEOGRAPHS = KANA + IDEOGRAPHS
_STOP = re.compile(
    r"(?<![.!?…])(?P<stop>[.!?…؟۔।]+)[\"'”’»›)\]}*_]*(?P<gap>[ \t\u00a0\u2000-\u200a\u202f\u3000]+)"
    rf"|(?:[。！？｡]|(?<=[{_IDEOGRAPHS}])(?:[!?]+(?=[\"”’」』）]*[{_IDEOGRAPHS}])|．(?![0-9０-９])))[。！？｡!?．]*"
    r"[”’」』）】》〉]*(?P<gap_cjk>[ \t\u3000]*)"
)
_OPENERS = "\"'“‘«‹([{¿¡*_-–— `"
_LAST_WORD = re.compile(r"[^\s\"'“‘«(\[{/]+$")
_INNER_STOPS = re.compile(r"(?:[^\W\d_]{1,3}\.)+[^\W\d_]{1,3}")
_CONTEXT = 40  # signs looked at on either side of a stop: keeps the work linear in the length of a line

# Words whose stop does not end a sentence: titles, and what is followed by its own noun or number.
_ABBREVIATIONS = frozenset(
    (  # noqa: SIM905 - as a list it would take a page
        "mr mrs ms dr prof rev hon st capt lt sgt mt ft vs cf al approx resp incl excl esp viz ie eg "
        "fig figs eq eqs sec secs nr vol vols pp ed eds dept univ "
        "jan feb mar apr jun jul aug sep sept oct nov dec "
        "bzw usw ggf evtl bspw vgl abb kap mme mlle núm pág sra e.g i.e z.b d.h u.a o.ä p.ej"
    ).split()
)
_COMPANIES = frozenset({"inc", "ltd", "corp", "bros", "jr"})
# Words that begin a sentence and no name: with them, what may be an abbreviation ends one (`in the U.S. It is`).
_BEGINNERS = frozenset(
    (  # noqa: SIM905
        "The This That These Those It Its He She They We You There Here Then But However If When While "
        "Er Sie Es Wir Der Die Das Dies Diese Dieser Aber Wenn Il Elle Ils Elles Nous Le Les El Los Ella Pero"
    ).split()
)
_BEFORE_NUMBERS = frozenset({"no", "nos", "p", "ch", "chap", "art", "par", "ref", "tab", "col", "ver"})


@dataclass(frozen=True)
class Segments:
    """Sentences, and what stood before, between and after them: one separator more than sentences."""

    sentences: tuple[str, ...]
    separators: tuple[str, ...]

    def join(self, sentences: Sequence[str]) -> str:
        """The text with other sentences in the places of its own; with its own ones, the text itself.

        Chinese and Japanese put nothing between sentences; a language with spaces gets one there.
        """
        parts = [self.separators[0]]
        for own, sentence, separator in zip(self.sentences, sentences, self.separators[1:], strict=True):
            parts += [sentence, separator]
            if not separator and sentence != own and sentence and sentence[-1].isascii():
                parts.append(" ")
        return "".join(parts[:-1] if parts[-1] == " " and not self.separators[-1] else parts)


def split_text(text: str) -> Segments:
    """The sentences of a text, without the white space around them, and the separators.

    Line ends always part. A piece without letter or digit (a ruler, a lone bullet) is part of a separator.
    """
    sentences: list[str] = []
    separators: list[str] = []
    end = 0
    for start, stop in _pieces(text):
        piece = text[start:stop]
        bullet = _BULLET.match(piece, len(piece) - len(piece.lstrip()))
        start += bullet.end() if bullet else len(piece) - len(piece.lstrip())
        stop -= len(piece) - len(piece.rstrip())
        if start < stop and any(sign.isalnum() for sign in text[start:stop]):
            start += len(text[start:stop]) - len(text[start:stop].lstrip())
            separators.append(text[end:start])
            sentences.append(text[start:stop])
            end = stop
    return Segments(tuple(sentences), (*separators, text[end:]))


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Where each sentence stands, line by line."""
    start = 0
    for line_end in _LINE_END.finditer(text):
        yield from _sentences(text, start, line_end.start())
        start = line_end.end()
    yield from _sentences(text, start, len(text))


def _sentences(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    first = counted = start
    quotes = 0
    for match in _STOP.finditer(text, start, stop):
        end = match.end()
        if end < stop and _ends_sentence(text, match, first, stop):
            if (
                match["stop"] is None and text[end] == '"'
            ):  # it closes if one is open: `他说:"好。"` then, `好。"他` now
                quotes += text.count('"', counted, end)
                counted = end
                end += quotes % 2
            yield start, end
            start = end
    if start < stop:
        yield start, stop


def _ends_sentence(text: str, match: re.Match[str], line_start: int, line_stop: int) -> bool:
    """Whether a stop with white space behind it ends a sentence; where in doubt it does not."""
    if match["stop"] is None:
        return True
    following = text[match.end() : min(line_stop, match.end() + _CONTEXT)].lstrip(_OPENERS)
    if not following or following[0].islower() or following[0] in ",;:.!?%)":
        return False
    if match["stop"] != ".":
        return True
    if match.start() > line_start and text[match.start() - 1].isspace():
        return False  # a lone full stop, as in `.NET` or `. . .`
    before = text[max(line_start, match.start() - _CONTEXT) : match.start()]
    word_match = _LAST_WORD.search(before)
    word = word_match.group() if word_match else ""
    begins = following.partition(" ")[0] in _BEGINNERS
    if word.isdigit() and len(word) <= 2:
        return (
            begins and len(before.split()) > 3
        )  # not an ordinal or an item's number: `3. Oktober`, `1. Open the file`
    initial = len(word) == 1 and word.isalpha() and (word.isupper() or following[1:2] == ".")
    if initial or word.lower() in _COMPANIES:
        return begins  # not `J. Smith`, `z. B.`, `Acme Inc. Ohio`
    if following[0].isdigit() and word.lower() in _BEFORE_NUMBERS:
        return False
    return word.lower() not in _ABBREVIATIONS and (begins or not _INNER_STOPS.fullmatch(word))
