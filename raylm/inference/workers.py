"""Who answers a job's chunks: engine actors under Ray Data, or the replicas of the running service."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from raylm.capacity import machines
from raylm.errors import RaylmError, to_plain
from raylm.inference.answers import Answer, Decoder, answer_rows
from raylm.inference.chunks import Chunk, Job, answer_chunk, counts_of, read_part
from raylm.inference.engines import load_engine
from raylm.inference.engines.cache import RememberingEngine
from raylm.inference.model import ModelInfo
from raylm.inference.quarantine import Tries
from raylm.progress import hushed
from raylm.settings import DecodeSettings, Topology
from raylm.storage import persistently

_MOST_BLOCKS = 2_000
REQUESTS = 8
"""Chunks that are with the service at once: enough for its replicas never to wait."""

# ---------------------------------------------------------------------------------- on engine actors


class ChunkWorker:
    """An actor of Ray Data that answers chunks; it loads its engine with the first one.

    What the user can mend comes back as a row with `failure`, so that it is told without Ray's stack traces.
    """

    def __init__(self, job: Job, model: str, decode: DecodeSettings, device: Literal["cpu", "cuda"]) -> None:
        self._job, self._model, self._decode, self._device = job, model, decode, device
        self._engine: Decoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        counts: dict[str, Any] = {
            "rows": 0, "errors": 0, "first_error": "", "output_tokens": 0, "failure": "", "reason": "",
        }  # fmt: skip
        try:
            chunk = self._job.chunks[int(batch["chunk"][0])]
            counts |= self._answered(chunk)
        except RaylmError as error:
            counts |= to_plain(error)
        return {name: [value] for name, value in counts.items()}

    def _answered(self, chunk: Chunk) -> dict[str, Any]:
        """The counts of a chunk after its part is published."""
        place, part = self._job.tries(chunk), self._job.part(chunk)
        if persistently(place, lambda: place.is_file() and part.is_file()):
            # Done by a worker that died over a later chunk of its block, which Ray Data hands out as a whole.
            return counts_of(self._job, chunk, persistently(part, lambda: read_part(self._job, chunk)))
        tries = persistently(place, partial(Tries.note_one, place))
        if self._engine is None:
            engine = load_engine(ModelInfo.load(self._model), self._decode, self._device)
            # Where answers are drawn, equal rows have answers of their own.
            self._engine = engine if self._decode.temperature else RememberingEngine(engine)
        return answer_chunk(self._job, chunk, partial(answer_rows, self._engine), tries)


def plan_workers(
    wanted: int | tuple[int, int] | Literal["auto"], chunks: int, topology: Topology | None = None
) -> tuple[tuple[int, int], Literal["cpu", "cuda"]]:
    """The fewest and the most engine actors, and what each computes on.

    :param topology: what the cluster file lets the cluster grow to.
    """
    import ray

    gpus, cpus = sum(machines("GPU", topology)), sum(machines("CPU", topology))
    up = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 0))
    return workers_of(wanted, chunks, up, max(gpus or cpus, 1)), "cuda" if gpus else "cpu"


def workers_of(wanted: int | tuple[int, int] | Literal["auto"], chunks: int, up: int, to_come: int) -> tuple[int, int]:
    """The fewest and the most engine actors, no more than there are chunks.

    :param up: how many the machines that are up have room for.
    :param to_come: how many there may be room for where none is up yet.
    """
    if wanted == "auto":
        wanted = up or (1, to_come)
    fewest, most = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    return min(fewest, chunks), min(most, chunks)


def answer_on_actors(
    job: Job,
    left: list[Chunk],
    model: str,
    decode: DecodeSettings,
    workers: tuple[int, int],
    device: Literal["cpu", "cuda"],
) -> Iterator[dict[str, Any]]:
    """Counts of each chunk as it gets done. A killed worker is replaced, and its chunk done again.

    :param workers: the fewest and the most.
    """
    import ray.data
    import ray.exceptions

    numbers = {chunk: number for number, chunk in enumerate(job.chunks)}
    with _quiet_ray_data():
        chunks = ray.data.from_items(
            [{"chunk": numbers[chunk]} for chunk in left], override_num_blocks=min(len(left), _MOST_BLOCKS)
        )
        answered = chunks.map_batches(
            ChunkWorker,
            batch_size=1,
            batch_format="numpy",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(min_size=workers[0], max_size=workers[1]),
            fn_constructor_args=(job, model, decode, device),
            num_cpus=1,
            num_gpus=1 if device == "cuda" else None,
        )
        try:
            yield from answered.iter_rows()
        except ray.exceptions.RayError as error:
            cause = " ".join(str(error.__cause__ or error).split())
            raise RaylmError(
                f"batch-{job.task.name}: a worker failed: {cause[-400:]};"
                " what is done is kept, the same command goes on from there"
            ) from error


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without its own progress bars and notices, for the datasets made inside."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    with (
        hushed("ray.data", logging.WARNING),
        hushed("ray.data._internal.progress", logging.ERROR),
        DataContext.current(context),
    ):
        yield


# ------------------------------------------------------------------------------- through the service


def answer_through_service(job: Job, left: list[Chunk], answer: Answer) -> Iterator[dict[str, Any]]:
    """Counts of each chunk as it gets done by the service's replicas; rows are read and parts written here."""

    with ThreadPoolExecutor(REQUESTS) as pool:
        futures = [pool.submit(answer_chunk, job, chunk, answer) for chunk in left]
        try:
            for future in as_completed(futures):
                yield dict(future.result())
        finally:
            for future in futures:
                future.cancel()
