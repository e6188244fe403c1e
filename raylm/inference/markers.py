"""What a program fills in or reads in a text, and a translation has to keep: placeholders, tags, addresses.

A model that has seen them in training mostly copies them. Where one is lost or changed, the words around it are
translated apart and put together with the very signs of the source.
"""

from __future__ import annotations

import re
from collections import Counter

from raylm.sentences import Segments, split_text

_MARKER = re.compile(
    # Addresses; a full stop or a bracket that ends the sentence is none of theirs.
    r"(?:https?|ftp|file)://[^\s<>\"']*[\w/#=&%~+$-]"
    r"|(?<![\w.+-])[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+"
    # Tags, comments and entities of HTML and XML.
    r"|</?[A-Za-z][\w:.-]*(?:\s+[^<>]*)?/?>|<!--.{0,2000}?-->"
    r"|&(?:[A-Za-z]\w{1,30}|\#\d{1,7}|\#[xX][0-9A-Fa-f]{1,6});"
    # printf, Python, Objective-C and Qt; a percent sign after a digit is a percentage.
    r"|%%"
    r"|(?<!\d)%\(\w+\)[-+#0]*[\d.]*[a-zA-Z]"
    r"|(?<!\d)%(?:\d+\$)?[-+#0']*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh|h|ll|l|L|q|j|z|t)?"
    r"(?:[ds]|[iouxXeEfFgGcp@](?![^\W\d_]{2}))"
    r"|(?<!\d)%L?[1-9]\d?(?![\d%$]|[.,]\d)"
    r"|%[A-Z][A-Z0-9_]{2,}%?"
    # Shells and templates.
    r"|%\{\w+\}|\$\([\w.]+\)|\$\{[^{}]*\}|\$\[[\w.]+\]"
)
_OPENS = re.compile(r"\{(?=\s*(?:[A-Za-z_#][\w.\[\]-]*|\d*)\s*(?:[},:!]|\}))")
"""How a field of str.format, ICU or a template begins: `{name}`, `{0:>8}`, `{n, plural, …}`."""
_OPENERS = " \t\n\u00a0\"'“„«(["
_BRACE = re.compile("[{}]")
_SIGNS = "%{$<&@:"


def markers(text: str) -> list[tuple[int, int]]:
    """Where the markers of a text stand, in order, none within another."""
    if not any(sign in text for sign in _SIGNS):
        return []
    closed = _closed_braces(text)
    found = [match.span() for match in _MARKER.finditer(text)]
    found += [(match.start(), closed[match.start()]) for match in _OPENS.finditer(text) if match.start() in closed]
    spans: list[tuple[int, int]] = []
    for start, stop in sorted(found):
        if not spans or start >= spans[-1][1]:
            spans.append((start, stop))
    return spans


def _closed_braces(text: str) -> dict[int, int]:
    """Where each brace that is closed opens, and the place behind the one that closes it."""
    open_, closed = [], {}
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            open_.append(brace.start())
        elif open_:
            closed[open_.pop()] = brace.end()
    return closed


def are_kept(source: str, output: str) -> bool:
    """Whether an output has each marker of its source as often as that, to the letter."""
    wanted = Counter(source[start:stop] for start, stop in markers(source))
    # Its signs may stand in other words as well: `%s` in `50%s`.
    return all(count <= output.count(marker) <= source.count(marker) for marker, count in wanted.items())


def split_keeping_markers(text: str) -> Segments:
    """`split_text`, but a sentence does not end within a marker, as in `{n, plural, one {One file. } …}`."""
    segments = split_text(text)
    spans = markers(text)
    if not spans or len(segments.sentences) < 2:
        return segments
    sentences, separators = [segments.sentences[0]], [segments.separators[0]]
    place = len(separators[0]) + len(sentences[0])
    for gap, sentence in zip(segments.separators[1:], segments.sentences[1:], strict=False):
        following = place + len(gap)
        if any(start < following and place < stop for start, stop in spans):
            sentences[-1] += gap + sentence
        else:
            separators.append(gap)
            sentences.append(sentence)
        place = following + len(sentence)
    return Segments(tuple(sentences), (*separators, segments.separators[-1]))


def around_markers(text: str) -> Segments:
    """The words between the markers of a text; markers, and what has no letter or digit, are separators."""
    pieces, separators, end = [], [], 0
    place = 0
    for start, stop in [*markers(text), (len(text), len(text))]:
        piece = text[place:start]
        if any(sign.isalnum() for sign in piece):
            first = place + next(number for number, sign in enumerate(piece) if sign.isalnum())
            last = place + len(piece.rstrip(_OPENERS))
            separators.append(text[end:first])
            pieces.append(text[first:last])
            end = last
        place = stop
    return Segments(tuple(pieces), (*separators, text[end:]))
