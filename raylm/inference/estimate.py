"""What a batch job would take, told from a sample of its rows that is really decoded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence

from raylm.inference.answers import answer_rows
from raylm.inference.chunks import Chunk, Job, plan_job, read_chunk
from raylm.inference.engines import load_engine
from raylm.inference.io import InputFile
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Prompt
from raylm.inference.workers import workers_of
from raylm.settings import BatchSettings
from raylm.storage import Manifest, Stopwatch, StoragePath

_PLACES = 4
_ROWS_AT_A_PLACE = 8


def estimate(
    settings: BatchSettings,
    model: ModelInfo,
    prompt: Prompt,
    files: Sequence[InputFile],
    columns: Mapping[str, str],
    limit: int | None,
) -> Manifest:
    """A manifest with rows, and with characters, tokens and seconds as a sample of 32 rows foretells them.

    The sample is decoded here, on one CPU; `predicted_s` divides its time among the workers. Nothing is kept.
    """
    with tempfile.TemporaryDirectory(prefix="raylm-") as directory:
        work = StoragePath(directory)
        job = plan_job(files, prompt, columns, limit, settings, work, "estimate")
        rows = [row for chunk in _sample(job) for row in read_chunk(job, chunk).values]
    watch = Stopwatch()
    engine = load_engine(model, settings.decode)
    load_s = watch.elapsed_s
    answer_rows(engine, rows[:1], prompt)
    watch = Stopwatch()
    outputs = answer_rows(engine, rows, prompt)
    sample_s = watch.elapsed_s
    scale = job.rows / len(rows) if rows else 0.0
    workers = _workers(settings, len(job.chunks))
    return Manifest(
        stage=f"batch-{prompt.task}",
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
            "characters": round(scale * sum(len(text or "") for row in rows for text in row)),
            "source_tokens": round(scale * sum(output.source_tokens for output in outputs)),
            "output_tokens": round(scale * sum(output.output_tokens for output in outputs)),
        },
        metrics={
            "sample_rows": len(rows),
            "sample_s": sample_s,
            "engine_load_s": load_s,
            "predicted_s": round(load_s + scale * sample_s / workers, 2),
        },
        samples=[
            {"source": row[0], "output": output.text}
            for row, output in zip(rows, outputs, strict=True)
            if output.text is not None
        ][:3],
    )


def _sample(job: Job) -> list[Chunk]:
    """A few rows at places spread evenly over the chunks."""
    step = max(len(job.chunks) / _PLACES, 1.0)
    picked = [job.chunks[int(place * step)] for place in range(_PLACES) if int(place * step) < len(job.chunks)]
    return [Chunk(chunk.file, chunk.start, min(chunk.start + _ROWS_AT_A_PLACE, chunk.stop)) for chunk in picked]


def _workers(settings: BatchSettings, chunks: int) -> int:
    """Engine workers, told from the connected cluster, or from this machine where there is none."""
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else os.cpu_count() or 1
    _, most = workers_of(settings.workers, chunks, cpus, cpus)
    return max(most, 1)
