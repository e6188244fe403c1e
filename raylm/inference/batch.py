"""Batch jobs: every row of a table or of a directory of tables answered by a model, on all workers of the cluster.

`run_batch` reads top to bottom: find the input, load what the model says of itself, see whether the job is done
already, plan its chunks, answer those that are not done, put the parts together, write the manifest.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from raylm import errors
from raylm.errors import RaylmError
from raylm.inference.chunks import (
    Chunk,
    Job,
    answer_chunk,
    claim_output,
    finished_manifest,
    job_key,
    output_files,
    output_place,
    plan_job,
    read_part,
    result_schema,
)
from raylm.inference.engines import Engine
from raylm.inference.estimate import estimate
from raylm.inference.io import InputFile, format_of, list_inputs, read_texts
from raylm.inference.model import ModelInfo, absolute
from raylm.inference.output import write_output
from raylm.inference.quarantine import Tries
from raylm.progress import Progress
from raylm.settings import DecodeSettings, Settings
from raylm.storage import MANIFEST, Manifest, Stopwatch, StoragePath
from raylm.tasks import Task

_SAMPLES = 3
_MOST_BLOCKS = 2_000


def run_batch(
    settings: Settings,
    task: Task,
    input: str,
    *,
    model: str | None = None,
    column: str | None = None,
    source_language: str | None = None,
    to: str | None = None,
    output: str | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    through: Literal["actors", "serve"] = "actors",
    dry_run: bool = False,
    connect: Callable[[], object] | None = None,
) -> Manifest:
    """The manifest of a finished job; of an earlier one where the same job has been done before.

    :param input: a Parquet, JSON Lines or CSV file, a directory or a glob; local or on any storage.
    :param model: the model's directory; default: `<storage>/models/<model.name>`, or with `serve` what is served.
    :param column: the text column; default: the only one that holds text.
    :param to: the target language; default: the model's only one.
    :param output: a file, or a directory where the input is several files; its suffix decides the format.
    :param limit: only the first rows.
    :param through: own engine actors, or the replicas of a running `raylm serve`.
    :param dry_run: decode a sample only, and estimate the whole; nothing is written.
    :param connect: called before Ray is first needed, so that bad input and finished jobs cost no Ray.
    :raises InputError: the input is missing, malformed, or has no fitting column.
    :raises ArtifactError: the model is none, or was not made for the task or language.
    :raises OutputError: the output exists, or cannot be written.
    """
    watch = Stopwatch()
    input = absolute(input)
    output = absolute(output) if output else None
    model = absolute(model) if model else None
    files = list_inputs(input)
    target = output_place(input, files, task, output)
    call_service = None
    decode = settings.batch.decode
    if through == "serve":
        from raylm.inference.serve import connect_to_service

        if connect:
            connect()
        info, decode, call_service = connect_to_service(model)
    else:
        info = ModelInfo.load(model or absolute(f"{settings.storage}/models/{settings.model.name}"))
    prompt_token = info.prompt_token(task, to, source_language)
    asked = {"task": task.name, "prompt_token": prompt_token, "column": column, "limit": limit}
    key = job_key(files, info.fingerprint, decode, asked)
    if dry_run:
        return estimate(settings.batch, task, info, prompt_token, files, column, limit)
    if finished := finished_manifest(target, key):
        return finished

    work = claim_output(target, key, overwrite)
    job = plan_job(files, task, prompt_token, column, limit, settings.batch.chunk_rows, work, key)
    left = job.unfinished()
    workers = 0
    if left:
        if call_service:
            workers, done = _REQUESTS, _answer_through_service(job, left, call_service)
        else:
            if connect:
                connect()
            workers, device = _workers(settings.batch.workers, len(left))
            done = _answer_on_actors(job, left, info.uri, decode, workers, device)
        _follow(job, left, done)
    manifest = _assemble(job, files, output_files(target, files, input), work)
    manifest.settings = {
        "key": key,
        **asked,
        "column": job.columns[0],
        "to": to,
        "model": info.uri,
        "model_fingerprint": info.fingerprint,
        "decode": decode.model_dump(),
        "chunk_rows": settings.batch.chunk_rows,
        "through": through,
        "workers": workers,
    }
    _add_speed(manifest, job, left, watch)
    manifest.write(work)
    (work / "job.json").delete()
    for place, _ in work.list():
        if place.name != MANIFEST:
            place.delete()
    return manifest


def _follow(job: Job, left: list[Chunk], done: Iterator[dict[str, Any]]) -> None:
    """Show how the chunks are getting done, until all are."""
    rows = job.rows - sum(chunk.rows for chunk in left)
    failed = tokens = 0
    watch = Stopwatch()
    with Progress(f"batch-{job.task_name}", job.rows, "rows") as progress:
        progress.resume_at(rows)
        for counts in done:
            if counts.get("failure"):
                raise getattr(errors, counts["failure"])(counts["reason"])
            rows += counts["rows"]
            failed += counts["errors"]
            tokens += counts["output_tokens"]
            speed = tokens / max(watch.elapsed_s, 1e-3)
            progress.update(rows, f"{speed:,.0f} tokens/s" + (f"  {failed:,} errors" if failed else ""))


# ---------------------------------------------------------------------------------- on engine actors


class ChunkWorker:
    """An actor of Ray Data that answers chunks; it loads its engine with the first one.

    What the user can mend comes back as a row with `failure`, so that it is told without Ray's stack traces.
    """

    def __init__(self, job: Job, model: str, decode: DecodeSettings, device: Literal["cpu", "cuda"]) -> None:
        self._job, self._model, self._decode, self._device = job, model, decode, device
        self._engine: Engine | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        counts: dict[str, Any] = {"rows": 0, "errors": 0, "output_tokens": 0, "failure": "", "reason": ""}
        try:
            chunk = self._job.chunks[int(batch["chunk"][0])]
            tries = Tries.note_one(self._job.tries(chunk))
            if self._engine is None:
                self._engine = Engine(ModelInfo.load(self._model), self._decode, self._device, threads=1)
            counts |= answer_chunk(self._job, chunk, self._engine.decode, tries)
        except RaylmError as error:
            counts |= {"failure": type(error).__name__, "reason": str(error)}
        return {name: [value] for name, value in counts.items()}


def _workers(wanted: int | Literal["auto"], chunks: int) -> tuple[int, Literal["cpu", "cuda"]]:
    """How many engine actors, and what each computes on."""
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    most = (gpus or max(cpus, 1)) if wanted == "auto" else wanted
    return min(most, chunks), "cuda" if gpus else "cpu"


def _answer_on_actors(
    job: Job,
    left: list[Chunk],
    model: str,
    decode: DecodeSettings,
    workers: int,
    device: Literal["cpu", "cuda"],
) -> Iterator[dict[str, Any]]:
    """Counts of each chunk as it gets done. A killed worker is replaced, and its chunk done again."""
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
            compute=ray.data.ActorPoolStrategy(size=workers),
            fn_constructor_args=(job, model, decode, device),
            num_cpus=1,
            num_gpus=1 if device == "cuda" else None,
        )
        try:
            yield from answered.iter_rows()
        except ray.exceptions.RayError as error:
            cause = " ".join(str(error.__cause__ or error).split())
            raise RaylmError(
                f"batch-{job.task_name}: a worker failed: {cause[-400:]}; what is done is kept, the same command"
                " goes on from there"
            ) from error


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without its own progress bars and notices, for the datasets made inside."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    loggers = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name, level in loggers.items():
        logging.getLogger(name).setLevel(level)
    try:
        with DataContext.current(context):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


# ------------------------------------------------------------------------------- through the service

_REQUESTS = 8  # chunks that are with the service at once: enough for its replicas never to wait


def _answer_through_service(job: Job, left: list[Chunk], decode: Any) -> Iterator[dict[str, Any]]:
    from concurrent.futures import ThreadPoolExecutor, as_completed

    with ThreadPoolExecutor(_REQUESTS) as pool:
        futures = [pool.submit(answer_chunk, job, chunk, decode) for chunk in left]
        try:
            for future in as_completed(futures):
                yield dict(future.result())
        finally:
            for future in futures:
                future.cancel()


# ------------------------------------------------------------------------------------------ assembling


def _assemble(job: Job, files: list[InputFile], places: list[StoragePath], work: StoragePath) -> Manifest:
    """Publish the outputs, each streamed from its input and its parts; gives back what the manifest says of them.

    :raises OutputError: a place is read-only or full; whatever was there before stays.
    """
    old = Manifest.read(work)
    (work / MANIFEST).delete()
    counts: Counter[str] = Counter(rows=0, answered=0, errors=0, truncated=0)
    reasons: Counter[str] = Counter()
    tokens: Counter[str] = Counter(source_tokens=0, output_tokens=0)
    outputs = []
    for number, (table, place) in enumerate(zip(job.tables, places, strict=True)):
        chunks = [chunk for chunk in job.chunks if chunk.file == number]
        rows = sum(chunk.rows for chunk in chunks)
        write_output(
            table, rows, _answers(job, chunks, counts, reasons, tokens), place, format_of(place.name)
        )
        outputs.append({"path": str(place), "rows": rows, "bytes": place.info().size})
    kept = {output["path"] for output in outputs}
    for output in old.outputs if old else []:
        if output["path"] not in kept and len(places) > 1:
            StoragePath(output["path"]).delete()
    return Manifest(
        stage=f"batch-{job.task_name}",
        inputs={
            "files": [
                {
                    "path": str(file.place),
                    "rows": table.rows,
                    "bytes": file.bytes,
                    "fingerprint": file.identity,
                }
                for file, table in zip(files, job.tables, strict=True)
            ]
        },
        outputs=outputs,
        counts={**counts, "error_reasons": dict(reasons.most_common())},
        metrics=dict(tokens),
        samples=_samples(job),
    )


def _answers(
    job: Job, chunks: list[Chunk], counts: Counter[str], reasons: Counter[str], tokens: Counter[str]
) -> Iterator[pa.RecordBatch]:
    """The result columns of some chunks in order, counted on their way; at least one batch, maybe an empty one."""
    schema = result_schema(job.task)
    yield pa.record_batch([pa.array([], field.type) for field in schema], schema)
    for chunk in chunks:
        part = read_part(job, chunk)
        errors_ = [reason for reason in part["error"].to_pylist() if reason is not None]
        counts.update(
            rows=part.num_rows,
            answered=part.num_rows - len(errors_),
            errors=len(errors_),
            truncated=pc.sum(part["truncated"]).as_py() or 0,
        )
        reasons.update(reason.partition(":")[0] for reason in errors_)
        for name in tokens:
            tokens[name] += pc.sum(part[name]).as_py() or 0
        yield part.select(schema.names)


def _samples(job: Job) -> list[dict[str, Any]]:
    """The first rows that have an answer, for a person to look at."""
    for chunk in job.chunks[:1]:
        texts = read_texts(job.tables[chunk.file], job.columns[chunk.file], chunk.start, chunk.stop)
        answers = read_part(job, chunk)[job.task.column].to_pylist()
        pairs = zip(texts.values, answers, strict=True)
        shown = [{"source": text, "output": answer} for text, answer in pairs if answer is not None]
        return shown[:_SAMPLES]
    return []


def _add_speed(manifest: Manifest, job: Job, left: list[Chunk], watch: Stopwatch) -> None:
    seconds = max(watch.elapsed_s, 1e-3)
    rows = sum(chunk.rows for chunk in left)
    share = rows / job.rows if job.rows else 0.0
    manifest.wall_time_s = watch.elapsed_s
    manifest.metrics |= {
        "rows_per_s": round(rows / seconds, 2),
        "output_tokens_per_s": round(manifest.metrics["output_tokens"] * share / seconds, 2),
        "chunks": len(job.chunks),
        "chunks_reused": len(job.chunks) - len(left),
    }
