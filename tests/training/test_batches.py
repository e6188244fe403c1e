from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.training.batches import BucketedOrder, GlobalBatch, PackedOrder, micro_batches_for, pad_to, permute


@given(st.integers(1, 3_000), st.integers(0, 2**31))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    images = permute(np.arange(size), size, seed)
    assert np.array_equal(np.sort(images), np.arange(size))


def test_permute_mixes_and_depends_on_its_seed() -> None:
    size = 10_000
    images = permute(np.arange(size), size, seed=1)
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.05
    assert np.mean(images == permute(np.arange(size), size, seed=2)) < 0.01
    # neighbours do not stay neighbours
    assert np.mean(np.abs(np.diff(images)) < 10) < 0.01


def test_permute_reaches_any_offset_of_a_large_corpus_alone() -> None:
    size = 10**9
    whole = permute(np.arange(999_999_000, size), size, seed=3)
    assert np.array_equal(permute(np.asarray([999_999_500]), size, seed=3), whole[500:501])
    assert whole.max() < size


def test_an_epoch_of_packed_sequences_reads_each_once() -> None:
    order = PackedOrder(sequences=103, batch_sequences=10, seed=1)
    read = np.concatenate([order.batch(step).indices for step in range(31)])
    assert np.array_equal(np.sort(read[:103]), np.arange(103))
    assert np.array_equal(np.sort(read[103:206]), np.arange(103))
    assert not np.array_equal(read[:103], read[103:206])
    crossing = order.batch(10)  # positions 100…109: three of the first epoch, seven of the second
    assert crossing.epochs.tolist() == [0] * 3 + [1] * 7


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_and_micro_batches_together_are_the_global_batch(world_size: int) -> None:
    batch = GlobalBatch(np.arange(17), np.zeros(17, dtype=np.int64))
    parts = [part for rank in range(world_size) for part in batch.slice(rank, world_size, 3)]
    assert sorted(np.concatenate([part.indices for part in parts])) == list(range(17))


def _bucketed(seed: int = 1, weights: np.ndarray | None = None) -> tuple[BucketedOrder, np.ndarray]:
    lengths = np.random.default_rng(0).integers(4, 200, 20_000)
    return BucketedOrder(lengths, np.ones(len(lengths)) if weights is None else weights, 2_048, seed), lengths


def test_bucketed_batches_keep_the_token_budget_with_little_padding() -> None:
    order, lengths = _bucketed()
    padded = real = 0
    for step in range(200):
        indices = order.batch(step).indices
        size = len(indices) * lengths[indices].max()
        assert size <= 2_048
        padded, real = padded + size, real + lengths[indices].sum()
    assert real / padded > 0.95


def test_a_bucketed_epoch_reads_each_pair_once_and_a_later_step_needs_no_earlier_one() -> None:
    order, lengths = _bucketed()
    read: list[int] = []
    step = 0
    while len(read) < len(lengths):
        read += order.batch(step).indices.tolist()
        step += 1
    assert sorted(read) == list(range(len(lengths)))
    fresh, _ = _bucketed()
    assert np.array_equal(fresh.batch(step + 3).indices, order.batch(step + 3).indices)
    other, _ = _bucketed(seed=2)
    assert not np.array_equal(other.batch(0).indices, fresh.batch(0).indices)


def test_weights_say_how_often_a_pair_is_seen() -> None:
    weights = np.where(np.arange(20_000) % 2, 0.5, 2.0)
    order, _ = _bucketed(weights=weights)
    read = np.concatenate([order.batch(step).indices for step in range(2_000) if order.batch(step).epochs[0] == 0])
    seen = np.bincount(read, minlength=20_000)
    assert set(seen[::2]) == {2}
    assert seen[1::2].mean() == pytest.approx(0.5, abs=0.02)


def test_micro_batches_follow_from_the_bounds() -> None:
    assert micro_batches_for(4_096, 4_096, 1) == 1
    assert micro_batches_for(4_096, 1_024, 2) == 2
    assert micro_batches_for(4_097, 1_024, 2) == 3


def test_pad_to_rounds_the_width_up() -> None:
    rows = [np.asarray([1, 2, 3]), np.asarray([4])]
    assert pad_to(rows, 9, multiple=4).tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
