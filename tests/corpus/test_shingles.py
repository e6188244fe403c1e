from __future__ import annotations

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raylm.corpus.shingles import shingles

WORDS = st.sampled_from(["the", "The", "queue", "queue_2", "7", "ß", "naïve", "中", "文", "。", ",", "-", "\n", "İ"])


def words_of(text: str) -> list[str]:
    return re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text.lower())


def ngrams(text: str, words: int) -> list[tuple[str, ...]]:
    found = words_of(text)
    if len(found) < words:
        return [tuple(found)] if found else []
    return [tuple(found[n : n + words]) for n in range(len(found) - words + 1)]


@given(st.lists(st.lists(WORDS, max_size=12).map(" ".join), max_size=6), st.integers(1, 6))
def test_equal_runs_of_words_have_equal_hashes_and_no_others(texts: list[str], words: int) -> None:
    hashes, offsets = shingles(texts, words)
    expected = [ngrams(text, words) for text in texts]
    assert np.diff(offsets).tolist() == [len(found) for found in expected]
    flat = [gram for found in expected for gram in found]
    by_hash = dict(zip(hashes.tolist(), flat, strict=True))
    assert [by_hash[value] for value in hashes.tolist()] == flat
    assert len(by_hash) == len(set(flat))


def test_the_hash_does_not_depend_on_what_else_is_in_the_batch() -> None:
    text = "One scheduler reads the queue of every processor, 调度器读取队列。"
    alone, _ = shingles([text], 5)
    filler = ["word " * 300_000, text, "other words", text]
    together, offsets = shingles(filler, 5)
    assert np.array_equal(alone, together[offsets[1] : offsets[2]])
    assert np.array_equal(alone, together[offsets[3] : offsets[4]])


def test_texts_without_words_give_none() -> None:
    hashes, offsets = shingles(["", " ... \n", "\ud800"], 5)
    assert len(hashes) == 0
    assert offsets.tolist() == [0, 0, 0, 0]
    assert shingles([], 5)[1].tolist() == [0]
