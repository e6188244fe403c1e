"""The whole road on one machine: text → a trained model → files that it has worked on.

Which road follows from the settings: pairs make a model that translates, summarises, answers or labels; documents alone
one that writes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylm import models
from raylm.corpus.prepare import prepare
from raylm.corpus.stream import open_stream
from raylm.inference.batch import run_batch
from raylm.inference.model import ModelInfo
from raylm.progress import note
from raylm.report import write_report
from raylm.settings import Settings, model_directory
from raylm.storage import Manifest, StoragePath
from raylm.summary import quickstart_summary
from raylm.tasks import GENERATE, TASKS, Task
from raylm.training.batches import Shards, TokenLists
from raylm.training.evaluate import evaluate
from raylm.training.export import export
from raylm.training.runs import prepared_corpus
from raylm.training.trainer import finetune, pretrain

_BATCH_ROWS = 1_000
"""Held-out rows that a batch stage works on, where the corpus has so many."""
_BEGINNINGS = 100
_BEGUN = 0.25
"""Of a held-out sequence, what the model is given to go on with."""


def run_quickstart(settings: Settings, out: str | None, to: str | None) -> str:
    """What the person at the terminal reads at the end; all artifacts are below the storage by then.

    :param out: replaces `storage`.
    :param to: the language that every CLDR source of the corpus is made in.
    """
    settings = _directed(settings, out, to)
    storage = StoragePath(settings.storage)
    note(f"raylm quickstart: everything below {storage}")
    manifests = [*_trained(settings)]
    model = model_directory(settings)
    for name in ModelInfo.load(model).tasks:
        by_language = held_out(settings, TASKS[name])
        for language, rows in by_language:
            file = storage / "batch" / f"{name}{f'-{language}' * (len(by_language) > 1)}.parquet"
            write_rows(file, rows)
            manifests.append(run_batch(settings, TASKS[name], file.address, model=model, to=language, overwrite=True))
    report = storage / "report.html"
    write_report(storage.address, report.address)
    return quickstart_summary(manifests, report)


def _trained(settings: Settings) -> Iterator[Manifest]:
    """The stages until there is a model."""
    is_tuned = bool(settings.corpus.pairs)
    yield prepare(settings)
    if not is_tuned or settings.finetune.start == "pretrain":
        yield pretrain(settings, open_stream(settings) if settings.pretrain.stream else None)
    if is_tuned:
        yield finetune(settings)
        yield evaluate(settings)
    yield export(settings, pretrained=not is_tuned)


def held_out(settings: Settings, task: Task) -> list[tuple[str | None, pa.Table]]:
    """Held-out rows of a task as a user's own might be, for each language: `id`, what the task reads, `reference`."""
    tokens = prepared_corpus(settings)
    if task == GENERATE:
        return [(None, _beginnings(tokens))]
    table = Shards(tokens / "pairs" / "test").table
    table = table.filter(pc.equal(table["task"], task.name))
    found = []
    for language in sorted(set(table["to"].to_pylist()), key=str):
        same = pc.is_null(table["to"]) if language is None else pc.equal(table["to"], language)
        rows = table.filter(same).slice(0, _BATCH_ROWS)
        fields = zip(*(task.parted(source) for source in rows["source"].to_pylist()), strict=True)
        columns = dict(zip(task.fields, map(pa.array, fields), strict=True))
        found.append((language, pa.table({"id": range(len(rows)), **columns, "reference": rows["target"]})))
    return found


def _beginnings(tokens: StoragePath) -> pa.Table:
    """How held-out documents begin."""
    rows = TokenLists(Shards(tokens / "documents" / "validation"), "input_ids")
    tokenizer = models.load_tokenizer((tokens / "tokenizer").address)
    count = min(len(rows.lengths), _BEGINNINGS)
    ids = [rows[number][: int(rows.lengths[number] * _BEGUN)] for number in range(count)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return pa.table({"id": range(count), "text": pa.array(texts)})


def write_rows(file: StoragePath, rows: pa.Table) -> None:
    """A parquet file of the rows; one that says the same already stays as it is."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    data = sink.getvalue().to_pybytes()
    if not file.is_file() or file.read_bytes() != data:
        file.write_bytes(data)


def _directed(settings: Settings, out: str | None, to: str | None) -> Settings:
    """The settings with another storage and another target language."""
    values: dict[str, Any] = settings.model_dump()
    if out:
        values["storage"] = out
    for source in values["corpus"]["pairs"]:
        if source["type"] == "cldr" and to:
            source["to"] = to
    return Settings.model_validate(values).on(settings.topology)
