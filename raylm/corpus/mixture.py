"""How often each source's documents are seen, so that the sources make up the wanted shares of the training tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raylm.corpus.shingles import mixed

_SALT = np.uint64(0x6D69787475726573)


def epochs(tokens: Sequence[int], weights: Sequence[float | None], epochs: Sequence[float]) -> list[float]:
    """How often each source is taken: `n` times the whole of it, 0.5 half of its documents.

    Sources without a weight are taken as often as their `epochs` say. Those with one are taken so that their tokens
    are in proportion to their weights, and as much of them as there can be with none beyond its `epochs`.

    :param tokens: of each source.
    :param weights: relative to one another, of the sources that have one.
    :param epochs: of each source; a bound where it has a weight.
    """
    weighted = [
        (weight, size * most)
        for size, weight, most in zip(tokens, weights, epochs, strict=True)
        if weight is not None and size
    ]
    # An empty source can have no share; the others keep theirs among themselves.
    per_weight = min((available / weight for weight, available in weighted), default=0.0)
    return [
        most if weight is None or not size else min(per_weight * weight / size, most)
        for size, weight, most in zip(tokens, weights, epochs, strict=True)
    ]


def copies(hashes: NDArray[np.uint64], epochs: float) -> NDArray[np.int64]:
    """How often each document is taken: the whole part of `epochs`, and once more for a fraction of the documents.

    A document's hash decides, whatever other documents there are; a larger fraction takes all that a smaller one does.
    """
    whole = int(epochs)
    # Mixed anew, for a document's hash also chooses its split and its shard, which must not decide here.
    position = (mixed(hashes ^ _SALT) >> np.uint64(11)).astype(np.float64) / (1 << 53)  # in [0, 1)
    return whole + (position < epochs - whole).astype(np.int64)
