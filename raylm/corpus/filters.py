"""Quality rules for documents: which to keep, and for the others a reason that can be counted.

Gopher is Rae et al. 2021 (https://arxiv.org/abs/2112.11446, table A1), C4 is Raffel et al. 2020
(https://jmlr.org/papers/v21/20-074.html). Left out on purpose: C4's "a line ends in . ! ? or a quote" and both papers'
word counts, which drop all Chinese prose. Rules about words or case look at texts that are mostly in scripts that have
them.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from raylm.corpus.stopwords import STOP_WORDS
from raylm.language import WIDE_LETTERS, identify, primary, same_language
from raylm.settings import FilterSettings

# Scripts written without spaces: Thai, Lao, Myanmar, Khmer; kana, ideographs and their punctuation.
_UNSPACED_SIGNS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fff\u3001-\u31ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003347f"
)
_UNSPACED = re.compile(f"[{_UNSPACED_SIGNS}]")
_WORDS_AND_SIGNS = re.compile(f"[{_UNSPACED_SIGNS}]|[^\\s{_UNSPACED_SIGNS}]+")
_WIDE = re.compile("[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\uff00-\uff60\U00020000-\U0003347f]")

_BULLETS = frozenset("*-+–—•·‣⁃▪▫■□●○◦・")  # before a space
_ELLIPSES = ("...", "…", "。。。")
_LOREM_IPSUM = ("lorem ipsum", "Lorem ipsum", "Lorem Ipsum", "LOREM IPSUM")
_MIN_COMPRESSED_CHARS = 500  # what is shorter hardly compresses, whatever it says
_MIN_WORDS = 50  # Gopher's shortest document: in fewer words one repeated phrase is a large share
_SIGNS_PER_WORD = 2.5  # English documentation has 6 letter widths for a word, an ideograph 2.5

# Gopher, table A1: the largest share of characters in the most frequent n-gram, and in all repeated ones.
_TOP_NGRAM_SHARES = {2: 0.20, 3: 0.18, 4: 0.16}
_REPEATED_NGRAM_SHARES = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, hence invertible modulo 2^64


def reject_document(text: str, rules: FilterSettings) -> str | None:
    """None for a document worth keeping, otherwise the first reason against it.

    Reasons, in this order: `too_short`, `too_long`, `few_letters`, `many_digits`, `many_uppercase`, `placeholder_text`,
    `bullet_list`, `ellipsis_lines`, `repeated_lines`, `long_words`, `many_symbols`, `repetitive`, `repeated_ngrams`,
    `excluded`, `not_required`, `few_stop_words`, `wrong_language`.
    """
    if len(text) > rules.max_chars:
        return "too_long"
    census = _census(text)
    return (
        _against_characters(census, rules)
        or ("placeholder_text" if rules.placeholder_text and any(words in text for words in _LOREM_IPSUM) else None)
        or _against_lines(text, rules)
        or _against_words(text, census, rules)
        or _against_patterns(text, rules)
        or _against_language(text, census, rules)
    )


# ------------------------------------------------------------------------------------------------ characters


@dataclass(frozen=True, slots=True)
class _Census:
    """How many characters of each sort a text has."""

    visible: int
    letters: int
    digits: int
    cased: int
    uppercase: int
    unspaced: int
    width: float
    """Length in letter widths, which compares English with Chinese."""

    @property
    def is_spaced(self) -> bool:
        """Most of the text is in scripts with spaces. The Latin words of a Chinese page are URLs and file names."""
        return self.visible - self.unspaced > self.width / 2


# What a code point is, as bits.
_VISIBLE, _LETTER, _DIGIT, _CASED, _UPPERCASE, _IS_UNSPACED, _IS_WIDE = (1 << bit for bit in range(7))
_BITS = np.arange(1 << 7)[:, None] >> np.arange(7) & 1  # (sort, bit)


def _census(text: str) -> _Census:
    if text.isascii():
        codes = np.frombuffer(text.encode("ascii"), np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    visible, letters, digits, cased, uppercase, unspaced, wide = (
        np.bincount(_sorts()[codes], minlength=len(_BITS)) @ _BITS
    ).tolist()
    width = len(text) + (WIDE_LETTERS - 1) * wide
    return _Census(visible, letters, digits, cased, uppercase, unspaced, width)


@lru_cache(maxsize=1)
def _sorts() -> NDArray[np.uint8]:
    """The sort of each code point. Marks count as letters: a third of written Hindi is vowel signs."""
    table = np.zeros(0x110000, np.uint8)
    for code in (*range(0x33480), *range(0xE0100, 0xE01F0)):  # beyond the ideographs nothing is assigned but these
        character = chr(code)
        category = unicodedata.category(character)
        sort = 0 if character.isspace() else _VISIBLE
        if category[0] in "LM":
            sort |= _LETTER
        elif category[0] == "N":
            sort |= _DIGIT
        if category in ("Lu", "Lt"):
            sort |= _CASED | _UPPERCASE
        elif category == "Ll":
            sort |= _CASED
        if _UNSPACED.match(character):
            sort |= _IS_UNSPACED
        if _WIDE.match(character):
            sort |= _IS_WIDE
        table[code] = sort
    return table


def _against_characters(census: _Census, rules: FilterSettings) -> str | None:
    if census.width < rules.min_chars:
        return "too_short"
    if census.letters < rules.min_letter_ratio * census.visible or census.visible == 0:
        return "few_letters"
    if census.digits > rules.max_digit_ratio * census.visible:
        return "many_digits"
    # Acronyms are most of the Latin letters of a Chinese text, and no shouting.
    has_case = 2 * census.cased > census.letters + (WIDE_LETTERS - 1) * census.unspaced
    if has_case and census.uppercase > rules.max_uppercase_ratio * census.cased:
        return "many_uppercase"
    return None


def width(text: str) -> float:
    """Length in letter widths, which compares English with Chinese."""
    return len(text) if text.isascii() else len(text) + (WIDE_LETTERS - 1) * len(_WIDE.findall(text))


# ----------------------------------------------------------------------------------------------------- lines


def _against_lines(text: str, rules: FilterSettings) -> str | None:
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    if len(lines) < 2:  # an item of a list is no list, and a review may trail off
        return None
    bullets = sum(line[0] in _BULLETS and len(line) > 1 and line[1].isspace() for line in lines)
    if bullets > rules.max_bullet_line_ratio * len(lines):
        return "bullet_list"
    if any(sign in text for sign in _ELLIPSES):
        trailing_off = sum(line.endswith(_ELLIPSES) for line in lines)
        if trailing_off > rules.max_ellipsis_line_ratio * len(lines):
            return "ellipsis_lines"
    distinct = set(lines)
    if len(distinct) < len(lines):
        chars = sum(map(len, lines))
        repeated_chars = chars - sum(map(len, distinct))
        if (
            len(lines) - len(distinct) > rules.max_duplicate_line_ratio * len(lines)
            or repeated_chars > rules.max_duplicate_line_char_ratio * chars
        ):
            return "repeated_lines"
    return None


# ----------------------------------------------------------------------------------------------------- words


def _against_words(text: str, census: _Census, rules: FilterSettings) -> str | None:
    words = _WORDS_AND_SIGNS.findall(text) if census.unspaced else text.split()
    if census.is_spaced:
        spaced_words = len(words) - census.unspaced
        if census.visible - census.unspaced > rules.max_mean_word_chars * spaced_words:
            return "long_words"
        if sum(map(text.count, ("#", "...", "…"))) > rules.max_symbol_ratio * spaced_words:
            return "many_symbols"
    if len(text) >= _MIN_COMPRESSED_CHARS:
        raw = text.encode("utf-8", "replace")
        if len(raw) > rules.max_compression * len(zlib.compress(raw, 1)):
            return "repetitive"
    # A sign is less than a word where the question is how much text there is.
    enough = len(words) - census.unspaced * (1 - 1 / _SIGNS_PER_WORD) >= _MIN_WORDS
    if rules.repeated_ngrams and enough and _repeats_ngrams(words):
        return "repeated_ngrams"
    return None


def _repeats_ngrams(words: Sequence[str]) -> bool:
    """Whether n-grams of words take more of the characters than Gopher's table A1 allows.

    Of equal n-grams all but the first are repeated, as with lines; a character in several counts once.
    """
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    ends = np.zeros(len(words) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, words), np.int64, len(words)), out=ends[1:])
    chars = int(ends[-1])
    ngrams = hashes
    for n, share in _TOP_NGRAM_SHARES.items():
        ngrams = _longer(ngrams, hashes, n)
        if _top_ngram_exceeds(ngrams, ends[n:] - ends[:-n], share * chars):
            return True
    for n, share in _REPEATED_NGRAM_SHARES.items():
        ngrams = _longer(ngrams, hashes, n)
        repeated = _repeated_ngram_chars(ngrams, ends, n)
        if repeated > share * chars:
            return True
        # What is in a repeated (n+1)-gram is in a repeated n-gram: no longer one can pass its bound either.
        if repeated <= _REPEATED_NGRAM_SHARES[10] * chars:
            return False
    return False


def _longer(ngrams: NDArray[np.uint64], hashes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hashes of all n-grams, from those of the (n-1)-grams and of the words."""
    return ngrams[:-1] * _HASH_BASE + hashes[n - 1 :]


def _top_ngram_exceeds(ngrams: NDArray[np.uint64], lengths: NDArray[np.int64], max_chars: float) -> bool:
    """Whether the most frequent n-gram, the longest of equally frequent ones, repeats and takes more characters."""
    ordered = np.sort(ngrams)
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    counts = begins[1:] - begins[:-1]
    most = int(counts.max())
    if most == 1 or most * int(lengths.max()) <= max_chars:
        return False
    top = ordered[begins[:-1][counts == most]]
    return most * int(lengths[np.isin(ngrams, top)].max()) > max_chars


def _repeated_ngram_chars(ngrams: NDArray[np.uint64], ends: NDArray[np.int64], n: int) -> int:
    """Characters in words of n-grams that stood before."""
    order = np.argsort(ngrams, kind="stable")
    ordered = ngrams[order]
    repeats = order[1:][ordered[1:] == ordered[:-1]]
    if not len(repeats):
        return 0
    repeats.sort()
    # Each repeat covers n words from where it begins, or from where the one before it ends.
    starts = repeats.copy()
    starts[1:] = np.maximum(starts[1:], repeats[:-1] + n)
    return int((ends[repeats + n] - ends[starts]).sum())


# ------------------------------------------------------------------------------------- patterns and languages


def _against_patterns(text: str, rules: FilterSettings) -> str | None:
    if any(re.search(pattern, text) for pattern in rules.exclude):
        return "excluded"
    if not all(re.search(pattern, text) for pattern in rules.require):
        return "not_required"
    return None


def _against_language(text: str, census: _Census, rules: FilterSettings) -> str | None:
    if not rules.languages and not (rules.min_stop_words and census.is_spaced):
        return None
    language, score = identify(text)
    if rules.languages:
        wanted = any(same_language(language, code) for code in rules.languages)
        if not wanted or score < rules.min_language_score:
            return "wrong_language"
    stop_words = STOP_WORDS.get(primary(language), frozenset())
    if rules.min_stop_words and census.is_spaced and stop_words:
        words = re.findall(r"[^\W\d_]+", text.lower())
        if len(words) >= _MIN_WORDS and len(stop_words.intersection(words)) < rules.min_stop_words:
            return "few_stop_words"
    return None
