"""What a batch job would take, told from a sample of its rows that is really decoded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

from raylm.inference.chunks import Chunk, Job, plan_job
from raylm.inference.engines import Engine, answer_texts
from raylm.inference.io import InputFile, read_texts
from raylm.inference.model import ModelInfo
from raylm.settings import BatchSettings
from raylm.storage import Manifest, Stopwatch, StoragePath
from raylm.tasks import Task

_PLACES = 4
_ROWS_AT_A_PLACE = 8


def estimate(
    settings: BatchSettings,
    task: Task,
    model: ModelInfo,
    prompt_token: str | None,
    files: Sequence[InputFile],
    column: str | None,
    limit: int | None,
) -> Manifest:
    """A manifest with rows, and with characters, tokens and seconds as a sample of 32 rows foretells them.

    The sample is decoded here, on one CPU; `predicted_s` divides its time among the workers. Nothing is kept.
    """
    with tempfile.TemporaryDirectory(prefix="raylm-") as directory:
        work = StoragePath(directory)
        job = plan_job(files, task, prompt_token, column, limit, settings.chunk_rows, work, "estimate")
        texts = [text for chunk in _sample(job) for text in _texts(job, chunk)]
    watch = Stopwatch()
    engine = Engine(model, settings.decode, "cpu", threads=1)
    load_s = watch.elapsed_s
    answer_texts(engine.decode, task, texts[:1], prompt_token)
    watch = Stopwatch()
    outputs = answer_texts(engine.decode, task, texts, prompt_token)
    sample_s = watch.elapsed_s
    scale = job.rows / len(texts) if texts else 0.0
    workers = _workers(settings, len(job.chunks))
    return Manifest(
        stage=f"batch-{task.name}",
        settings={
            "dry_run": True,
            "model": model.where,
            "decode": settings.decode.model_dump(),
            "workers": workers,
        },
        inputs={
            "files": [
                {"path": str(file.place), "rows": table.rows, "bytes": file.bytes}
                for file, table in zip(files, job.tables, strict=True)
            ]
        },
        counts={
            "rows": job.rows,
            "chunks": len(job.chunks),
            "characters": round(scale * sum(len(text or "") for text in texts)),
            "source_tokens": round(scale * sum(output.source_tokens for output in outputs)),
            "output_tokens": round(scale * sum(output.output_tokens for output in outputs)),
        },
        metrics={
            "sample_rows": len(texts),
            "sample_s": sample_s,
            "engine_load_s": load_s,
            "predicted_s": round(load_s + scale * sample_s / workers, 2),
        },
        samples=[
            {"source": text, "output": output.text}
            for text, output in zip(texts, outputs, strict=True)
            if output.text is not None
        ][:3],
    )


def _sample(job: Job) -> list[Chunk]:
    """A few rows at places spread evenly over the chunks."""
    step = max(len(job.chunks) / _PLACES, 1.0)
    picked = [job.chunks[int(place * step)] for place in range(_PLACES) if int(place * step) < len(job.chunks)]
    return [Chunk(chunk.file, chunk.start, min(chunk.start + _ROWS_AT_A_PLACE, chunk.stop)) for chunk in picked]


def _texts(job: Job, chunk: Chunk) -> list[str | None]:
    return read_texts(job.tables[chunk.file], job.columns[chunk.file], chunk.start, chunk.stop).values


def _workers(settings: BatchSettings, chunks: int) -> int:
    """Engine workers, told from the connected cluster, or from this machine where there is none."""
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else os.cpu_count() or 1
    most = cpus if settings.workers == "auto" else settings.workers
    return max(min(most, chunks), 1)
