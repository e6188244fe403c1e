"""A batch job as a list of chunks: what its rows are, where results go, and which chunks are done.

A chunk is a range of rows of one input file. Its result is a part file, published whole: a chunk is done when
its part is there. Parts stand below `<output>.raylm/parts/<key>`, where the key is a hash over all that decides
the answers, so that a job with another model, input or setting never takes them for its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from raylm.errors import InputError, OutputError
from raylm.inference.engines import Decode, Output, answer_texts
from raylm.inference.io import (
    FORMATS,
    InputFile,
    InputTable,
    choose_column,
    is_glob,
    open_table,
    read_texts,
    suffix_of,
)
from raylm.inference.quarantine import Tries, answer_one_by_one
from raylm.settings import DecodeSettings
from raylm.storage import Manifest, StoragePath, fingerprint
from raylm.tasks import TASKS, Task

RESULT_VERSION = 1
"""Raised when the same model and settings would give other answers than before."""

_LEAST_CHUNKS = 8
_LEAST_ROWS = 32


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

    task_name: str
    prompt_token: str | None
    tables: tuple[InputTable, ...]
    columns: tuple[str, ...]
    """The text column of each table."""
    chunks: tuple[Chunk, ...]
    parts_uri: str

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

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
        there = set()
        for place, _ in StoragePath(self.parts_uri).list():
            there.add(place.name)
            if place.name.endswith(".tries"):
                place.delete()
        return [chunk for chunk in self.chunks if chunk.name not in there]


def job_key(files: Sequence[InputFile], model_fingerprint: str, decode: DecodeSettings, asked: dict[str, Any]) -> str:
    """The hash over all that decides the answers: the files, the model, how it decodes, what is asked."""
    facts = {
        "version": RESULT_VERSION,
        "files": [(file.relative, file.identity) for file in files],
        "model": model_fingerprint,
        "decode": decode.model_dump(),
        **asked,
    }
    return fingerprint(facts)


def plan_chunks(rows: Sequence[int], chunk_rows: int) -> Iterator[Chunk]:
    """The chunks of files with so many rows each; small inputs get smaller ones, so that workers share them.

    Does not depend on the number of workers: a job resumes on a cluster of another size.
    """
    size = min(chunk_rows, max(_LEAST_ROWS, -(-sum(rows) // _LEAST_CHUNKS)))
    for file, count in enumerate(rows):
        for start in range(0, count, size):
            yield Chunk(file, start, min(start + size, count))


def plan_job(
    files: Sequence[InputFile],
    task: Task,
    prompt_token: str | None,
    column: str | None,
    limit: int | None,
    chunk_rows: int,
    work: StoragePath,
    key: str,
) -> Job:
    """The job over the first `limit` rows of the files.

    :raises InputError: a file is unreadable, has no fitting text column, or already has a result column.
    """
    tables, columns, rows = [], [], []
    left = limit
    for file in files:
        table = open_table(file, work)
        columns.append(choose_column(table, column))
        _check_result_columns(table, task)
        tables.append(table)
        rows.append(table.rows if left is None else min(table.rows, left))
        left = None if left is None else left - rows[-1]
    chunks = tuple(plan_chunks(rows, chunk_rows))
    parts = work / "parts" / key
    return Job(task.name, prompt_token, tuple(tables), tuple(columns), chunks, parts.uri)


def _check_result_columns(table: InputTable, task: Task) -> None:
    for name in result_schema(task).names:
        if name in table.columns.names:
            raise InputError(
                f"{table.file.place}: has a column '{name}' already, where a result would go; rename or drop it"
            )


# ---------------------------------------------------------------------------------------------- parts


def result_schema(task: Task) -> pa.Schema:
    """The columns that a job adds to its input's."""
    return pa.schema([(task.column, pa.string()), ("error", pa.string()), ("truncated", pa.bool_())])


def answer_chunk(job: Job, chunk: Chunk, decode: Decode, tries: Tries | None = None) -> dict[str, int]:
    """Answer a chunk's rows and publish its part; gives back its counts.

    :param tries: how often workers have begun this chunk, where they may die over it.
    :raises InputError: the input became unreadable.
    :raises OutputError: the part cannot be written.
    """
    texts = read_texts(job.tables[chunk.file], job.columns[chunk.file], chunk.start, chunk.stop)
    if tries and tries.is_careful:
        place = job.tries(chunk)
        answers = answer_one_by_one(decode, job.task, texts.values, job.prompt_token, tries, place)
    else:
        answers = answer_texts(decode, job.task, texts.values, job.prompt_token)
    outputs = [
        Output(None, problem) if problem else answer for answer, problem in zip(answers, texts.problems, strict=True)
    ]
    results = result_schema(job.task)
    columns = {
        results.names[0]: pa.array([output.text for output in outputs], pa.string()),
        results.names[1]: pa.array([output.error for output in outputs], pa.string()),
        results.names[2]: pa.array([output.truncated for output in outputs], pa.bool_()),
        "source_tokens": pa.array([output.source_tokens for output in outputs], pa.int64()),
        "output_tokens": pa.array([output.output_tokens for output in outputs], pa.int64()),
    }
    batch = pa.record_batch(columns)
    with job.part(chunk).writing() as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return {
        "rows": len(outputs),
        "errors": sum(output.error is not None for output in outputs),
        "output_tokens": sum(output.output_tokens for output in outputs),
    }


def read_part(job: Job, chunk: Chunk) -> pa.RecordBatch:
    """The answers of a chunk, with their token counts."""
    with job.part(chunk).open_input() as stream:
        return pa.ipc.open_file(stream).get_batch(0)


# -------------------------------------------------------------------------------------------- outputs


def output_place(pattern: str, files: Sequence[InputFile], task: Task, output: str | None) -> StoragePath:
    """Where a job's result goes: a file for a file, a directory for a directory or a glob.

    :raises OutputError: none can be told, it would replace or lie in its input, or its suffix says nothing.
    """
    place = StoragePath(pattern)
    if place.is_file():
        stem = place.name[: len(place.name) - len(suffix_of(place.name))]
        name = f"{stem}.{task.done}{suffix_of(place.name)}"
        target = StoragePath(output) if output else place.parent / name
        if output and (output.endswith("/") or target.is_dir()):
            target = target / name
        if suffix_of(target.name) not in FORMATS:
            raise OutputError(f"--output {output}: its suffix should be one of {', '.join(FORMATS)}")
        if target.path == place.path:
            raise OutputError(f"--output {output}: is the input itself")
        return target
    if is_glob(pattern) and not output:
        raise OutputError(f"{pattern}: name a directory for the results with --output")
    target = StoragePath(output.rstrip("/") if output else f"{pattern.rstrip('/')}.{task.done}")
    if suffix_of(target.name) in FORMATS or target.is_file():
        raise OutputError(f"--output {output}: {len(files)} input files give a directory, this names a file")
    if (PurePosixPath(target.path) / "x").is_relative_to(place.path):
        raise OutputError(f"--output {output}: lies in its own input {place}")
    return target


def output_files(target: StoragePath, files: Sequence[InputFile], pattern: str) -> list[StoragePath]:
    """The output file of each input file."""
    return [target] if StoragePath(pattern).is_file() else [target / file.relative for file in files]


def work_directory(target: StoragePath) -> StoragePath:
    """Where a job keeps its parts, and in the end its manifest: beside its output."""
    return target.parent / f"{target.name}.raylm"


def finished_manifest(target: StoragePath, key: str) -> Manifest | None:
    """The manifest of the same job, where it has been done and its outputs still are what it wrote."""
    manifest = Manifest.read(work_directory(target))
    if manifest is None or manifest.settings.get("key") != key:
        return None
    for output in manifest.outputs:
        info = StoragePath(output["path"]).info()
        if not info.is_file or info.size != output["bytes"]:
            return None
    return manifest


def claim_output(target: StoragePath, key: str, overwrite: bool) -> StoragePath:
    """The work directory, made for this job; parts of other jobs for the same output are gone.

    :raises OutputError: something else is at the output's place, or it cannot be written to.
    """
    work = work_directory(target)
    note = work / "job.json"
    is_mine = note.is_file() and note.read_json().get("key") == key
    if not (is_mine or overwrite) and (target.is_file() or target.list()):
        old = Manifest.read(work)
        if old is None:
            why = "made elsewhere"
        elif old.settings.get("key") == key:
            why = "changed since it was made"
        else:
            why = "made by another model, input or setting"
        raise OutputError(f"{target}: exists already, {why}; use --overwrite or --output")
    work.mkdir()
    note.write_json({"key": key})
    for stale, _ in (work / "parts").list():
        if stale.name != key:
            stale.delete()
    return work
