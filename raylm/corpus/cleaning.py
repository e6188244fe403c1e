"""The first step: each unit of the sources is read, cleaned and filtered into files sorted by a hash of the content."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylm.corpus.plan import Plan, part_bytes
from raylm.corpus.reading import read_unit
from raylm.corpus.records import Rejected
from raylm.corpus.rows import Cleaned, Dropped, cleaned_records, cleaned_table
from raylm.corpus.sources import Unit
from raylm.corpus.steps import BATCH_ROWS, Result, run_step, write_table
from raylm.errors import InputError
from raylm.settings.section import is_within, limit_text
from raylm.storage import StoragePath

_RUN_MB = 32
"""Of text that a worker holds before it sorts and writes; more in a large corpus."""
SAMPLES = 3
"""Rows of a unit, or of a part, that a report may show for each reason."""
_EXCERPT_CHARS = 300

DROPPED = pa.schema([(name, pa.string()) for name in ("reason", "kind", "source", "target")])


def clean_units(plan: Plan) -> list[Result]:
    """What became of each unit: its sorted files, its counts, a few samples for each reason.

    :raises InputError: a file is damaged, or more rows than `max_rejected` could not be read.
    """

    def detail(results: list[Result]) -> str:
        read, kept = (sum(r["counts"].get(name, 0) for r in results) for name in ("read", "kept"))
        return f"{kept:,} kept of {read:,}"

    run_bytes = part_bytes(sum(unit.bytes for unit in plan.units), _RUN_MB)
    results = run_step(
        plan.place("clean"),
        "prepare: clean",
        plan.unit_names,
        lambda number: _clean_unit(plan, number, run_bytes),
        measure=lambda number: plan.units[number].bytes / 1e6,
        unit="MB",
        detail=detail,
    )
    read, rejected = (sum(r["counts"].get(name, 0) for r in results) for name in ("read", "rejected"))
    check_rejected(plan.corpus.max_rejected, read, rejected, [row for r in results for row in r["rejected"]])
    return results


def _clean_unit(plan: Plan, number: int, run_bytes: float) -> Result:
    unit, name, place = plan.units[number], plan.unit_names[number], plan.place("clean")
    source = [*plan.corpus.documents, *plan.corpus.pairs][unit.source]
    counts: Counter[str] = Counter()
    samples: dict[str, list[str]] = {}
    runs: list[Result] = []
    rows: list[Cleaned] = []
    dropped: list[Dropped] = []
    rejected: list[dict[str, Any]] = []
    size = 0
    for outcome in cleaned_records(read_unit(unit, source), plan.corpus, source, counts):
        if isinstance(outcome, Cleaned):
            rows.append(outcome)
            size += len(outcome.source) + len(outcome.target or "")
            if size >= run_bytes:
                runs.append(_write_run(place / f"{name}-{len(runs)}.arrow", rows))
                rows, size = [], 0
        elif isinstance(outcome, Dropped):
            add_sample(samples, outcome)
            if plan.corpus.keep_dropped:
                dropped.append(outcome)
        else:
            rejected.append(rejected_row(outcome, unit))
    if rows:
        runs.append(_write_run(place / f"{name}-{len(runs)}.arrow", rows))
    if rejected:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
        (place / f"{name}-rejected.jsonl").write_bytes(lines.encode("utf-8", "backslashreplace"))
    if dropped:
        write_dropped(place / f"{name}-dropped.parquet", dropped)
    return {"runs": runs, "counts": dict(counts), "samples": samples, "rejected": rejected[:SAMPLES]}


def _write_run(file: StoragePath, rows: list[Cleaned]) -> Result:
    """A file of rows in the order of their hashes; says where in the range of hashes each of its batches begins."""
    rows.sort(key=lambda row: row.hash)
    table = cleaned_table(rows)
    write_table(file, table)
    return {
        "file": file.name,
        "bytes": sum(pc.sum(pc.binary_length(table[name])).as_py() or 0 for name in ("source", "target")),
        "starts": [int.from_bytes(rows[start].hash[:8], "big") for start in range(0, len(rows), BATCH_ROWS)],
    }


def add_sample(samples: dict[str, list[str]], row: Dropped) -> None:
    """Add the beginning of a dropped row to those of its reason, where these are few."""
    excerpts = samples.setdefault(f"dropped.{row.reason}", [])
    if len(excerpts) < SAMPLES:
        excerpts.append(excerpt(row.source, row.target))


def rejected_row(row: Rejected, unit: Unit) -> dict[str, Any]:
    """A row of a unit that could not be read, with the file that it is from."""
    return asdict(row) | {"file": row.file or unit.origin}


def check_rejected(limit: float | int, read: int, rejected: int, rows: list[dict[str, Any]]) -> None:
    """Nothing, if no more rows than allowed could not be read.

    :param limit: as `corpus.max_rejected`.
    :param rows: some of those that could not; the error shows the first.
    :raises InputError: there are more.
    """
    if is_within(limit, rejected, read):
        return
    raise InputError(
        f"corpus: {rejected:,} of {read:,} rows could not be read, corpus.max_rejected allows {limit_text(limit)};"
        f" the first: {rows[0]['file']}, at {rows[0]['position']}: {rows[0]['error']}"
    )


def dropped_rows(rows: pa.Table, reason: str) -> list[Dropped]:
    """Rows of a table with the columns `kind`, `source` and `target` as dropped for a reason."""
    return [Dropped(reason, row["kind"], row["source"], row["target"]) for row in rows.to_pylist()]


def write_dropped(file: StoragePath, rows: list[Dropped]) -> None:
    """Publish dropped rows with their reasons as a parquet file."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], DROPPED)
    with file.writing() as stream:
        pq.write_table(table, stream, compression="zstd")


def excerpt(source: str, target: str | None) -> str:
    """The beginning of a row, for a person to look at."""
    return source[:_EXCERPT_CHARS] + (f" → {target[:_EXCERPT_CHARS]}" if target is not None else "")
