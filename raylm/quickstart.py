"""The whole road on one machine: text that is on it → a trained model → translated and summarised files."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.corpus.prepare import prepare
from raylm.corpus.stream import open_stream
from raylm.inference.batch import run_batch
from raylm.progress import note
from raylm.report import write_report
from raylm.settings import Settings, model_directory
from raylm.storage import StoragePath
from raylm.summary import quickstart_summary
from raylm.tasks import SUMMARIZE, TRANSLATE, Task
from raylm.training.batches import Shards
from raylm.training.evaluate import evaluate
from raylm.training.export import export
from raylm.training.trainer import finetune, prepared_corpus, pretrain

_BATCH_ROWS = 1_000
"""Held-out rows that the batch stages translate and summarise, where the corpus has so many."""


def run_quickstart(settings: Settings, out: str | None, to: str) -> str:
    """What the person at the terminal reads at the end; all artifacts are below the storage by then.

    :param out: replaces `storage`.
    :param to: the language that every CLDR source of the corpus is made in.
    """
    settings = _directed(settings, out, to)
    storage = StoragePath(settings.storage)
    note(f"raylm quickstart: English to {to}, everything below {storage}")
    manifests = [prepare(settings)]
    stream = open_stream(settings) if settings.pretrain.stream else None
    manifests += [pretrain(settings, stream), finetune(settings), evaluate(settings), export(settings)]
    model = model_directory(settings)
    for task in (TRANSLATE, SUMMARIZE):
        inputs = write_inputs(settings, task, storage / "batch" / f"{task.name}.parquet")
        manifests.append(
            run_batch(
                settings,
                task,
                str(inputs),
                model=model,
                to=to if task is TRANSLATE else None,
                overwrite=True,
            )
        )
    report = storage / "report.html"
    write_report(str(storage), str(report))
    return quickstart_summary(manifests, str(report))


def write_inputs(settings: Settings, task: Task, file: StoragePath) -> StoragePath:
    """A parquet file of held-out rows of a task, as a user's own might be: `id`, `text`, `reference`."""
    table = Shards(prepared_corpus(settings) / "pairs" / "test").table
    rows = table.filter(pa.compute.equal(table["task"], task.name)).slice(0, _BATCH_ROWS)
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"id": pa.array(range(len(rows))), "text": rows["source"], "reference": rows["target"]}), sink
    )
    data = sink.getvalue().to_pybytes()
    if not file.is_file() or file.read_bytes() != data:
        file.write_bytes(data)
    return file


def _directed(settings: Settings, out: str | None, to: str) -> Settings:
    """The settings with another storage and another target language."""
    values: dict[str, Any] = settings.model_dump()
    if out:
        values["storage"] = out
    for source in values["corpus"]["pairs"]:
        if source["type"] == "cldr":
            source["to"] = to
    return Settings.model_validate(values)
