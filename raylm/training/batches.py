"""The global order: which examples make up optimizer step `s` is a pure function of (seed, data, s).

Neither the number of workers nor a restart changes it. Each rank computes the whole global batch as a list of
indices (a few kilobytes) and reads its own slice alone.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raylm.errors import ArtifactError
from raylm.storage import StoragePath

Indices = NDArray[np.int64]

_FEISTEL_ROUNDS = 4
_POOL_EXAMPLES = 65_536
"""Pairs are sorted by length within pools of this many, so that batches hold equal lengths in random order."""


# ------------------------------------------------------------------------------------ random access


def permute(positions: Indices, size: int, seed: int) -> Indices:
    """The images of positions under a seeded pseudo-random permutation of 0…size-1, in O(1) memory.

    A balanced Feistel network over the next power of four, walked until the value falls inside (Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Any offset of any epoch is reached at once.
    """
    half_bits = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
    mask = np.uint64((1 << half_bits) - 1)
    keys = np.random.default_rng(seed).integers(0, 1 << 62, _FEISTEL_ROUNDS, dtype=np.uint64)
    values = positions.astype(np.uint64)
    walking = np.ones(len(values), dtype=bool)
    while walking.any():
        left, right = values[walking] >> np.uint64(half_bits), values[walking] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            left, right = right, left ^ ((mixed * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)) & mask)
        values[walking] = (left << np.uint64(half_bits)) | right
        walking = values >= size
    return values.astype(np.int64)


class Shards:
    """Arrow IPC shards of one split as one memory-mapped table; remote ones are copied to local disk once."""

    def __init__(self, directory: StoragePath) -> None:
        files = [file for file, _ in directory.list() if file.name.endswith(".arrow")]
        if not files:
            raise ArtifactError(f"{directory}: no token shards here; prepare a corpus that has such data")
        tables = [pa.ipc.open_file(pa.memory_map(str(file.at_hand()))).read_all() for file in files]
        self.table: pa.Table = pa.concat_tables(tables)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def offsets(self, column: str) -> tuple[list[NDArray[np.int64]], list[NDArray[np.generic]], list[int]]:
        """For a list column: each chunk's offsets and flat values, and the first row of each chunk."""
        chunks = self.table[column].chunks
        firsts = np.cumsum([0, *(len(chunk) for chunk in chunks)])[:-1].tolist()
        return (
            [chunk.offsets.to_numpy().astype(np.int64) for chunk in chunks],
            [chunk.values.to_numpy() for chunk in chunks],
            firsts,
        )


class TokenLists:
    """Random access to a column of token lists: `lists[i]` is a numpy array of ids."""

    def __init__(self, shards: Shards, column: str) -> None:
        self._offsets, self._values, self._firsts = shards.offsets(column)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        chunk = bisect.bisect_right(self._firsts, index) - 1
        row = index - self._firsts[chunk]
        start, stop = self._offsets[chunk][row : row + 2]
        return self._values[chunk][start:stop].astype(np.int64)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of every list."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets])


# ---------------------------------------------------------------------------------- the global batch


@dataclass(frozen=True)
class GlobalBatch:
    """The examples of one optimizer step.

    :param indices: example numbers, longest first where they differ in length.
    :param epochs: for each, how often the data had been seen before; part of the seed of its noise.
    """

    indices: Indices
    epochs: Indices

    def slice(self, rank: int, world_size: int, micro_batches: int) -> list[GlobalBatch]:
        """What a rank reads, as its micro-batches; some are empty where there are fewer examples than places.

        Examples are dealt out one by one, so ranks get equal lengths.
        """
        mine, epochs = self.indices[rank::world_size], self.epochs[rank::world_size]
        parts = zip(np.array_split(mine, micro_batches), np.array_split(epochs, micro_batches), strict=True)
        return [GlobalBatch(indices, part_epochs) for indices, part_epochs in parts]


class PackedOrder:
    """Global batches of packed sequences, all of one length."""

    def __init__(self, sequences: int, batch_sequences: int, seed: int) -> None:
        self._sequences, self._batch, self._seed = sequences, batch_sequences, seed

    def batch(self, step: int) -> GlobalBatch:
        positions = np.arange(step * self._batch, (step + 1) * self._batch, dtype=np.int64)
        epochs = positions // self._sequences
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = permute(
                positions[here] % self._sequences, self._sequences, seed=self._seed * 1_000_003 + int(epoch)
            )
        return GlobalBatch(indices, epochs)


class BucketedOrder:
    """Global batches of pairs with a bound on their padded tokens, so that few of them are padding.

    Pairs are sorted by length within pools: by the last side, and of equal ones by the side before it.

    :param sides: for each side that is padded by itself, such as sources and targets, the tokens that each pair has,
        special ones included.
    :param weights: how often each pair is seen in an epoch; a fraction is drawn by lot each time.
    :param batch_tokens: the bound on a batch's pairs × the sum of the longest of each side.
    """

    def __init__(
        self, sides: Sequence[NDArray[np.int64]], weights: NDArray[np.float64], batch_tokens: int, seed: int
    ) -> None:
        self._sides, self._weights, self._batch_tokens, self._seed = sides, weights, batch_tokens, seed
        self._firsts = [0]  # the first step of each epoch, as far as they are known
        self._epoch, self._batches = 0, self._plan(0)

    def batch(self, step: int) -> GlobalBatch:
        """The batches of one epoch are kept; those of another are planned anew, in 0.2 s for a million pairs."""
        while True:
            epoch = bisect.bisect_right(self._firsts, step) - 1
            if epoch != self._epoch:
                self._epoch, self._batches = epoch, self._plan(epoch)
            number = step - self._firsts[epoch]
            if number < len(self._batches):
                indices = self._batches[number]
                return GlobalBatch(indices, np.full(len(indices), epoch, dtype=np.int64))
            self._firsts.append(self._firsts[epoch] + len(self._batches))

    def _plan(self, epoch: int) -> list[Indices]:
        generator = np.random.default_rng((self._seed, epoch))
        copies = np.floor(self._weights + generator.random(len(self._weights))).astype(np.int64)
        examples = np.repeat(np.arange(len(self._weights), dtype=np.int64), copies)
        generator.shuffle(examples)
        batches: list[Indices] = []
        for start in range(0, len(examples), _POOL_EXAMPLES):
            pool = examples[start : start + _POOL_EXAMPLES]
            pool = pool[np.lexsort([side[pool] for side in self._sides])[::-1]]
            batches += self._cut(pool)
        order = generator.permutation(len(batches))
        return [batches[i] for i in order]

    def _cut(self, pool: Indices) -> list[Indices]:
        """Batches of examples whose last side falls, each as large as the bound lets it be."""
        sides = [side[pool] for side in self._sides]
        batches, start = [], 0
        while start < len(pool):
            most = start + max(self._batch_tokens // int(sides[-1][start]), 1)
            widths = np.sum([np.maximum.accumulate(side[start:most]) for side in sides], axis=0)  # up to each example
            fitting = np.arange(1, len(widths) + 1) * widths <= self._batch_tokens
            stop = start + max(int(np.count_nonzero(fitting)), 1)
            batches.append(pool[start:stop])
            start = stop
        return batches


def micro_batches_for(global_batch_tokens: int, micro_batch_tokens: int, world_size: int, length: int = 1) -> int:
    """Gradient accumulation steps that keep a worker's micro-batch within its bound.

    :param length: of a packed sequence, which is not divided; pairs of a step are short beside the bound.
    """
    sequences = -(-max(global_batch_tokens // length, 1) // world_size)
    return max(-(-sequences // max(micro_batch_tokens // length, 1)), 1)


@cache
def width_multiple() -> int:
    """What the widths of batches are rounded up to: 8 where there is a GPU, whose tensor cores want that, else 1."""
    import torch

    return 8 if torch.cuda.is_available() else 1


def padded_length(tokens: int) -> int:
    """The width of a batch whose longest row has so many tokens."""
    multiple = width_multiple()
    return -(-tokens // multiple) * multiple


def pad_to(rows: Sequence[NDArray[np.int64]], value: int) -> NDArray[np.int64]:
    """Rows of different lengths as one array, filled up at the right.

    :returns: (B, T), with T the `padded_length` of the longest row.
    """
    padded = np.full((len(rows), padded_length(max(map(len, rows)))), value, dtype=np.int64)
    for line, row in enumerate(rows):
        padded[line, : len(row)] = row
    return padded
