"""Word n-grams as 64-bit hashes, for a whole batch of texts at once: the ground of MinHash and of decontamination.

A word is a run of letters, digits or underscores, lower-cased; an ideograph, kana or other sign of a script without
spaces is a word by itself. Word hashes are polynomial hashes modulo 2^64 over mixed code points, taken from prefix
sums (Karp and Rabin 1987), so that no word is touched by Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from raylm.language import IDEOGRAPHS, KANA

Hashes = NDArray[np.uint64]

_CHUNK_CHARS = 1 << 20
_BASE = 0x9E3779B97F4A7C15  # odd, hence invertible modulo 2^64
_SEPARATOR, _LETTER, _SIGN = 0, 1, 2
# Thai to Khmer, kana, ideographs: scripts that put no spaces between words.
_UNSPACED = re.compile(f"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff{KANA}{IDEOGRAPHS}]")


def shingles(texts: Sequence[str], words: int) -> tuple[Hashes, NDArray[np.int64]]:
    """The hashes of all runs of so many words in each text, and where each text's hashes begin.

    A text with fewer words gives one hash of all of them; one without words gives none.

    :returns: `(hashes, offsets)`; those of text i are `hashes[offsets[i]:offsets[i + 1]]`, in order, with repeats.
    """
    hashes, counts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for chunk in _chunks(texts):
        word_hashes, word_counts = _words(chunk)
        found, number = _runs(word_hashes, word_counts, words)
        hashes.append(found)
        counts.append(number)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return np.concatenate(hashes), offsets


def mixed(values: Hashes) -> Hashes:
    """The values with all bits mixed: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    values = values + np.uint64(_BASE)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in batches of about a million characters, a longer one alone."""
    chunk: list[str] = []
    chars = 0
    for text in texts:
        if chunk and chars + len(text) > _CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
        chunk.append(text)
        chars += len(text) + 1
    if chunk:
        yield chunk


def _words(texts: list[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """The hash of every word, and how many words each text has."""
    joined = "\n".join(texts).lower()
    if len(joined) != sum(map(len, texts)) + len(texts) - 1:  # `İ` becomes two characters
        texts = [text.lower() for text in texts]
        joined = "\n".join(texts)
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[points]
    letters = kinds == _LETTER
    before = np.concatenate([[False], letters[:-1]])
    after = np.concatenate([letters[1:], [False]])
    signs = kinds == _SIGN
    starts = np.flatnonzero((letters & ~before) | signs)
    ends = np.flatnonzero((letters & ~after) | signs) + 1

    powers, inverses = _powers(1 << max(len(points), _CHUNK_CHARS).bit_length())
    sums = np.zeros(len(points) + 1, np.uint64)
    np.cumsum(_mixed_points()[points] * powers[: len(points)], out=sums[1:])
    hashes = mixed((sums[ends] - sums[starts]) * inverses[starts])
    text_ends = np.cumsum(np.fromiter((len(text) + 1 for text in texts), np.int64, len(texts)))
    until = np.searchsorted(starts, text_ends)
    return hashes, np.diff(np.concatenate([[0], until]))


def _runs(hashes: Hashes, counts: NDArray[np.int64], words: int) -> tuple[Hashes, NDArray[np.int64]]:
    """The hash of every run of `words` words inside a text, and how many each text has."""
    numbers = np.where(counts >= words, counts - words + 1, np.minimum(counts, 1))
    first = np.cumsum(counts) - counts
    begins = np.cumsum(numbers) - numbers
    # Where run j of text i begins among the words: first[i] + j.
    at = np.arange(numbers.sum()) + np.repeat(first - begins, numbers)
    left = np.repeat(first + counts, numbers) - at
    padded = np.concatenate([hashes, np.zeros(words, np.uint64)])
    total = np.zeros(len(at), np.uint64)
    for number in range(words):
        term = padded[at + number] * _powers(_CHUNK_CHARS)[0][number + 1]
        total += np.where(left > number, term, np.uint64(0))
    return mixed(total), numbers


@lru_cache(maxsize=1)
def _kinds() -> NDArray[np.uint8]:
    """What each code point is: part of a word, a word by itself, or neither."""
    points = "".join(map(chr, range(0x110000)))
    kinds = np.zeros(len(points), np.uint8)
    for run in re.finditer(r"\w+", points):
        kinds[run.start() : run.end()] = _LETTER
    for run in _UNSPACED.finditer(points):
        if kinds[run.start()] == _LETTER:
            kinds[run.start()] = _SIGN
    return kinds


@lru_cache(maxsize=1)
def _mixed_points() -> Hashes:
    return mixed(np.arange(0x110000, dtype=np.uint64))


@lru_cache(maxsize=2)
def _powers(size: int) -> tuple[Hashes, Hashes]:
    """The powers of the base, and of its inverse, modulo 2^64."""
    inverse = pow(_BASE, -1, 1 << 64)
    bases = (np.full(size, np.uint64(base)) for base in (_BASE, inverse))
    first, second = (np.multiply.accumulate(np.concatenate([np.ones(1, np.uint64), base[1:]])) for base in bases)
    return first, second
