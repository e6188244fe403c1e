"""The outputs of a job whose chunks are all done, and what its manifest says of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raylm.errors import RaylmError, first_line, from_plain, to_plain
from raylm.inference.chunks import Chunk, Job, read_chunk, read_part
from raylm.inference.io import InputFile, InputTable, format_of
from raylm.inference.output import write_output
from raylm.storage import MANIFEST, Manifest, StoragePath

_SAMPLES = 3
_SAMPLED_CHUNKS = 4
_SHARED_ROWS = 1_000_000
"""From so many on, the files of a job are put together on all machines: starting processes there takes seconds."""


class _Tally:
    """What is counted of answers on their way to the outputs."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(rows=0, answered=0, errors=0, truncated=0)
        self.reasons: Counter[str] = Counter()
        self.quality: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter(source_tokens=0, output_tokens=0)

    def update(self, other: _Tally) -> None:
        self.counts.update(other.counts)
        self.reasons.update(other.reasons)
        self.quality.update(other.quality)
        self.tokens.update(other.tokens)

    def add(self, part: pa.RecordBatch) -> None:
        errors = [reason for reason in part["error"].to_pylist() if reason is not None]
        self.counts.update(
            rows=part.num_rows,
            answered=part.num_rows - len(errors),
            errors=len(errors),
            truncated=pc.sum(part["truncated"]).as_py() or 0,
        )
        self.reasons.update(reason.partition(":")[0] for reason in errors)
        if "quality" in part.schema.names:
            self.quality.update(flag for found in part["quality"].to_pylist() if found for flag in found.split(", "))
        for name in self.tokens:
            self.tokens[name] += pc.sum(part[name]).as_py() or 0


def assemble(
    job: Job,
    files: list[InputFile],
    places: list[StoragePath],
    target: StoragePath,
    work: StoragePath,
    has_machines: bool = False,
) -> Manifest:
    """What the manifest says of the outputs, each published whole, streamed from its input and its parts.

    :param places: of the outputs, one for each file.
    :param target: the output; where it is a directory, what an earlier job left in it and this one does not write goes.
    :param work: the job's directory, with the manifest of that earlier job.
    :param has_machines: those that answered the job are free for putting much of it together.
    :raises OutputError: a place is read-only or full; whatever was there before stays.
    """
    old = Manifest.read(work)
    (work / MANIFEST).delete()
    tally = _Tally()
    outputs = []
    is_shared = has_machines and len(places) > 1 and job.rows >= _SHARED_ROWS
    for output, counted in _written_by_all(job, places) if is_shared else _written(job, places):
        outputs.append(output)
        tally.update(counted)
    for place in outdated(old.outputs if old else [], places, target):
        place.delete()
    inputs = [
        {"path": str(file.place), "rows": table.rows, "bytes": file.bytes, "fingerprint": file.identity}
        for file, table in zip(files, job.tables, strict=True)
    ]
    told = {"error_reasons": dict(tally.reasons.most_common()), "quality": dict(tally.quality.most_common())}
    return Manifest(
        stage=f"batch-{job.task.name}",
        inputs={"files": inputs},
        outputs=outputs,
        counts={**tally.counts, **told},
        metrics=dict(tally.tokens),
        samples=_samples(job),
    )


def outdated(old: list[dict[str, Any]], places: list[StoragePath], target: StoragePath) -> list[StoragePath]:
    """What an earlier job wrote into a directory and this one does not; not elsewhere: the directory may be a copy.

    :param old: the earlier job's outputs, whose addresses have no passwords.
    :param places: of this one's outputs.
    """
    inside, kept = f"{target.path.rstrip('/')}/", {place.path for place in places}
    paths = [StoragePath(output["path"]).path for output in old]
    return [target / path.removeprefix(inside) for path in paths if path.startswith(inside) and path not in kept]


_Written = tuple[dict[str, Any], _Tally]
"""An output, and what was counted on its way."""


def _written(job: Job, places: list[StoragePath]) -> Iterator[_Written]:
    """Each output as it is published, in order."""
    for table, chunks, place in zip(job.tables, _by_file(job), places, strict=True):
        yield _write(job, table, chunks, place)


def _written_by_all(job: Job, places: list[StoragePath]) -> Iterator[_Written]:
    """The same, by all machines at once.

    :raises RaylmError: one cannot be written, or its machine is lost too often.
    """
    import ray
    import ray.exceptions

    write = ray.remote(num_cpus=1)(_write_or_say_why)
    shared = ray.put(replace(job, chunks=(), tables=()))
    files = zip(job.tables, _by_file(job), places, strict=True)
    most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    running = deque(write.remote(shared, *file) for file in islice(files, most))
    try:
        while running:
            found = ray.get(running[0])
            if isinstance(found, dict):
                raise from_plain(found)
            yield found
            running.popleft()
            running.extend(write.remote(shared, *file) for file in islice(files, 1))
    except ray.exceptions.RayError as error:
        raise RaylmError(
            f"batch-{job.task.name}: an output was not written: {first_line(error)};"
            " what is done is kept, the same command goes on from there"
        ) from error
    finally:
        # Nothing is published after its job has ended. Ray's `cancel` would be quicker, but aborts this very process
        # when a task ends meanwhile (Ray 2.60, "Tried to complete task that was not pending").
        if running:
            ray.wait(list(running), num_returns=len(running))


def _by_file(job: Job) -> list[list[Chunk]]:
    found: list[list[Chunk]] = [[] for _ in job.tables]
    for chunk in job.chunks:
        found[chunk.file].append(chunk)
    return found


def _write_or_say_why(
    job: Job, table: InputTable, chunks: list[Chunk], place: StoragePath
) -> _Written | dict[str, Any]:
    """`_write` as a task of Ray, without Ray's stack traces."""
    try:
        return _write(job, table, chunks, place)
    except RaylmError as error:
        return to_plain(error)


def _write(job: Job, table: InputTable, chunks: list[Chunk], place: StoragePath) -> _Written:
    """Publish the output of one file."""
    tally = _Tally()
    rows = sum(chunk.rows for chunk in chunks)
    write_output(table, rows, _answers(job, chunks, tally), place, format_of(place.name))
    return {"path": str(place), "rows": rows, "bytes": place.info().size}, tally


def _answers(job: Job, chunks: list[Chunk], tally: _Tally) -> Iterator[pa.RecordBatch]:
    """The result columns of some chunks in order, counted on their way, with an empty batch before them."""
    yield pa.record_batch([pa.array([], field.type) for field in job.results], job.results)
    for chunk in chunks:
        part = read_part(job, chunk)
        tally.add(part)
        yield part.select(job.results.names)


def _samples(job: Job) -> list[dict[str, Any]]:
    """The first rows that have an answer, for a person to look at."""
    found = chain.from_iterable(_answered(job, chunk) for chunk in job.chunks[:_SAMPLED_CHUNKS])
    return list(islice(found, _SAMPLES))


def _answered(job: Job, chunk: Chunk) -> Iterator[dict[str, Any]]:
    answers = read_part(job, chunk)[job.task.column].to_pylist()
    for row, answer in zip(read_chunk(job, chunk).values, answers, strict=True):
        if answer is not None:
            yield {"source": row[0], "output": answer}
