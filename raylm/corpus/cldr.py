"""Parallel text from English into any language of Unicode CLDR: dates, times, amounts, units, names, lists.

Every word comes from the Unicode Common Locale Data Repository (https://cldr.unicode.org) as Babel carries
it (Babel 2.18 carries CLDR 47; `babel.core.get_cldr_version()` says which one is installed). Nothing is
translated by hand, so `de`, `ja`, `ar` and `zh_Hant` work alike. Spaces and bidirectional marks stay as CLDR
has them.

A row is one to four fragments, joined by the "and" or the "or" list pattern of each language. Rows of the
test split differ from those of the train split by construction:

- values: a fragment with an open value (a date, an amount, …) belongs to the split that the hash of its
  English text says, so a test value is never seen in training, whatever the language or seed;
- combinations: about a tenth of the sets of two or more kinds are seen in test rows only.

A test row has test values only; where it has no open value at all, its combination is a test-only one.
English lists stay unambiguous (no fragment holds " and " or " or ", none in a list of three or more holds a
comma, no two names are spelt alike), hence no English source is in both splits.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from babel import Locale, UnknownLocaleError

from raylm.corpus.cldr_kinds import ENGLISH, KINDS, LOCALES, TERRITORIES, join
from raylm.errors import nearest

Split = Literal["train", "test"]

TEST_ROW_PERCENT = 11  # of the rows that are no roll call: about 10 % of all
TEST_VALUE_PERCENT = 20
TEST_COMBINATION_PERCENT = 10
ROLL_CALL_EVERY = 8  # every 8th row is one name, taken in turn, so that a training set knows all of them
FRAGMENTS = {1: 30, 2: 44, 3: 22, 4: 4}  # how many -> weight
MAX_SOURCE_CHARS = 200
MIN_TERRITORIES = 100  # CLDR locales with fewer named territories are skeletons

# A text that counts none, one or two of something is always train: it alone shows a singular or a dual.
_FEW = re.compile(r"(in )?[012]\s")
_JOINED = re.compile(r" and | or ")


@dataclass(frozen=True)
class CldrPair:
    """One row: `source` in English, `target` in the other language, the kinds it is composed of, in order."""

    source: str
    target: str
    kinds: tuple[str, ...]
    split: Split


# ---- what one language can say -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vocabulary:
    """The kinds that a locale has data for, and for each kind its words, with cumulated weights."""

    locale: Locale
    words: dict[str, tuple[list[Any], list[int]]]
    kinds: tuple[list[str], list[int]]
    kinds_without_comma: tuple[list[str], list[int]]
    roll_call: list[tuple[str, Any]]


def check_language(to: str) -> None:
    """Nothing, if pairs from English into `to` can be made.

    :raises ValueError: if CLDR has no locale `to`, or only a skeleton of one, or `to` is English itself.
    """
    _vocabulary(to)


@functools.lru_cache(maxsize=64)
def _vocabulary(to: str) -> _Vocabulary:
    locale = _locale(to)
    words: dict[str, tuple[list[Any], list[int]]] = {}
    taken: set[str] = set()  # an English text has one kind: "3 dots" is long and short, and written once
    for name, kind in KINDS.items():
        rng = Random(0)
        samples = [kind.draw(rng) for _ in range(8)] if kind.draw else [None]
        known = {}
        for word, weight in (kind.words or {None: 1}).items():
            english = kind.text(ENGLISH, word, samples[0])
            known_here = any(kind.text(locale, word, sample) for sample in samples)
            if known_here and english and english != word and english not in taken:
                taken.add(english)
                known[word] = weight
        if known:
            words[name] = list(known), list(itertools.accumulate(known.values()))
    kinds = {name: KINDS[name].weight for name in words}
    plain = {name: weight for name, weight in kinds.items() if not KINDS[name].comma}
    shown = {"currency_name", "unit_long", "unit_short"}  # the plural of a currency is in none of the names
    named = [name for name in kinds if not KINDS[name].draw or name in shown]
    return _Vocabulary(
        locale,
        words,
        (list(kinds), list(itertools.accumulate(kinds.values()))),
        (list(plain), list(itertools.accumulate(plain.values()))),
        sorted(((name, word) for name in named for word in words[name][0]), key=lambda entry: _hash(*entry)),
    )


def _locale(to: str) -> Locale:
    names = {name.lower(): code for code, name in ENGLISH.languages.items() if code in LOCALES and code != "en"}
    codes = {code.lower(): code for code in LOCALES if not code.startswith("en")}
    near = nearest(to.lower().replace("-", "_"), [*codes, *names])
    hint = f"; did you mean {(codes | names)[near]!r}?" if near else '; examples are "de", "pt_BR" and "zh_Hant"'
    try:
        locale = Locale.parse(to.replace("-", "_"))
    except (UnknownLocaleError, ValueError, TypeError) as error:
        raise ValueError(f"no CLDR data for the language {to!r}{hint}") from error
    if locale.language == "en":
        raise ValueError(f"the source is English already, so {to!r} makes no pairs; name another language, as 'de'")
    named = sum(code in locale.territories for code in TERRITORIES)
    if named < MIN_TERRITORIES:
        raise ValueError(
            f"CLDR has only a skeleton for {to!r} ({named} named territories, {MIN_TERRITORIES} are needed); "
            "take a better described language, such as 'de' or 'sw'"
        )
    return locale


# ---- the split, and one row --------------------------------------------------------------------------------


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def is_test_value(english: str) -> bool:
    """Whether the English text of a fragment with an open value belongs to test rows."""
    return not _FEW.match(english) and _hash("value", english) % 100 < TEST_VALUE_PERCENT


def is_test_combination(kinds: Sequence[str]) -> bool:
    """Whether two or more kinds, in whatever order, occur together in test rows only."""
    return len(kinds) > 1 and _hash("combination", *sorted(kinds)) % 100 < TEST_COMBINATION_PERCENT


def pair(to: str, seed: int, index: int) -> CldrPair:
    """Row `index`, a function of nothing but its arguments and the CLDR version.

    :param to: a CLDR locale, as `de`, `pt-BR` or `zh_Hant`.
    :param seed: another seed gives other rows; values and combinations keep their split.
    :raises ValueError: as `check_language` does.
    """
    vocabulary = _vocabulary(to)
    rng = Random(_hash("row", str(vocabulary.locale), seed, index))
    if index % ROLL_CALL_EVERY == 0:
        kind, word = vocabulary.roll_call[index // ROLL_CALL_EVERY % len(vocabulary.roll_call)]
        return CldrPair(*_fragment(vocabulary, kind, "train", (), rng, word), (kind,), "train")
    split: Split = "test" if _hash("split", seed, index) % 100 < TEST_ROW_PERCENT else "train"
    while True:
        kinds = _combination(vocabulary, split, rng)
        fragments: list[tuple[str, str]] = []
        for kind in kinds:
            fragments.append(_fragment(vocabulary, kind, split, [english for english, _ in fragments], rng))
        style: Literal["standard", "or"] = "or" if rng.random() < 0.25 else "standard"
        source = join([english for english, _ in fragments], style, ENGLISH)
        if len(source) <= MAX_SOURCE_CHARS:
            target = join([text for _, text in fragments], style, vocabulary.locale)
            return CldrPair(source, target, kinds, split)


def pairs(to: str, seed: int, start: int, stop: int) -> Iterator[CldrPair]:
    """Rows `start` up to but not including `stop`, each as `pair` gives it."""
    return (pair(to, seed, index) for index in range(start, stop))


def _combination(vocabulary: _Vocabulary, split: Split, rng: Random) -> tuple[str, ...]:
    """The kinds of one row. Half of the test rows have a test-only combination; no train row has one."""
    wants_new = split == "test" and rng.random() < 0.5
    while True:
        (count,) = rng.choices(list(FRAGMENTS), list(FRAGMENTS.values()))
        names, weights = vocabulary.kinds if count < 3 else vocabulary.kinds_without_comma
        kinds = tuple(rng.choices(names, cum_weights=weights, k=count))
        if rng.random() < 0.25:
            kinds = (kinds[0],) * count  # "Japan, Chile, and Kenya"
        new = is_test_combination(kinds)
        if new == wants_new and (split == "train" or new or any(KINDS[k].draw for k in kinds)):
            return kinds


def _fragment(
    vocabulary: _Vocabulary, name: str, split: Split, others: Sequence[str], rng: Random, word: Any = None
) -> tuple[str, str]:
    """English and target text of one kind: the word given or else drawn, with an open value of the split."""
    kind, (words, weights) = KINDS[name], vocabulary.words[name]
    for _ in range(10_000):
        chosen = word if word is not None else rng.choices(words, cum_weights=weights)[0]
        value = kind.draw(rng) if kind.draw else None
        english = kind.text(ENGLISH, chosen, value)
        if english in others or _JOINED.search(english) or (not kind.comma and ", " in english):
            continue
        if kind.draw and is_test_value(english) != (split == "test"):
            continue
        text = kind.text(vocabulary.locale, chosen, value)
        if english and text:
            return english, text
    raise RuntimeError(f"no {split} value of {name!r} found for {vocabulary.locale}")
