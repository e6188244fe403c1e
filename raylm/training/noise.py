"""Spans of a text that are hidden from a model: which, and what stands in their place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


def span_mask(
    length: int, density: float, mean_span_tokens: float, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Which of `length` tokens are noise: spans of random lengths with random gaps, never the first token.

    The `random_spans_noise_mask` of T5 (Raffel et al. 2020, section 3.3.4).
    """
    noise, spans = span_counts(length, density, mean_span_tokens)
    if noise < 1:
        return np.zeros(length, dtype=bool)
    noise_lengths = _random_partition(noise, spans, generator)
    plain_lengths = _random_partition(length - noise, spans, generator)
    lengths = np.stack([plain_lengths, noise_lengths], axis=1).reshape(-1)
    return np.repeat(np.tile([False, True], spans), lengths)


def span_counts(length: int, density: float, mean_span_tokens: float) -> tuple[int, int]:
    """How many of `length` tokens are noise, and in how many spans."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span_tokens), 1), noise, length - noise)


def _random_partition(total: int, parts: int, generator: np.random.Generator) -> Tokens:
    """`parts` positive integers that add up to `total`, all such rows equally likely."""
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


def corrupt_spans(
    tokens: Tokens, noise: NDArray[np.bool_], sentinels: tuple[int, ...], end: int
) -> tuple[Tokens, Tokens]:
    """The text with a sentinel for each hidden span, and the hidden spans behind their sentinels.

    `a b C D e` becomes `a b <0> e </s>` and `<0> C D </s>`. Spans beyond the sentinels there are stay in place.
    """
    starts = noise & ~np.concatenate([[False], noise[:-1]])
    span = np.cumsum(starts) - 1
    noise = noise & (span < len(sentinels))
    starts = starts & noise
    marks = np.asarray(sentinels)[np.clip(span, 0, len(sentinels) - 1)]
    source = np.where(starts, marks, tokens)[~noise | starts]
    positions = np.flatnonzero(noise)
    target = np.insert(tokens[positions], np.searchsorted(positions, np.flatnonzero(starts)), marks[starts])
    return np.append(source, end), np.append(target, end)


def infill_spans(tokens: Tokens, noise: NDArray[np.bool_], mask: int, end: int) -> tuple[Tokens, Tokens]:
    """The text with one mask for each hidden span, and the whole text: BART's infilling (Lewis et al. 2020).

    `a b C D e` becomes `a b <mask> e </s>` and `a b C D e </s>`. Most of the target can be copied, which teaches
    the decoder to look at the encoder within minutes.
    """
    starts = noise & ~np.concatenate([[False], noise[:-1]])
    source = np.where(starts, mask, tokens)[~noise | starts]
    return np.append(source, end), np.append(tokens, end)
