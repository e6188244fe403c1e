"""Placeholders, tags and addresses are found, and no text loses a character on its way through pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.inference.markers import are_kept, around_markers, markers, split_keeping_markers

_PIECES = ["%s", "%1$d", "{name}", "{0:>8}", "{n, plural, one {a. B} other {c}}", "<b>", "</b>", "&amp;", "https://a.b/c",
           "Word", "two words. Third", "，中文。", " ", "\n", "%", "{", "}", "<", "«", "'", ".", "3 %"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Could not open '%s': %m", ["%s"]),
        ("%1$s of %2$'d, %-5.2f and %%", ["%1$s", "%2$'d", "%-5.2f", "%%"]),
        ("%(count)d files, %@, %1 and %L2, %PRODUCTNAME", ["%(count)d", "%@", "%1", "%L2", "%PRODUCTNAME"]),
        ("100% of 50%s", []),
        ("{} {0} {name!r:>8} ${HOME} $(ARG1) %{x}", ["{}", "{0}", "{name!r:>8}", "${HOME}", "$(ARG1)", "%{x}"]),
        ("{n, plural, one {One file. Two} other {# files}} left", ["{n, plural, one {One file. Two} other {# files}}"]),
        ("a {set of words} and { unclosed", []),
        ('<a href="x">here</a>&nbsp;&#160;<br/> x < y', ['<a href="x">', "</a>", "&nbsp;", "&#160;", "<br/>"]),
        ("See https://a.b/c?d=e. Or (http://x.y). me@x.org!", ["https://a.b/c?d=e", "http://x.y", "me@x.org"]),
        ("Nothing to see: here & there", []),
    ],
)
def test_markers_are_found(text: str, expected: list[str]) -> None:
    assert [text[start:stop] for start, stop in markers(text)] == expected


def test_markers_are_kept_to_the_letter_and_as_often() -> None:
    assert are_kept("Open %s in %s", "In %s %s öffnen")
    assert not are_kept("Open %s in %s", "In %s öffnen")
    assert not are_kept("{name}", "{Name}") and not are_kept("<b>x</b>", "<b>x</ b>")
    assert are_kept("Nothing", "100 %s and {name}"), "what a model adds by itself is another matter"


@given(st.lists(st.sampled_from(_PIECES), max_size=12).map("".join))
def test_no_character_is_lost(text: str) -> None:
    for segments in (split_keeping_markers(text), around_markers(text)):
        assert segments.join(segments.sentences) == text


@given(st.lists(st.sampled_from(_PIECES), max_size=12).map("".join))
def test_whatever_the_words_become_the_markers_stay(text: str) -> None:
    segments = around_markers(text)
    assert are_kept(text, segments.join(["wort"] * len(segments.sentences)))


@given(st.lists(st.sampled_from(_PIECES), max_size=12).map("".join))
def test_a_sentence_never_ends_within_a_marker(text: str) -> None:
    segments = split_keeping_markers(text)
    found = sum(len(markers(sentence)) for sentence in segments.sentences)
    between = sum(len(markers(separator)) for separator in segments.separators)
    assert found + between >= len(markers(text))
