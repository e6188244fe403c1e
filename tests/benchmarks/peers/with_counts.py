"""What counting alone makes of a corpus that raylm has prepared: its labels, its text; prints scores as JSON.

Run in the peers' environment: `python with_counts.py '{"work": "labels", "tokens": "…/tokens/default", …}'`.
"""

from __future__ import annotations

import json
import lzma
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer

_ORDER = 5
_MULTIPLIER, _SECOND_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
Numbers = NDArray[Any]


def rows(tokens: str, kind: str, split: str) -> pa.Table:
    files = sorted(Path(tokens, kind, split).glob("*.arrow"))
    return pa.concat_tables(pa.ipc.open_file(str(file)).read_all() for file in files)


def labels(tokens: str, analyzer: str, ngrams: int) -> dict[str, float]:
    """Share of test texts that TF-IDF and a logistic regression of scikit-learn label rightly, in percent."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train = pa.concat_tables(rows(tokens, "pairs", split) for split in ("train", "validation"))
    test = rows(tokens, "pairs", "test")
    vectorizer = TfidfVectorizer(analyzer=analyzer, ngram_range=(1, ngrams), sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=1_000)
    model.fit(vectorizer.fit_transform(train["source"].to_pylist()), train["target"].to_pylist())
    found = model.predict(vectorizer.transform(test["source"].to_pylist()))
    return {"accuracy": 100 * float(np.mean(found == np.asarray(test["target"].to_pylist())))}


def documents(tokens: str, split: str) -> list[Numbers]:
    """The ids of each document, or of each part of one, of the packed sequences."""
    table, found = rows(tokens, "documents", split), []
    for ids, lengths in zip(table["input_ids"], table["document_lengths"], strict=True):
        whole, ends = np.asarray(ids.values), np.cumsum(np.asarray(lengths.values))
        found += np.split(whole[: ends[-1]], ends[:-1])
    return found


def text(tokens: str) -> dict[str, float]:
    """Bits that a byte of held-out text takes, for 5-grams of the same tokens and for LZMA, both after all of training.

    The documents' first tokens are given, as they are to a model.
    """
    train, held_out = (documents(tokens, split) for split in ("train", "validation"))
    tokenizer = Tokenizer.from_file(f"{tokens}/tokenizer/tokenizer.json")
    special = tokenizer.get_added_tokens_decoder()
    sizes = np.asarray(
        [0 if n in special else len(tokenizer.id_to_token(n)) for n in range(tokenizer.get_vocab_size())]
    )
    size = sum(int(sizes[one[1:]].sum()) for one in held_out)
    nats = kneser_ney(train, held_out, len(sizes))
    texts = [b"\0".join(t.encode() for t in tokenizer.decode_batch(found)) for found in (train, held_out)]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 256 << 20}]
    before, after = (len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters)) for data in (texts[0], b"".join(texts)))
    return {
        "bytes": size,
        "ngrams_bits_per_byte": nats / math.log(2) / size,
        "lzma_bits_per_byte": 8 * (after - before) / len(texts[1]),
    }


def kneser_ney(train: list[Numbers], held_out: list[Numbers], vocabulary: int) -> float:
    """Nats of all tokens but the documents' first, in 5-grams with interpolated Kneser-Ney smoothing (Chen and Goodman
    1999), whose discount is n1 / (n1 + 2 n2) in each order."""
    learned, asked = grams(train), grams(held_out)
    probability = np.full(len(asked[0][0]), 1 / vocabulary)
    for n, ((ends, contexts), (wanted, context)) in enumerate(zip(learned, asked, strict=True), start=1):
        places = np.flatnonzero(ends)
        if n < _ORDER:  # what counts is how many different tokens precede
            places = np.unique(learned[n][0], return_index=True)[1]
            places = places[learned[n][0][places] != 0]
        keys, first, counts = np.unique(ends[places], return_index=True, return_counts=True)
        once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
        discount = once / max(once + 2 * twice, 1)
        of_key = contexts[places[first]]
        order = np.argsort(of_key, kind="stable")
        heads, starts = np.unique(of_key[order], return_index=True)
        total = looked_up(context, heads, np.add.reduceat(counts[order], starts))
        kinds = looked_up(context, heads, np.diff(np.append(starts, len(order))))
        seen = np.maximum(looked_up(wanted, keys, counts) - discount, 0) / np.maximum(total, 1)
        smoothed = seen + discount * kinds / np.maximum(total, 1) * probability
        probability = np.where((total > 0) & (wanted != 0), smoothed, probability)
    return float(-np.log(probability).sum())


def grams(found: list[Numbers]) -> list[tuple[Numbers, Numbers]]:
    """For each order n, of each token but the documents' first: a hash of the n tokens that end there, and of the n - 1
    before it; 0 where a document has not so many."""
    ids = (np.concatenate(found).astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    place = np.concatenate([np.arange(len(one)) for one in found])
    before, result = np.ones(len(ids), np.uint64), []
    for n in range(1, _ORDER + 1):
        mixed = (before ^ ids) * _SECOND_MULTIPLIER
        mixed ^= mixed >> np.uint64(31)
        ends = np.where(place >= n - 1, np.maximum(mixed, np.uint64(1)), np.uint64(0))
        result.append((ends[place > 0], before[place > 0]))
        before = np.append(np.uint64(0), ends[:-1])
    return result


def looked_up(wanted: Numbers, keys: Numbers, values: Numbers) -> Numbers:
    """The values of keys, 0 of one that is not there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    work = {"labels": labels, "text": text}[asked.pop("work")]
    sys.stdout.write(json.dumps(work(**asked)) + "\n")
