"""The second step: rows of all units in the order of their hashes, without copies and without evaluation texts.

A part of the corpus is a range of hashes. That order shuffles the corpus, brings copies together and does not depend on
files, their cut or the number of workers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raylm.corpus.cleaning import dropped_rows, excerpt, write_dropped
from raylm.corpus.plan import Plan, part_bytes
from raylm.corpus.reading import read_texts
from raylm.corpus.rows import CLEANED, DOCUMENT
from raylm.corpus.shingles import Hashes, shingles
from raylm.corpus.steps import Result, hash_bound, read_table, run_step, write_table
from raylm.settings import CorpusSettings, DecontaminateSettings
from raylm.storage import StoragePath, at_once
from raylm.tasks import CLASSIFY

MERGED = pa.schema(
    [
        ("kind", pa.string()),
        ("to", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("target", pa.string()),
        ("language", pa.string()),
        ("from", pa.uint16()),  # the number of the source among corpus.documents and corpus.pairs
        ("rank", pa.uint64()),  # the place among all rows, in the order of sources, files and positions
        ("content", pa.uint64()),  # a hash of the text
    ]
)
_RANGED = CLEANED.append(MERGED.field("from")).append(MERGED.field("rank"))
_CLUSTERS = 5
_EVALUATION = "evaluation.arrow"
_HELD_OUT = "held-out.arrow"
_NUMBER_BITS = 40


def merge(plan: Plan, cleaned: list[Result]) -> list[Result]:
    """What became of each part: how many rows were dropped, by reason; the largest groups of copies."""
    place = plan.place("merge")
    runs = [(number, run) for number, result in enumerate(cleaned) for run in result["runs"]]
    total = sum(run["bytes"] for _, run in runs)
    parts = max(math.ceil(total / part_bytes(total, plan.corpus.shard_mb)), 1)
    evaluation = place / _EVALUATION
    if plan.corpus.decontaminate.against and not evaluation.is_file():
        write_table(evaluation, pa.table({"hash": evaluation_ngrams(plan.corpus.decontaminate)}))
    if plan.corpus.dedup.pairs == "target" and not (place / _HELD_OUT).is_file():
        write_table(place / _HELD_OUT, _held_out_pairs(plan, runs))
    return run_step(place, "prepare: merge", part_names(parts), lambda part: _merge_part(plan, runs, part, parts))


def part_names(parts: int) -> list[str]:
    return [f"part-{part:05d}" for part in range(parts)]


def merged_file(plan: Plan, part: int) -> StoragePath:
    """Where the rows of a part are, in the schema `MERGED`; a document's id is `part << 32 | row`."""
    return plan.place("merge") / f"part-{part:05d}.arrow"


def _merge_part(plan: Plan, runs: Sequence[tuple[int, Result]], part: int, parts: int) -> Result:
    table = _ranged(plan, runs, hash_bound(part, parts), hash_bound(part + 1, parts))
    splits = splits_of(table, plan.corpus)
    table = table.append_column("decided", pa.array(splits, pa.string()))
    table = table.append_column("held_out", pa.array(splits != "train", pa.bool_()))
    order = pc.sort_indices(table, sort_keys=[("hash", "ascending"), *_preference(plan), *_CONTENT_ORDER])
    table = table.take(order)
    hashes = table["hash"].combine_chunks()
    is_first = np.ones(len(table), bool)
    if len(table) > 1:
        is_first[1:] = pc.not_equal(hashes[1:], hashes[:-1]).to_numpy(zero_copy_only=False)
    kept = table.filter(pa.array(is_first))
    is_by_target = plan.corpus.dedup.pairs == "target"
    is_asked = held_out_elsewhere(kept, read_table(plan.place("merge") / _HELD_OUT) if is_by_target else None)
    clusters = _largest_groups(table, np.flatnonzero(is_first))
    is_forbidden = np.zeros(len(kept), bool)
    if plan.corpus.decontaminate.against:
        forbidden = read_table(plan.place("merge") / _EVALUATION)["hash"].to_numpy()
        is_trained = pc.equal(kept["decided"], "train").to_numpy(zero_copy_only=False)
        is_forbidden = contaminated(kept, forbidden, plan.corpus.decontaminate.ngram_words) & is_trained
    if plan.corpus.keep_dropped:
        dropped = dropped_rows(table.filter(pa.array(~is_first)), "duplicate")
        dropped += dropped_rows(kept.filter(pa.array(is_forbidden)), "contaminated")
        dropped += dropped_rows(kept.filter(pa.array(is_asked & ~is_forbidden)), "held_out_source")
        if dropped:
            write_dropped(plan.place("merge") / f"part-{part:05d}-dropped.parquet", dropped)
    kept = kept.filter(pa.array(~is_forbidden & ~is_asked))
    write_table(
        merged_file(plan, part),
        pa.table(
            [kept["kind"], kept["to"], kept["decided"], kept["source"], kept["target"], kept["language"], kept["from"],
             kept["rank"], kept["split_hash"]],
            schema=MERGED,
        ),
    )  # fmt: skip
    return {
        "counts": {
            "dropped.duplicate": int((~is_first).sum()),
            "dropped.contaminated": int(is_forbidden.sum()),
            "dropped.held_out_source": int((is_asked & ~is_forbidden).sum()),
        },
        "clusters": clusters,
    }


def held_out_elsewhere(rows: pa.Table, held_out: pa.Table | None = None) -> NDArray[np.bool_]:
    """Which pairs would be learned, or validated, while what they ask is held out, or tested, with another answer.

    Labelled texts are not among them: of their labels, one is chosen later.

    :param held_out: what is asked by the held-out pairs of all parts, where targets tell copies apart; otherwise pairs
        that ask the same stand in the same part.
    """
    is_pair = _are_pairs(rows)
    asked = pa.array(_prefixes(rows["hash"])) if held_out is None else _asked(rows)
    if held_out is None:
        held_out = pa.table({"asked": asked, "decided": rows["decided"]}).filter(pa.array(is_pair))
    elsewhere = np.zeros(len(rows), bool)
    for splits, above in ((["train"], ["validation", "test"]), (["train", "validation"], ["test"])):
        others = held_out["asked"].filter(pc.is_in(held_out["decided"], pa.array(above))).combine_chunks()
        is_same = pc.and_(pc.is_in(rows["decided"], pa.array(splits)), pc.is_in(asked, others))
        elsewhere |= is_pair & is_same.to_numpy(zero_copy_only=False)
    return elsewhere


def _held_out_pairs(plan: Plan, runs: Sequence[tuple[int, Result]]) -> pa.Table:
    """What the held-out pairs of the whole corpus ask, and the splits that they are in."""
    names = ("kind", "to", "split", "split_hash", "linked_hash")
    options = pa.ipc.IpcReadOptions(included_fields=[CLEANED.get_field_index(name) for name in names])

    def held_out(run: Result) -> pa.Table:
        with (plan.place("clean") / run["file"]).open_input() as stream:
            rows = pa.ipc.open_file(stream, options=options).read_all()
        splits = splits_of(rows, plan.corpus)
        table = pa.table({"asked": _asked(rows), "decided": pa.array(splits, pa.string())})
        return table.filter(pa.array(_are_pairs(rows) & (splits != "train")))

    found = at_once(held_out, [run for number, run in runs if plan.units[number].pairs])
    schema = pa.schema([("asked", pa.string()), ("decided", pa.string())])
    return pa.concat_tables([schema.empty_table(), *found])


def _are_pairs(rows: pa.Table) -> NDArray[np.bool_]:
    """Which rows are pairs with a target of their own."""
    are_not: NDArray[np.bool_] = pc.is_in(rows["kind"], pa.array([DOCUMENT, CLASSIFY.name])).to_numpy()
    return ~are_not


def _asked(rows: pa.Table) -> pa.ChunkedArray:
    """What pairs ask: equal where task, language and source are; of questions, where their contexts are."""
    columns = rows["kind"], pc.fill_null(rows["to"], ""), rows["split_hash"].cast(pa.string())
    return pc.binary_join_element_wise(*columns, " ")


def _largest_groups(table: pa.Table, begins: NDArray[np.int64]) -> list[dict[str, Any]]:
    """The largest groups of copies: how many there are, the one that stays, and one that goes."""
    sizes = np.diff(np.append(begins, len(table)))

    def shown(row: int) -> str:
        return excerpt(table["source"][row].as_py(), table["target"][row].as_py())

    largest = [int(at) for at in np.argsort(-sizes, kind="stable")[:_CLUSTERS] if sizes[at] > 1]
    return [
        {"copies": int(sizes[at]), "text": shown(int(begins[at])), "other": shown(int(begins[at]) + 1)}
        for at in largest
    ]


_CONTENT_ORDER = [(name, "ascending") for name in ("decided", "source", "target", "from", "rank")]


def _preference(plan: Plan) -> list[tuple[str, str]]:
    """Which of some copies stays: one that is held out decides for all, then what `dedup.keep` says."""
    by = [("rank", "ascending")] if plan.corpus.dedup.keep == "first" else [("bytes", "descending")]
    return [("held_out", "descending"), *by]


def _ranged(plan: Plan, runs: Sequence[tuple[int, Result]], low: int, high: int) -> pa.Table:
    """The cleaned rows of all units whose hash, read as a number, lies in a range."""
    pieces = [_RANGED.empty_table()]
    for number, run in runs:
        starts = run["starts"]
        first, last = max(bisect_left(starts, low) - 1, 0), bisect_left(starts, high)
        if first >= last:
            continue
        with (plan.place("clean") / run["file"]).open_input() as stream:
            reader = pa.ipc.open_file(stream)
            batches = [reader.get_batch(at) for at in range(first, last)]
        piece = pa.Table.from_batches(batches)
        prefixes = _prefixes(piece["hash"])
        inside = prefixes >= np.uint64(low)
        if high < 1 << 64:
            inside &= prefixes < np.uint64(high)
        piece = piece.filter(pa.array(inside))
        ranks = piece["number"].to_numpy().astype(np.uint64) + np.uint64(number << _NUMBER_BITS)
        piece = piece.append_column("from", pa.array([plan.units[number].source] * len(piece), pa.uint16()))
        pieces.append(piece.append_column("rank", pa.array(ranks)))
    table = pa.concat_tables(pieces).combine_chunks()
    lengths = [pc.fill_null(pc.binary_length(table[name]), 0) for name in ("source", "target")]
    return table.append_column("bytes", pc.add(*lengths))


def _prefixes(hashes: pa.ChunkedArray) -> Hashes:
    """The first eight bytes of each hash as a number."""
    raw = b"".join(hashes.to_pylist())
    return np.frombuffer(raw, ">u8")[::2].astype(np.uint64)


def splits_of(table: pa.Table, corpus: CorpusSettings) -> NDArray[np.object_]:
    """The split of each row: what its source says, else what the hash of its content or of its pair's source says.

    What its hash holds out as a pair is held out as a document, too, where a corpus has it as both.
    """
    validation = corpus.validation

    def positions(name: str) -> NDArray[np.float64]:
        numbers: NDArray[np.uint64] = pc.fill_null(table[name], 2**64 - 1).to_numpy()
        return numbers.astype(np.float64) / 2**64

    is_pair = pc.not_equal(table["kind"], DOCUMENT).to_numpy(zero_copy_only=False)
    own, linked = positions("split_hash"), positions("linked_hash")
    splits = np.full(len(table), "train", object)
    splits[is_pair & (own < 2 * validation)] = "test"
    splits[~is_pair & (linked < 2 * validation)] = "validation"
    if corpus.pairs:
        splits[~is_pair & (own < 2 * validation)] = "validation"
    splits[own < validation] = "validation"
    said = np.array(table["split"].to_pylist(), object)
    return np.where(said == None, splits, said)  # noqa: E711 - element by element


# ------------------------------------------------------------------------------------ decontamination


def evaluation_ngrams(rules: DecontaminateSettings) -> Hashes:
    """The n-grams of all evaluation texts, as hashes in ascending order.

    :raises InputError: an evaluation set is missing or damaged.
    """
    texts = chain.from_iterable(
        read_texts(source, f"corpus.decontaminate.against[{number}]") for number, source in enumerate(rules.against)
    )
    hashes, _ = shingles(list(texts), rules.ngram_words)
    return np.unique(hashes)


def contaminated(rows: pa.Table, forbidden: Hashes, ngram_words: int) -> NDArray[np.bool_]:
    """Which rows share an n-gram with an evaluation text (Brown et al. 2020, appendix C)."""
    found = np.zeros(len(rows), bool)
    if not len(forbidden):
        return found
    for name in ("source", "target"):
        hashes, offsets = shingles([text or "" for text in rows[name].to_pylist()], ngram_words)
        hits = np.concatenate([[0], np.cumsum(np.isin(hashes, forbidden))])
        found |= hits[offsets[1:]] > hits[offsets[:-1]]
    return found
