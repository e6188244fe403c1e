from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.storage import StoragePath
from raylm.training import batches
from raylm.training.batches import (
    BucketedOrder,
    GlobalBatch,
    PackedOrder,
    Shards,
    TokenLists,
    micro_batches_for,
    pad_to,
    permute,
)


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
    return BucketedOrder([lengths], np.ones(len(lengths)) if weights is None else weights, 2_048, seed), lengths


def test_bucketed_batches_keep_the_token_budget_with_little_padding() -> None:
    order, lengths = _bucketed()
    padded = real = 0
    for step in range(200):
        indices = order.batch(step).indices
        size = len(indices) * lengths[indices].max()
        assert size <= 2_048
        padded, real = padded + size, real + lengths[indices].sum()
    assert real / padded > 0.95


def test_sources_and_targets_are_padded_little_together() -> None:
    """Lengths as in text: a target is as long as its source, about."""
    chance = np.random.default_rng(0)
    sources = chance.lognormal(3, 0.7, 60_000).astype(np.int64) + 2
    targets = np.maximum((sources * chance.normal(1.1, 0.25, len(sources))).astype(np.int64), 2)
    order = BucketedOrder([sources, targets], np.ones(len(sources)), 1_200, seed=1)
    padded = real = 0
    for step in range(300):
        indices = order.batch(step).indices
        size = len(indices) * (sources[indices].max() + targets[indices].max())
        assert size <= 1_200 or len(indices) == 1
        padded, real = padded + size, real + (sources + targets)[indices].sum()
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
    # 32 packed sequences, of which a micro-batch of 1,100 tokens holds one, and never two.
    assert micro_batches_for(32_768, 1_100, 1, length=1_024) == 32
    assert micro_batches_for(32_768, 4_096, 3, length=1_024) == 3


@pytest.mark.parametrize(("multiple", "fill"), [(1, []), (8, [9] * 5)])
def test_widths_are_rounded_up_for_a_gpu_alone(monkeypatch: pytest.MonkeyPatch, multiple: int, fill: list[int]) -> None:
    monkeypatch.setattr(batches, "width_multiple", lambda: multiple)
    rows = [np.asarray([1, 2, 3]), np.asarray([4])]
    assert pad_to(rows, 9).tolist() == [[1, 2, 3, *fill], [4, 9, 9, *fill]]
    assert batches.padded_length(3) == 3 + len(fill)


def test_an_epoch_is_planned_again_as_it_was() -> None:
    order, _ = _bucketed()
    steps = [0, 5_000, 3, 9_000, 5_000, 0]
    read = [order.batch(step) for step in steps]
    assert np.array_equal(read[1].indices, read[4].indices)
    assert np.array_equal(read[0].indices, read[5].indices)
    assert read[0].epochs[0] == 0
    assert read[3].epochs[0] > read[1].epochs[0] > 0


def test_the_first_batch_is_there_at_once_anywhere_in_a_million_sequences(tmp_path: Path) -> None:
    """Shards opened, batch chosen and read, as a run that continues does."""
    size, length = 1_000_000, 32
    ids = np.arange(size * length, dtype=np.uint16)
    offsets = np.arange(0, size * length + 1, length, dtype=np.int32)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))})
    with pa.ipc.new_file(str(tmp_path / "shard.arrow"), table.schema) as writer:
        writer.write_table(table)
    for step in (0, 123_456, 40_000_000):
        start = time.process_time()
        rows = TokenLists(Shards(StoragePath(str(tmp_path))), "input_ids")
        for order in (PackedOrder(size, 16, 1), BucketedOrder([rows.lengths], np.ones(size), 16 * length, 1)):
            if step < 1_000_000 or isinstance(order, PackedOrder):
                batch = order.batch(step)
                assert [rows[int(index)][0] for index in batch.indices] == [
                    int(index) * length % (1 << 16) for index in batch.indices
                ]
        assert time.process_time() - start < 5
