"""Pairs from CLDR: a pure function of their arguments, in two splits that share no value and no source."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from babel import Locale, lists

from raylm.corpus import cldr
from raylm.corpus.cldr import CldrPair, check_language, is_test_combination, is_test_value, pair, pairs
from raylm.corpus.cldr_kinds import KINDS, join

LANGUAGES = ("de", "fr", "es", "zh", "ja", "ru", "ar", "hi", "sw", "pt-BR", "zh_Hant", "he")
WORD = re.compile(r"[^\W\d_]+")


@pytest.fixture(scope="module")
def german() -> list[CldrPair]:
    return list(pairs("de", 0, 0, 20_000))


def of_split(rows: list[CldrPair], split: str) -> list[CldrPair]:
    return [row for row in rows if row.split == split]


def open_fragments(row: CldrPair) -> list[tuple[str, str]]:
    """(kind, English text) of the open values of a row of one or of two fragments."""
    texts = [row.source] if len(row.kinds) == 1 else re.split(" and | or ", row.source)
    assert len(texts) == len(row.kinds)
    return [(kind, text) for kind, text in zip(row.kinds, texts, strict=True) if KINDS[kind].draw]


def test_the_same_row_in_a_process_with_another_hash_seed() -> None:
    script = (
        "from raylm.corpus.cldr import pairs\n"
        "print(*(ascii(row) for to in ('de', 'ar') for row in pairs(to, 5, 0, 200)), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "LANG": "fr_FR.UTF-8", "LC_ALL": "fr_FR.UTF-8"}
    other = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    here = [ascii(row) for to in ("de", "ar") for row in pairs(to, 5, 0, 200)]
    assert other.stdout.splitlines() == here


def test_a_row_depends_on_its_language_seed_and_index_only() -> None:
    rows = list(pairs("fr", 3, 100, 160))
    assert [pair("fr", 3, index) for index in reversed(range(100, 160))] == rows[::-1]
    assert list(pairs("fr", 4, 100, 160)) != rows
    assert list(pairs("fr", 3, 101, 161)) != rows


@pytest.mark.parametrize("to", LANGUAGES)
def test_both_sides_have_text_without_raw_codes(to: str) -> None:
    rows = list(pairs(to, 1, 0, 1500))
    assert all(row.source.strip() and row.target.strip() for row in rows)
    assert max(len(row.source) for row in rows) <= cldr.MAX_SOURCE_CHARS
    raw = re.compile(r"(duration|length|mass|volume|area|digital|concentr|pressure)-[a-z]|\{\d|\bM\d\d\b|None")
    assert not [row for row in rows if raw.search(row.source) or raw.search(row.target)]
    assert sum(row.source == row.target for row in rows) < 0.1 * len(rows)  # rare names
    assert {kind for row in rows for kind in row.kinds} >= set(KINDS) - {"scientific", "time_interval"}


@pytest.mark.parametrize("to", LANGUAGES)
def test_every_fragment_appears_once_in_the_target_list(to: str) -> None:
    locale = cldr._locale(to)
    for style in ("standard", "or", "unit"):
        for count in (1, 2, 3, 4):
            parts = [f"<{letter}>" for letter in "abcd"[:count]]
            text = join(parts, style, locale)
            assert sorted(re.findall("<.>", text)) == parts


def test_lists_are_those_of_babel_where_a_locale_states_the_whole_style() -> None:
    for to in ("en", "de", "ja"):
        for count in (2, 3, 4):
            parts = list("wxyz")[:count]
            assert join(parts, "or", Locale(to)) == lists.format_list(parts, "or", locale=to)


def test_no_source_is_in_both_splits(german: list[CldrPair]) -> None:
    train, test = of_split(german, "train"), of_split(german, "test")
    assert 0.08 < len(test) / len(german) < 0.12
    assert not {row.source for row in train} & {row.source for row in test}
    for to in ("fr", "zh"):  # the split of a text holds for all languages and seeds
        others = of_split(list(pairs(to, 9, 0, 3000)), "test")
        assert not {row.source for row in train} & {row.source for row in others}


def test_open_values_of_the_test_split_are_never_in_train(german: list[CldrPair]) -> None:
    short = [row for row in german if len(row.kinds) <= 2]
    train = {item for row in of_split(short, "train") for item in open_fragments(row)}
    test = {item for row in of_split(short, "test") for item in open_fragments(row)}
    assert len(test) > 1000
    assert not train & test
    assert not any(is_test_value(text) for _, text in train)
    assert all(is_test_value(text) for _, text in test)


def test_a_tenth_of_the_combinations_is_test_only(german: list[CldrPair]) -> None:
    assert not any(is_test_combination(row.kinds) for row in of_split(german, "train"))
    test = of_split(german, "test")
    assert 0.3 < sum(is_test_combination(row.kinds) for row in test) / len(test) < 0.7
    closed = [row for row in test if not any(KINDS[kind].draw for kind in row.kinds)]
    assert closed and all(is_test_combination(row.kinds) for row in closed)
    names = list(KINDS)
    two = [(a, b) for i, a in enumerate(names) for b in names[i:]]
    assert 0.05 < sum(map(is_test_combination, two)) / len(two) < 0.15
    assert all(is_test_combination((a, b)) == is_test_combination((b, a)) for a, b in two)
    assert not any(is_test_combination((name,)) for name in names)


def test_lists_of_three_can_be_taken_apart(german: list[CldrPair]) -> None:
    for row in german:
        if len(row.kinds) > 2:
            assert len(re.split(", and |, or |, ", row.source)) == len(row.kinds)
        else:
            assert len(re.split(" and | or ", row.source)) == len(row.kinds)


def test_words_of_the_test_split_are_seen_in_train(german: list[CldrPair]) -> None:
    for side in ("source", "target"):
        train = {word for row in of_split(german, "train") for word in WORD.findall(getattr(row, side))}
        test = {word for row in of_split(german, "test") for word in WORD.findall(getattr(row, side))}
        assert len(test) > 500
        assert not test - train
    called = {row.source for row in german[:: cldr.ROLL_CALL_EVERY]}
    assert {"Japan", "Swiss German", "November", "Friday", "Norwegian Krone", "kilometers"} <= called


def test_no_kind_dominates_and_all_are_there(german: list[CldrPair]) -> None:
    counts = Counter(kind for row in german for kind in row.kinds)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) < 0.12 * counts.total()


def test_values_are_localised(german: list[CldrPair]) -> None:
    kind = KINDS["currency_name"]
    assert kind.text(Locale("de"), "CHF", 5) == "5 Schweizer Franken"
    assert [kind.text(Locale("ru"), "CHF", n) for n in (1, 3, 5)] == [
        "1 швейцарский франк",
        "3 швейцарских франка",
        "5 швейцарских франков",
    ]
    assert KINDS["unit_long"].text(Locale("zh"), "length-kilometer", 12) == "12公里"
    assert KINDS["territory"].text(Locale("de"), "XX", None) == ""


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("gemran", "no CLDR data for the language 'gemran'"),
        ("german", "did you mean 'de'"),
        ("pt-B", "did you mean 'pt_"),
        ("", "no CLDR data"),
        ("en", "English already"),
        ("en_GB", "English already"),
        ("raj", "skeleton"),
    ],
)
def test_a_language_without_data_is_refused(to: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_language(to)
    with pytest.raises(ValueError, match=message):
        pair(to, 0, 0)


def test_the_spelling_of_a_locale_does_not_matter() -> None:
    check_language("pt_BR")
    assert list(pairs("pt-BR", 0, 0, 40)) == list(pairs("pt_BR", 0, 0, 40))
