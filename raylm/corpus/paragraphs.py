"""Paragraphs that stood in the corpus before, in any document: found by their hashes alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash

from raylm.corpus.dedup import near_duplicates
from raylm.corpus.merge import merged_file, part_names
from raylm.corpus.plan import Plan
from raylm.corpus.rows import DOCUMENT
from raylm.corpus.steps import Result, cut_by_hash, read_part, read_table, run_step, write_table

_SEPARATOR = "\n\n"
_HASHES = pa.schema(
    [
        ("hash", pa.uint64()),
        ("trained", pa.bool_()),
        ("part", pa.uint32()),
        ("row", pa.uint32()),
        ("place", pa.uint32()),
    ]
)
_REPEATS = pa.schema([("row", pa.uint32()), ("place", pa.uint32())])


def find_repeats(plan: Plan, parts: int) -> None:
    """Publish which paragraphs are to go, for `without_repeats` to read."""
    if not plan.corpus.dedup.paragraphs:
        return
    place, names = plan.place("paragraphs"), part_names(parts)
    run_step(
        place, "prepare: paragraphs", [f"hashes-{n}" for n in names], lambda part: _write_hashes(plan, part, parts)
    )
    run_step(place, "prepare: repeats", [f"repeats-{n}" for n in names], lambda part: _write_repeats(plan, part, parts))


def repeats(plan: Plan, part: int, parts: int) -> dict[int, set[int]]:
    """Which paragraphs of which rows of a part are to go, both by number."""
    if not plan.corpus.dedup.paragraphs:
        return {}
    files = [plan.place("paragraphs") / f"repeats-{name}.arrow" for name in part_names(parts)]
    found: dict[int, set[int]] = {}
    for entry in read_part(files, part, _REPEATS).to_pylist():
        found.setdefault(entry["row"], set()).add(entry["place"])
    return found


def without(text: str, places: set[int]) -> str:
    """The text without some of its paragraphs."""
    return _SEPARATOR.join(p for place, p in enumerate(text.split(_SEPARATOR)) if place not in places)


def _write_hashes(plan: Plan, part: int, parts: int) -> Result:
    table = read_table(merged_file(plan, part)).select(["kind", "split", "source"])
    gone = set(near_duplicates(plan, part).tolist())
    rows = []
    for number, row in enumerate(table.to_pylist()):
        if row["kind"] != DOCUMENT or number in gone:
            continue
        for place, paragraph in enumerate(row["source"].split(_SEPARATOR)):
            if len(paragraph) >= plan.corpus.dedup.min_paragraph_chars:
                digest = xxhash.xxh3_64_intdigest(" ".join(paragraph.casefold().split()).encode())
                rows.append((digest, row["split"] == "train", part, number, place))
    rows.sort()
    columns = list(zip(*rows, strict=True)) or [()] * len(_HASHES)
    found = pa.table([pa.array(c, f.type) for c, f in zip(columns, _HASHES, strict=True)], _HASHES)
    write_table(plan.place("paragraphs") / f"hashes-part-{part:05d}.arrow", found, cut_by_hash(found["hash"], parts))
    return {"paragraphs": len(rows)}


def _write_repeats(plan: Plan, bucket: int, parts: int) -> Result:
    place = plan.place("paragraphs")
    found = read_part((place / f"hashes-{name}.arrow" for name in part_names(parts)), bucket, _HASHES)
    # A held-out paragraph stays; the order of parts and rows is that of the documents' hashes.
    found = found.sort_by([(name, "ascending") for name in _HASHES.names])
    hashes = found["hash"].to_numpy()
    again = np.concatenate([[False], hashes[1:] == hashes[:-1]]) if len(hashes) else np.zeros(0, bool)
    gone = found.filter(pa.array(again)).sort_by([(name, "ascending") for name in ("part", "row", "place")])
    counts = np.bincount(gone["part"].to_numpy().astype(np.int64), minlength=parts)
    write_table(place / f"repeats-part-{bucket:05d}.arrow", gone.select(_REPEATS.names), counts.tolist())
    return {"repeats": len(gone)}
