"""Global batches from a stream of packed sequences, instead of from shards at rest.

Which sequences make up a step depends on the number of workers and on restarts. What holds: a step has the same number
of sequences on every worker, nothing is passed over, and a run that continues reads again at most what was in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raylm.errors import InputError
from raylm.storage import StoragePath
from raylm.training import checkpoint as checkpoints
from raylm.training.objectives import MicroBatch, SelfSupervision

if TYPE_CHECKING:
    import torch
    from ray.data import DataIterator, Dataset

RECORD = "stream"
"""Below a run: what became of the rows of each place of the stream."""
PLACE = "place"
"""In a checkpoint's metrics: the first place of the stream that has not been read to its end."""
_COLUMNS = ("input_ids", "document_lengths")


class TokenStream(Protocol):
    """A row of places, each with some packed sequences."""

    @property
    def key(self) -> str:
        """Of all that the sequences depend on."""
        ...

    def dataset(self, first_place: int, sequences: int, record: str) -> Dataset:
        """Rows with `input_ids`, `document_lengths`, `place` and `failure`, in the order of places."""
        ...

    def counts(self, record: str, places: int) -> dict[str, int]:
        """What became of the documents of the first places."""
        ...


def dataset_from_checkpoint(stream: TokenStream, run: StoragePath, sequences: int) -> Dataset:
    """The stream from where the newest sound checkpoint of a run ends.

    :param sequences: how many the whole run reads.
    """
    newest = checkpoints.newest_sound(run, lambda _: None)
    return stream.dataset(newest.manifest.metrics[PLACE] if newest else 0, sequences, (run / RECORD).address)


class StreamedBatches:
    """A worker's share of the global batches.

    :param shard: this worker's part of the stream; all workers' parts have equally many rows.
    :param sequences: that this worker reads in a step.
    :param seed: of the objective's noise.
    """

    def __init__(self, shard: DataIterator, objective: SelfSupervision, sequences: int, seed: int) -> None:
        self._batches = self._read(shard, sequences)
        self._objective, self._seed = objective, seed
        self._place = 0

    def micro_batches(self, step: int, rank: int, world_size: int, count: int) -> list[MicroBatch]:
        rows = next(self._batches)
        self._place = rows[PLACE][-1].as_py()
        ids, lengths = (rows[name].combine_chunks().to_numpy(zero_copy_only=False) for name in _COLUMNS)
        noise = [(self._seed, step, rank, row) for row in range(len(rows))]
        parts = np.array_split(np.arange(len(rows)), count)

        def made(part: NDArray[np.int64]) -> MicroBatch:
            return self._objective.micro_batch(
                [ids[row].astype(np.int64) for row in part],
                [lengths[row].astype(np.int64) for row in part],
                [noise[row] for row in part],
            )

        # Each forward and backward pass is a collective that every rank has to join.
        return [made(part) if len(part) else made(parts[0][:1]).unlabelled() for part in parts]

    def position(self, device: torch.device) -> dict[str, int]:
        """Where to continue: at the place that the slowest worker is in. A collective of all workers."""
        import torch
        import torch.distributed as dist

        # Each worker reads in the order of places: none that lies before its own will come.
        place = torch.tensor(self._place, device=device)
        dist.all_reduce(place, dist.ReduceOp.MIN)
        return {PLACE: int(place)}

    def _read(self, shard: DataIterator, sequences: int) -> Iterator[pa.Table]:
        while True:
            is_empty = True
            for rows in shard.iter_batches(batch_size=sequences, batch_format="pyarrow", drop_last=True):
                failures = rows["failure"].drop_null()
                if len(failures):
                    raise InputError(failures[0].as_py())
                yield rows
                is_empty = False
            if is_empty:
                raise InputError("corpus: the documents of the stream are too few for one step")
