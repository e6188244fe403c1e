"""Batch jobs: every row of a table or of a directory of tables answered by a model, on all workers.

`run_batch` reads top to bottom: find the input, load what the model says of itself, see whether the job has been
done, plan its chunks, answer those that are not done, put the parts together, write the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from raylm import errors
from raylm.errors import RaylmError, SettingsError
from raylm.inference.check import check_answers, check_references, check_score
from raylm.inference.chunks import Chunk, Job, job_key, plan_job, read_part
from raylm.inference.claim import LOCK, claimed_output, finished_manifest, output_files, output_place
from raylm.inference.engines import check_engine
from raylm.inference.estimate import estimate
from raylm.inference.io import check_unchanged, list_inputs
from raylm.inference.model import ModelInfo, absolute
from raylm.inference.prompts import Prompt, prompt_for
from raylm.inference.results import assemble
from raylm.inference.workers import REQUESTS, answer_on_actors, answer_through_service, plan_workers
from raylm.prices import cost, hourly_price
from raylm.progress import Progress
from raylm.settings import BatchSettings, DecodeSettings, Settings, model_directory
from raylm.settings.inference import CheckSettings
from raylm.settings.section import is_within, limit_text
from raylm.storage import MANIFEST, Manifest, Stopwatch, at_once
from raylm.tasks import Task

if TYPE_CHECKING:
    from raylm.inference.service.client import ServiceClient


def run_batch(
    settings: Settings,
    task: Task,
    input: str,
    *,
    model: str | None = None,
    columns: Mapping[str, str] | None = None,
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

    :param input: a Parquet, Arrow, JSON Lines or CSV file, a directory or a glob; local or on any storage.
    :param model: its directory; default: `<storage>/models/<model.name>`, or with `serve` what is served.
    :param columns: which column each field of the task, or of `batch.prompt`, is; default: the one of its name, for
        `text` the only one that holds text.
    :param to: the target language; default: the model's only one.
    :param output: a file, or a directory where the input is several files; its suffix decides the format.
    :param limit: only the first rows.
    :param overwrite: replace an output of another job, or of this one where it lacks the check that is asked for.
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
    columns = dict(columns or {})
    wording = to, source_language, settings.batch.prompt, settings.batch.system
    answerer = _served(task, model, wording, connect) if through == "serve" else _loaded(settings, task, model, wording)
    batch, prompt = settings.batch.model_copy(update={"decode": answerer.decode}), answerer.prompt
    unknown = sorted(columns.keys() - set(prompt.fields))
    if unknown:
        raise SettingsError(
            f"a column is named for {', '.join(unknown)}, but the prompt reads {', '.join(prompt.fields)}"
        )
    asked = {"prompt": asdict(prompt) | {"fields": list(prompt.fields)}, "columns": columns, "limit": limit}
    key = job_key(files, answerer.model.fingerprint, answerer.decode, asked)
    if dry_run:
        return estimate(batch, answerer.model, prompt, files, columns, limit)
    outputs = output_files(target, files, input)
    finished = finished_manifest(target, key, outputs)
    if finished and not (overwrite and _lacks_check(finished, batch.check)):
        _check_finished(finished, batch)
        return finished

    with claimed_output(target, key, overwrite) as work:
        job = plan_job(files, prompt, columns, limit, batch, work, key)
        if batch.check:
            check_references(job, batch.check)
        left = job.unfinished()
        workers, done = _begun(job, left, answerer, settings, connect)
        price = hourly_price(settings.prices) if left else None
        _follow(job, left, done, batch.max_errors, price)
        checked = check_answers(job, batch.check) if batch.check else {}
        check_unchanged(files)
        manifest = assemble(job, files, outputs, target, work, has_machines=bool(left) and answerer.service is None)
        told = {"key": key, **asked, "to": to, "through": through, "workers": workers}
        manifest.settings = told | _recorded(job, answerer, batch)
        _add_speed(manifest, job, left, watch, price)
        manifest.metrics |= checked
        manifest.write(work)
        for place, _ in work.list():
            if place.name not in (MANIFEST, LOCK):
                place.delete()
    return manifest


@dataclass(frozen=True)
class _Answerer:
    """What answers a job: a model, the way it decodes, and the prompt that it is given."""

    model: ModelInfo
    decode: DecodeSettings
    prompt: Prompt
    service: ServiceClient | None = None
    """Where the model runs, if not on actors of the job's own."""


_Wording = tuple[str | None, str | None, str | None, str | None]
"""The target language, the source's, and the prompt and the system message of the user's own."""


def _loaded(settings: Settings, task: Task, model: str | None, wording: _Wording) -> _Answerer:
    info = ModelInfo.load(model or absolute(model_directory(settings)))
    return _Answerer(info, settings.batch.decode, prompt_for(info, task, *wording))


def _served(task: Task, model: str | None, wording: _Wording, connect: Callable[[], object] | None) -> _Answerer:
    if connect:
        connect()
    from raylm.inference.service.client import ServiceClient  # imports Ray, whose environment `connect` may set

    service = ServiceClient.connect(model)
    return _Answerer(service.model, service.decode, service.prompt_for(task, *wording), service)


def _begun(
    job: Job, left: list[Chunk], answerer: _Answerer, settings: Settings, connect: Callable[[], object] | None
) -> tuple[int | tuple[int, int], Iterator[dict[str, Any]]]:
    """How many workers there are for the chunks that are left, and the counts of each chunk as it gets done."""
    if not left:
        return 0, iter(())
    if answerer.service:
        return REQUESTS, answer_through_service(job, left, answerer.service.answer)
    if connect:
        connect()
    bounds, device = plan_workers(settings.batch.workers, len(left), settings.topology)
    check_engine(answerer.model, answerer.decode, device)
    done = answer_on_actors(job, left, answerer.model.uri, answerer.decode, bounds, device)
    return bounds[0] if bounds[0] == bounds[1] else bounds, done


def _recorded(job: Job, answerer: _Answerer, batch: BatchSettings) -> dict[str, Any]:
    """What the manifest says of how a job was done."""
    return {
        "columns": dict(zip(job.prompt.fields, job.columns[0], strict=True)),
        "model": answerer.model.where,
        "model_fingerprint": answerer.model.fingerprint,
        "decode": answerer.decode.model_dump(),
        "chunk_rows": batch.chunk_rows,
        "check": batch.check.model_dump() if batch.check else None,
    }


def _follow(
    job: Job,
    left: list[Chunk],
    done: Iterator[dict[str, Any]],
    max_errors: float | int | None,
    price: float | None,
) -> None:
    """Show how the chunks are getting done, until all are.

    :param price: of the cluster for an hour, where it is known.
    :raises RaylmError: a worker cannot go on, or more rows have an error than may.
    """
    undone = set(left)
    finished = [chunk for chunk in job.chunks if chunk not in undone]
    rows = sum(chunk.rows for chunk in finished)
    failed = 0 if max_errors is None else sum(at_once(lambda chunk: _failures(job, chunk), finished))
    tokens, first = 0, "answered by an earlier run"
    stage = f"batch-{job.task.name}"
    _check_errors(stage, failed, job.rows, first, max_errors)
    watch = Stopwatch()
    with Progress(stage, job.rows, "rows") as progress:
        progress.resume_at(rows)
        for counts in done:
            if counts.get("failure"):
                raise errors.from_plain(counts)
            rows += counts["rows"]
            failed += counts["errors"]
            tokens += counts["output_tokens"]
            _check_errors(stage, failed, job.rows, counts["first_error"] or first, max_errors)
            first = counts["first_error"] or first
            told = [f"{tokens / max(watch.elapsed_s, 1e-3):,.0f} tokens/s"]
            if failed:
                told.append(f"{failed:,} errors")
            if price is not None and (whole_s := progress.predicted_s(rows)):
                told.append(f"{cost(price, whole_s):,.2f} predicted cost")
            progress.update(rows, "  ".join(told))


def _check_finished(manifest: Manifest, settings: BatchSettings) -> None:
    """Hold a job that was done before to what is asked for now.

    :raises RaylmError: it has more errors than may be, or scored lower than it has to, or was not checked so.
    """
    counts, check = manifest.counts, settings.check
    _check_errors(manifest.stage, counts["errors"], counts["rows"], "see its `error` column", settings.max_errors)
    if _lacks_check(manifest, check):
        raise RaylmError(f"{manifest.stage}: was done without this batch.check; do it again with --overwrite")
    if check is not None:
        metrics = manifest.metrics
        check_score(metrics["checked_chrf"], metrics["checked_rows"], check, "; the output was published before")


def _lacks_check(manifest: Manifest, check: CheckSettings | None) -> bool:
    """Whether a job that was done before was not scored as is asked for now."""
    before = manifest.settings.get("check") or {}
    return check is not None and (before.get("references"), before.get("rows")) != (check.references, check.rows)


def _check_errors(stage: str, failed: int, rows: int, example: str, limit: float | int | None) -> None:
    if limit is not None and not is_within(limit, failed, rows):
        raise RaylmError(
            f"{stage}: {failed:,} of {rows:,} rows have an error, batch.max_errors allows"
            f" {limit_text(limit)}; one of them: {example}. What is done is kept, the same command with another"
            " max_errors goes on from there"
        )


def _failures(job: Job, chunk: Chunk) -> int:
    part = read_part(job, chunk)
    return int(part.num_rows - part["error"].null_count)


def _add_speed(manifest: Manifest, job: Job, left: list[Chunk], watch: Stopwatch, price: float | None) -> None:
    seconds = max(watch.elapsed_s, 1e-3)
    rows = sum(chunk.rows for chunk in left)
    share = rows / job.rows if job.rows else 0.0
    manifest.wall_time_s = seconds
    manifest.metrics |= {
        "rows_per_s": round(rows / seconds, 2),
        "output_tokens_per_s": round(manifest.metrics["output_tokens"] * share / seconds, 2),
        "chunks": len(job.chunks),
        "chunks_reused": len(job.chunks) - len(left),
    }
    if price is not None:
        manifest.metrics["cost"] = round(cost(price, seconds), 4)
