from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.corpus.mixture import copies, epochs

HASHES = np.random.default_rng(1).integers(0, 1 << 64, 200_000, dtype=np.uint64)


def test_sources_without_a_weight_are_taken_as_often_as_they_say() -> None:
    assert epochs([100, 0, 7], [None, None, None], [1.0, 2.0, 0.5]) == [1.0, 2.0, 0.5]


def test_weights_set_the_shares_and_the_scarcest_source_the_size() -> None:
    # The second may be seen twice: 200 tokens for a quarter, hence 600 of the first.
    assert epochs([1_000, 100], [3, 1], [1.0, 2.0]) == [pytest.approx(0.6), 2.0]


def test_a_source_without_weight_takes_no_part_in_the_shares() -> None:
    assert epochs([1_000, 50, 1_000], [1, None, 1], [1.0, 3.0, 1.0]) == [1.0, 3.0, 1.0]


def test_an_empty_source_costs_the_others_nothing() -> None:
    assert epochs([0, 100, 300], [5, 1, 1], [1.0, 1.0, 1.0])[1:] == [1.0, pytest.approx(1 / 3)]


SOURCE = st.tuples(st.integers(1, 10**12), st.floats(0.01, 100), st.floats(0.1, 10))


@given(st.lists(SOURCE, min_size=1, max_size=6))
def test_the_mixture_is_in_proportion_and_cannot_be_larger(sources: list[tuple[int, float, float]]) -> None:
    tokens, weights, most = (list(column) for column in zip(*sources, strict=True))
    taken = epochs(tokens, weights, most)
    assert all(often <= limit for often, limit in zip(taken, most, strict=True))
    assert any(often == pytest.approx(limit) for often, limit in zip(taken, most, strict=True))
    total = sum(size * often for size, often in zip(tokens, taken, strict=True))
    for size, often, weight in zip(tokens, taken, weights, strict=True):
        assert size * often / total == pytest.approx(weight / sum(weights))


@pytest.mark.parametrize("often", [0.0, 0.03, 0.5, 1.0, 1.75, 4.0])
def test_documents_are_taken_as_often_as_wanted(often: float) -> None:
    taken = copies(HASHES, often)
    assert taken.mean() == pytest.approx(often, abs=0.005)
    assert set(taken.tolist()) <= {int(often), int(often) + 1}


def test_documents_of_weighted_sources_have_their_shares_within_one_percent() -> None:
    lengths = np.random.default_rng(2).integers(10, 1_000, len(HASHES))
    source = np.random.default_rng(3).integers(0, 3, len(HASHES))
    tokens = [int(lengths[source == number].sum()) for number in range(3)]
    weights = [0.5, 0.3, 0.2]
    taken = np.zeros(len(HASHES), np.int64)
    for number, often in enumerate(epochs(tokens, weights, [1.0, 2.5, 1.0])):
        taken[source == number] = copies(HASHES[source == number], often)
    shares = [(lengths * taken)[source == number].sum() / (lengths * taken).sum() for number in range(3)]
    assert shares == pytest.approx(weights, rel=0.01)


@given(st.floats(0, 5), st.floats(0, 5))
def test_more_epochs_take_no_document_less_often(some: float, more: float) -> None:
    some, more = sorted((some, more))
    assert (copies(HASHES[:500], some) <= copies(HASHES[:500], more)).all()


def test_a_document_is_taken_whatever_others_there_are() -> None:
    order = np.random.default_rng(4).permutation(1_000)
    assert (copies(HASHES[:1_000], 0.4)[order] == copies(HASHES[:1_000][order], 0.4)).all()


def test_documents_of_one_shard_or_split_are_sampled_like_all() -> None:
    for part in (HASHES[HASHES < 1 << 60], HASHES[HASHES % np.uint64(16) == 3]):
        assert copies(part, 0.3).mean() == pytest.approx(0.3, abs=0.02)
