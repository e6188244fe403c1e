"""Quality rules: which documents and pairs to keep, and for the others a reason that can be counted.

The rules are those that hold for every script. Gopher is Rae et al. 2021 (https://arxiv.org/abs/2112.11446,
table A1), C4 is Raffel et al. 2020 (https://jmlr.org/papers/v21/20-074.html). Left out on purpose: C4's "a
line ends in . ! ? or a quote", Gopher's stop words and both papers' word counts: they drop all Chinese prose.
"""

import re
import unicodedata
import zlib
from collections import Counter

from raylm.settings import FilterSettings, PairFilterSettings

# Scripts written without spaces: Thai, Lao, Myanmar, Khmer; kana, ideographs and their punctuation.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u31ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003ffff]+"
)
_MIN_COMPRESSED_CHARS = 500  # what is shorter hardly compresses, whatever it says

# English documentation has 2.9 characters for each one of its Chinese translation, which is part Latin.
# With 2.5 for an ideograph the median pair has a ratio of 1.3, and 99.8 % of pairs lie between 0.66 and 2.5.
_WIDE = re.compile("[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\uff00-\uff60\U00020000-\U0003ffff]")
_WIDE_LETTERS = 2.5
_SHORT_WIDTH = 20.0


def reject_document(text: str, rules: FilterSettings) -> str | None:
    """None for a document worth keeping, otherwise the first reason against it.

    Reasons: ``too_short``, ``too_long``, ``few_letters``, ``many_digits``, ``long_words``,
    ``repeated_lines``, ``repetitive``.
    """
    width = _width(text)
    if width < rules.min_chars:
        return "too_short"
    if len(text) > rules.max_chars:
        return "too_long"
    letters, digits, visible = _composition(text)
    if letters < rules.min_letter_ratio * visible or visible == 0:
        return "few_letters"
    if digits > rules.max_digit_ratio * visible:
        return "many_digits"
    words = _UNSPACED.sub(" ", text).split()
    spaced = sum(map(len, words))  # the Latin words of a Chinese page are URLs and file names
    if spaced > width / 2 and spaced > rules.max_mean_word_chars * len(words):
        return "long_words"
    if _repeats_lines(text, rules):
        return "repeated_lines"
    if len(text) >= _MIN_COMPRESSED_CHARS:
        raw = text.encode("utf-8", "replace")
        if len(raw) > rules.max_compression * len(zlib.compress(raw, 1)):
            return "repetitive"
    return None


def reject_pair(source: str, target: str, rules: PairFilterSettings, compare_lengths: bool = True) -> str | None:
    """None for a pair worth keeping, otherwise the first reason against it.

    ``compare_lengths`` is for translations; a summary is meant to be shorter than its document.

    Reasons: ``empty_source``, ``empty_target`` (under ``min_chars``, if that is not 1), ``too_long``,
    ``length_ratio``.
    """
    source, target = source.strip(), target.strip()
    if len(source) < max(1, rules.min_chars):
        return "empty_source"
    if len(target) < max(1, rules.min_chars):
        return "empty_target"
    if max(len(source), len(target)) > rules.max_chars:
        return "too_long"
    shorter, longer = sorted((_width(source), _width(target)))
    if compare_lengths and longer > _SHORT_WIDTH and longer > rules.max_length_ratio * shorter:
        return "length_ratio"
    return None


def _composition(text: str) -> tuple[int, int, int]:
    """Letters, digits and non-space characters in ``text``.

    Marks count as letters: a third of written Hindi is vowel signs.
    """
    letters = digits = visible = 0
    for character, count in Counter(text).items():  # distinct characters are few, text is long
        if character.isspace():
            continue
        visible += count
        category = unicodedata.category(character)
        if category[0] in "LM":
            letters += count
        elif category[0] == "N":
            digits += count
    return letters, digits, visible


def _repeats_lines(text: str, rules: FilterSettings) -> bool:
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    distinct = set(lines)
    repeated = len(lines) - len(distinct)
    if repeated > rules.max_duplicate_line_ratio * len(lines):
        return True
    chars = sum(map(len, lines))
    return chars - sum(map(len, distinct)) > rules.max_duplicate_line_char_ratio * chars


def _width(text: str) -> float:
    """Length in letter widths, which compares English with Chinese."""
    return len(text) + (_WIDE_LETTERS - 1) * len(_WIDE.findall(text))
