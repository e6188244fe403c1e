"""The frame of the preparation: a step is a list of items; an item that has published its result is done.

Each step has a directory below the artifact's work directory, named after a hash of all that it depends on: settings,
inputs, the steps before it. A changed setting therefore gives new directories to exactly the steps that depend on it,
and a second start does only those items whose results are not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raylm.errors import RaylmError, from_plain, to_plain
from raylm.progress import Progress
from raylm.storage import StoragePath, at_once

Result = dict[str, Any]
"""What an item's work gives: plain data, published as JSON once all files of the item are."""

BATCH_ROWS = 256


def run_step(
    place: StoragePath,
    title: str,
    names: Sequence[str],
    work: Callable[[int], Result],
    measure: Callable[[int], float] = lambda number: 1.0,
    unit: str = "parts",
    detail: Callable[[list[Result]], str] = lambda results: "",
) -> list[Result]:
    """The results of all items, in their order; those that an earlier start published are read, the rest made.

    :param place: the step's directory.
    :param names: what each item's result is called.
    :param work: makes item number n, on some CPU of the cluster; publishes its files below `place`.
    :param measure: how much item number n counts in the progress, in `unit`.
    :raises RaylmError: the one that `work` raised.
    """
    there = {file.name for file, _ in place.list()}
    known = [number for number, name in enumerate(names) if f"{name}.json" in there]
    read = at_once(lambda number: (place / f"{names[number]}.json").read_json(), known)
    results: dict[int, Result] = dict(zip(known, read, strict=True))
    todo = [number for number in range(len(names)) if number not in results]
    total = sum(map(measure, range(len(names))))
    with Progress(title, total, unit) as progress:
        done = sum(map(measure, results))
        progress.resume_at(done)

        def finished(number: int) -> Result:
            result = work(number)
            (place / f"{names[number]}.json").write_json(result)
            return result

        for number, result in _mapped(todo, finished):
            results[number] = result
            done += measure(number)
            progress.update(done, detail(list(results.values())))
    return [results[number] for number in range(len(names))]


def _mapped(numbers: Sequence[int], work: Callable[[int], Result]) -> Iterator[tuple[int, Result]]:
    """What `work` makes of each number, on the cluster's CPUs, in the order in which results arrive.

    Results cross as JSON: Ray Data would make columns of them.

    :raises RaylmError: the one that `work` raised.
    """
    if not numbers:
        return
    import ray

    def worked(row: dict[str, int]) -> dict[str, Any]:
        try:
            result = work(row["item"])
        except RaylmError as error:
            result = to_plain(error)
        return {"item": row["item"], "result": json.dumps(result)}

    rows = [{"item": number} for number in numbers]
    for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(worked, num_cpus=1).iter_rows():
        result = json.loads(row["result"])
        if "failure" in result:
            raise from_plain(result)
        yield row["item"], result


# ------------------------------------------------------------------------------- tables of a step's files


def write_table(file: StoragePath, table: pa.Table, parts: Sequence[int] | None = None) -> None:
    """Publish a table as a compressed Arrow file.

    :param parts: how many rows each part has: one record batch for each, which `read_part` finds. Otherwise batches of
        a few hundred rows, which `read_rows` finds.
    """
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with file.writing() as stream, pa.ipc.new_file(stream, table.schema, options=options) as writer:
        if parts is None:
            writer.write_table(table.combine_chunks(), max_chunksize=BATCH_ROWS)
            return
        start = 0
        for rows in parts:
            piece = table.slice(start, rows).combine_chunks().to_batches()
            writer.write_batch(piece[0] if piece else pa.RecordBatch.from_pylist([], table.schema))
            start += rows


def read_table(file: StoragePath) -> pa.Table:
    """The whole table of a file that `write_table` wrote."""
    with file.open_input() as stream:
        return pa.ipc.open_file(stream).read_all()


def read_part(files: Iterable[StoragePath], part: int, schema: pa.Schema) -> pa.Table:
    """One part of several files that `write_table` wrote in parts."""
    batches = []
    for file in files:
        with file.open_input() as stream:
            batches.append(pa.ipc.open_file(stream).get_batch(part))
    return pa.Table.from_batches(batches, schema)


def read_rows(file: StoragePath, rows: Sequence[int], columns: Sequence[str]) -> pa.Table:
    """Some rows, in ascending order, of a file that `write_table` wrote without parts; only their batches are read."""
    by_batch: dict[int, list[int]] = {}
    for row in rows:
        by_batch.setdefault(row // BATCH_ROWS, []).append(row % BATCH_ROWS)
    pieces = []
    with file.open_input() as stream:
        reader = pa.ipc.open_file(stream)
        for number, inside in by_batch.items():
            pieces.append(pa.Table.from_batches([reader.get_batch(number)]).select(columns).take(inside))
    return pa.concat_tables(pieces)


def hash_bound(part: int, parts: int) -> int:
    """Where a part begins in the range of 64-bit hashes, cut into equal parts; the one after the last: at 2^64."""
    return -(-(part << 64) // parts)


def cut_by_hash(hashes: pa.ChunkedArray, parts: int) -> list[int]:
    """How many of ascending 64-bit hashes fall into each of equal ranges of hashes."""
    bounds = np.array([hash_bound(part, parts) for part in range(1, parts)], np.uint64)
    ends = np.searchsorted(hashes.to_numpy(), bounds)
    return [int(count) for count in np.diff(np.concatenate([[0], ends, [len(hashes)]]))]
