"""A batch job as a list of chunks: what its rows are, and which chunks are done.

A chunk is a range of rows of one input file. Its result is a part file, published whole: a chunk is done when
its part is there. Parts stand below `<output>.raylm/parts/<key>`, where the key is a hash over all that decides
the answers, so that a job with another model, input or setting never takes them for its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raylm.errors import InputError
from raylm.inference import watchdog
from raylm.inference.answers import Answer, Output, Row, answer_each
from raylm.inference.io import (
    FieldRows,
    InputFile,
    InputTable,
    check_same_columns,
    choose_columns,
    open_table,
    read_fields,
)
from raylm.inference.prompts import Prompt
from raylm.inference.quality import flags
from raylm.inference.quarantine import Tries, answer_one_by_one
from raylm.settings import BatchSettings, DecodeSettings
from raylm.storage import StoragePath, at_once, fingerprint, persistently
from raylm.tasks import CLASSIFY, TASKS, Task

RESULT_VERSION = 2
"""Raised when the same model and settings would give other answers than before."""

_LEAST_CHUNKS = 8
_LEAST_ROWS = 32
_MOST_CHUNKS = 50_000
"""Each is a file and some requests to its storage, so that those of larger jobs have more rows."""


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of the input file with number `file`."""

    file: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        """The file name of its part."""
        return f"part-{self.file:05d}-{self.start:012d}-{self.stop:012d}.arrow"


@dataclass(frozen=True)
class Job:
    """All that a worker needs to answer any chunk."""

    prompt: Prompt
    tables: tuple[InputTable, ...]
    columns: tuple[tuple[str, ...], ...]
    """The columns of each table that the prompt reads."""
    chunks: tuple[Chunk, ...]
    parts_uri: str
    results: pa.Schema
    """The columns that it adds to its input's."""
    row_limit_s: float
    """How long a worker may take for a row, or for a batch of rows in its engine."""

    @property
    def task(self) -> Task:
        return TASKS[self.prompt.task]

    @property
    def rows(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)

    def part(self, chunk: Chunk) -> StoragePath:
        return StoragePath(self.parts_uri) / chunk.name

    def tries(self, chunk: Chunk) -> StoragePath:
        """Where workers note that they begin a chunk."""
        return StoragePath(self.parts_uri) / f"{chunk.name}.tries"

    def unfinished(self) -> list[Chunk]:
        """The chunks whose parts are not there, in order. An earlier run's notes of its tries are deleted."""
        there = {place.name: place for place, _ in StoragePath(self.parts_uri).list()}
        at_once(StoragePath.delete, [place for name, place in there.items() if name.endswith((".tries", ".hung"))])
        return [chunk for chunk in self.chunks if chunk.name not in there]


def job_key(files: Sequence[InputFile], model_fingerprint: str, decode: DecodeSettings, asked: dict[str, Any]) -> str:
    """The hash over all that decides the answers: the files, the model, how it decodes, what is asked."""
    facts = {
        "version": RESULT_VERSION,
        "files": [(file.relative, file.identity) for file in files],
        "model": model_fingerprint,
        "decode": decode.model_dump(exclude={"batch_tokens"}),
        **asked,
    }
    return fingerprint(facts)


def plan_chunks(rows: Sequence[int], chunk_rows: int) -> Iterator[Chunk]:
    """The chunks of files with so many rows each; small inputs get smaller ones, so that workers share them, and very
    large ones larger, so that there are not too many.

    Does not depend on the number of workers: a job resumes on a cluster of another size.
    """
    total = sum(rows)
    size = max(min(chunk_rows, max(_LEAST_ROWS, -(-total // _LEAST_CHUNKS))), -(-total // _MOST_CHUNKS))
    for file, count in enumerate(rows):
        for start in range(0, count, size):
            yield Chunk(file, start, min(start + size, count))


def plan_job(
    files: Sequence[InputFile],
    prompt: Prompt,
    columns: Mapping[str, str],
    limit: int | None,
    settings: BatchSettings,
    work: StoragePath,
    key: str,
) -> Job:
    """The job over the first `limit` rows of the files.

    :param columns: which column a field of the prompt is, where that is not the one of its own name.
    :raises InputError: a file is unreadable, has no fitting column, or already has a result column.
    """
    results = result_schema(TASKS[prompt.task], settings.decode.scores)
    footers = [file for file in files if file.format == "parquet"]  # other formats are read as a whole, one by one
    opened = dict(zip(footers, at_once(lambda file: open_table(file, work), footers), strict=True))
    tables = [opened.get(file) or open_table(file, work) for file in files]
    chosen, rows = [], []
    left = limit
    for table in tables:
        chosen.append(choose_columns(table, prompt, columns))
        _check_result_columns(table, results)
        rows.append(table.rows if left is None else min(table.rows, left))
        left = None if left is None else left - rows[-1]
    check_same_columns(tables)
    chunks = tuple(plan_chunks(rows, settings.chunk_rows))
    return Job(prompt, tuple(tables), tuple(chosen), chunks, (work / "parts" / key).uri, results, settings.row_limit_s)


def _check_result_columns(table: InputTable, results: pa.Schema) -> None:
    for name in results.names:
        if name in table.columns.names:
            raise InputError(
                f"{table.file.place}: has a column '{name}' already, where a result would go; rename or drop it"
            )


# ---------------------------------------------------------------------------------------------- parts


def result_schema(task: Task, with_scores: bool) -> pa.Schema:
    """The columns that a job adds to its input's; a label always has its score, a text what is odd about it."""
    columns = [(task.column, pa.string()), ("error", pa.string()), ("truncated", pa.bool_())]
    if with_scores or task == CLASSIFY:
        columns.append(("score", pa.float32()))
    if task != CLASSIFY:
        columns.append(("quality", pa.string()))
    return pa.schema(columns)


def read_chunk(job: Job, chunk: Chunk) -> FieldRows:
    """What a chunk's rows say in the columns that the prompt reads.

    :raises InputError: the input became unreadable.
    """
    table, columns = job.tables[chunk.file], job.columns[chunk.file]
    is_worded = job.prompt.template is not None
    return persistently(table.file.place, lambda: read_fields(table, columns, chunk.start, chunk.stop, is_worded))


def answer_chunk(job: Job, chunk: Chunk, answer: Answer, tries: Tries | None = None) -> dict[str, Any]:
    """Answer a chunk's rows and publish its part; gives back its counts.

    :param tries: how often workers have begun this chunk, where they may die over it.
    :raises InputError: the input became unreadable.
    :raises OutputError: the part cannot be written.
    """
    rows = read_chunk(job, chunk)
    note = job.tries(chunk)
    with watchdog.watching(job.row_limit_s, watchdog.mark_of(note)) if tries else nullcontext():
        if tries and tries.is_careful:
            answers = answer_one_by_one(
                partial(answer_each, answer), rows.values, job.prompt, tries, note, job.row_limit_s
            )
        else:
            answers = answer_each(answer, rows.values, job.prompt)
    outputs = [
        Output(None, problem) if problem else output for output, problem in zip(answers, rows.problems, strict=True)
    ]
    values = {
        job.task.column: [output.text for output in outputs],
        "error": [output.error for output in outputs],
        "truncated": [output.truncated for output in outputs],
        "score": [output.score for output in outputs],
        "quality": [_quality(job.prompt, row, output) for row, output in zip(rows.values, outputs, strict=True)],
        "source_tokens": [output.source_tokens for output in outputs],
        "output_tokens": [output.output_tokens for output in outputs],
    }
    schema = pa.schema([*job.results, ("source_tokens", pa.int64()), ("output_tokens", pa.int64())])
    batch = pa.record_batch([pa.array(values[field.name], field.type) for field in schema], schema)
    persistently(job.part(chunk), lambda: _publish(batch, job.part(chunk)))
    return counts_of(job, chunk, batch)


def counts_of(job: Job, chunk: Chunk, part: pa.RecordBatch) -> dict[str, Any]:
    """What the progress of a job is told of a chunk's answers."""
    errors = part["error"].to_pylist()
    failed = [number for number, error in enumerate(errors) if error is not None]
    place = job.tables[chunk.file].file.place
    return {
        "rows": part.num_rows,
        "errors": len(failed),
        "first_error": f"{place}, row {chunk.start + failed[0]}: {errors[failed[0]]}" if failed else "",
        "output_tokens": pc.sum(part["output_tokens"]).as_py() or 0,
    }


def _quality(prompt: Prompt, row: Row, output: Output) -> str | None:
    return None if output.text is None else ", ".join(flags(prompt, row, output.text)) or None


def _publish(batch: pa.RecordBatch, part: StoragePath) -> None:
    with part.writing() as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_part(job: Job, chunk: Chunk) -> pa.RecordBatch:
    """The answers of a chunk, with their token counts."""
    with job.part(chunk).open_input() as stream:
        return pa.ipc.open_file(stream).get_batch(0)
