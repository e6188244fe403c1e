"""Near-duplicates of documents: MinHash proposes, a comparison of all shingles disposes.

1. bands: each part's documents get MinHash signatures (Broder 1997), cut into bands; a band's hash is its key.
2. pairs: documents with a key in common are candidates (Indyk and Motwani 1998). Only keys and ids cross.
3. edges: the exact similarity of each candidate pair is computed; those below the threshold are forgotten.
4. resolve: in each connected component the preferred document stays, and with it every document that is not itself
   similar to one that stays: chains of similarity drop nothing that has no near-copy left.

An id is `part << 32 | row`. Every file is sorted and cut by id or key, so that nothing depends on who made it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raylm.corpus.cleaning import excerpt
from raylm.corpus.merge import merged_file, part_names
from raylm.corpus.plan import Plan
from raylm.corpus.rows import DOCUMENT
from raylm.corpus.shingles import Hashes, mixed, shingles
from raylm.corpus.steps import Result, cut_by_hash, read_part, read_rows, read_table, run_step, write_table
from raylm.settings import DedupSettings

Ids = NDArray[np.uint64]

_SEED = 42
_ALL_PAIRS = 24
"""In larger groups a document is compared with the first and with its neighbours alone."""
_SHOWN_CLUSTERS = 20
_RESOLVED_AT_ONCE = 2_000
_REMOVED, _CLUSTERS = "removed.arrow", "clusters.json"

_ROWS = pa.schema([("row", pa.int64())])
_BANDS = pa.schema([("key", pa.uint64()), ("id", pa.uint64())])
_PAIRS = pa.schema([("a", pa.uint64()), ("b", pa.uint64())])
_PREFERENCE = pa.struct([("trained", pa.bool_()), ("order", pa.int64()), ("id", pa.uint64())])
"""What is smaller stays: held out, then longer or earlier."""
_EDGES = pa.schema([("a", pa.uint64()), ("b", pa.uint64()), ("of_a", _PREFERENCE), ("of_b", _PREFERENCE)])


def find_near_duplicates(plan: Plan, parts: int) -> list[dict[str, Any]]:
    """The largest groups of near-copies, after publishing which documents are to go, for `near_duplicates` to read."""
    if not plan.corpus.dedup.fuzzy:
        return []
    hashed, place, names = plan.place("minhash"), plan.place("dedup"), part_names(parts)
    run_step(hashed, "prepare: minhash", [f"bands-{n}" for n in names], lambda part: _write_bands(plan, part, parts))
    run_step(hashed, "prepare: pairs", [f"pairs-{n}" for n in names], lambda part: _write_pairs(plan, part, parts))
    run_step(place, "prepare: verify", [f"edges-{n}" for n in names], lambda part: _write_edges(plan, part, parts))
    if not (place / _REMOVED).is_file():
        _remove(plan, parts)
    return list((place / _CLUSTERS).read_json())


def _remove(plan: Plan, parts: int) -> None:
    """Publish the rows to go of each part, and the largest groups."""
    place = plan.place("dedup")
    components = _components(read_table(place / f"edges-{name}.arrow") for name in part_names(parts))
    batches = [
        range(n, min(n + _RESOLVED_AT_ONCE, len(components))) for n in range(0, len(components), _RESOLVED_AT_ONCE)
    ]
    resolved = run_step(
        place,
        "prepare: resolve",
        [f"resolved-{number:05d}" for number in range(len(batches))],
        lambda number: {
            "removed": [_resolve(plan, components.members(n), components.pairs(n)) for n in batches[number]]
        },
    )
    removed = [ids for result in resolved for ids in result["removed"]]
    (place / _CLUSTERS).write_json(_largest(plan, components, removed))
    flat = np.sort(np.array([id for ids in removed for id in ids], np.uint64))
    counts = np.bincount((flat >> np.uint64(32)).astype(np.int64), minlength=parts)
    rows = (flat & np.uint64(0xFFFFFFFF)).astype(np.int64)
    write_table(place / _REMOVED, pa.table([rows], _ROWS), counts.tolist())


def near_duplicates(plan: Plan, part: int) -> NDArray[np.int64]:
    """The rows of a part that are to go: each has a near-copy among those that stay."""
    if not plan.corpus.dedup.fuzzy:
        return np.zeros(0, np.int64)
    rows: NDArray[np.int64] = read_part([plan.place("dedup") / _REMOVED], part, _ROWS)["row"].to_numpy()
    return rows


# ------------------------------------------------------------------------------------------ candidates


def signatures(hashes: Hashes, offsets: NDArray[np.int64], permutations: int) -> NDArray[np.uint32]:
    """The MinHash signatures of texts, (texts, permutations), from their shingles as `shingles` gives them."""
    from rensa import RMinHash

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.astype(np.uint64), permutations, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(offsets) - 1, permutations)


def band_keys(signed: NDArray[np.uint32], bands: int) -> Hashes:
    """One key for each text and band, (texts, bands); keys of different bands never agree but by chance."""
    values = signed.reshape(len(signed), bands, signed.shape[1] // bands).astype(np.uint64)
    keys = np.broadcast_to(mixed(np.arange(bands, dtype=np.uint64)), values.shape[:2])
    for row in range(values.shape[2]):
        keys = mixed(keys ^ values[:, :, row])
    return keys


def _write_bands(plan: Plan, part: int, parts: int) -> Result:
    rules = plan.corpus.dedup
    table = read_table(merged_file(plan, part))
    rows = np.flatnonzero(pc.equal(table["kind"], DOCUMENT).to_numpy(zero_copy_only=False))
    hashes, offsets = shingles(table["source"].take(rows).to_pylist(), rules.shingle_words)
    has_words = np.diff(offsets) > 0
    keys = band_keys(signatures(hashes, offsets, rules.bands * rules.rows_per_band), rules.bands)[has_words]
    ids = np.repeat(rows[has_words].astype(np.uint64) | np.uint64(part << 32), rules.bands)
    order = np.lexsort((ids, keys.ravel()))
    found = pa.table([keys.ravel()[order], ids[order]], _BANDS)
    write_table(plan.place("minhash") / f"bands-part-{part:05d}.arrow", found, cut_by_hash(found["key"], parts))
    return {"documents": len(rows)}


def _write_pairs(plan: Plan, bucket: int, parts: int) -> Result:
    place = plan.place("minhash")
    found = read_part((place / f"bands-{name}.arrow" for name in part_names(parts)), bucket, _BANDS)
    keys, ids = found["key"].to_numpy(), found["id"].to_numpy()
    order = np.lexsort((ids, keys))
    keys, ids = keys[order], ids[order]
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, int)
    unique = np.unique(_grouped_pairs(ids, begins, np.diff(np.append(begins, len(keys)))), axis=0)
    counts = np.bincount((unique[:, 0] >> np.uint64(32)).astype(np.int64), minlength=parts)
    write_table(place / f"pairs-part-{bucket:05d}.arrow", pa.table(list(unique.T), _PAIRS), counts.tolist())
    return {"pairs": len(unique)}


def _grouped_pairs(ids: Ids, begins: NDArray[np.int64], sizes: NDArray[np.int64]) -> Ids:
    """The candidate pairs (pairs, 2) of groups of ids, the smaller id first.

    All pairs of a small group. Of a large one, which is either many copies of one text or a template, each with the
    first and with the next: texts that are truly alike meet in other bands too.
    """
    pairs = [np.zeros((0, 2), np.uint64)]
    for size in np.unique(sizes[sizes > 1]):
        at = begins[sizes == size]
        if size <= _ALL_PAIRS:
            left, right = np.triu_indices(size, 1)
        else:
            rest = np.arange(1, size)
            left, right = np.concatenate([np.zeros(size - 1, int), rest[:-1]]), np.concatenate([rest, rest[1:]])
        pairs.append(np.stack([ids[(at[:, None] + side).ravel()] for side in (left, right)], axis=1))
    return np.concatenate(pairs)


# ---------------------------------------------------------------------------------------- verification


def _write_edges(plan: Plan, part: int, parts: int) -> Result:
    found = read_part((plan.place("minhash") / f"pairs-{name}.arrow" for name in part_names(parts)), part, _PAIRS)
    pairs = np.unique(np.stack([found["a"].to_numpy(), found["b"].to_numpy()], axis=1), axis=0)
    # By the part of the other document, so that two parts are in memory at the most.
    edges: list[dict[str, Any]] = []
    mine = _documents(plan, np.unique(pairs[:, 0]))
    for other in np.unique(pairs[:, 1] >> np.uint64(32)):
        here = pairs[pairs[:, 1] >> np.uint64(32) == other]
        theirs = _documents(plan, np.unique(here[:, 1]))
        for a, b in here.tolist():
            if similarity(mine[a].shingles, theirs[b].shingles, plan.corpus.dedup) >= plan.corpus.dedup.threshold:
                edges.append({"a": a, "b": b, "of_a": mine[a].preference, "of_b": theirs[b].preference})
    write_table(plan.place("dedup") / f"edges-part-{part:05d}.arrow", pa.Table.from_pylist(edges, _EDGES))
    return {"pairs": len(pairs), "edges": len(edges)}


@dataclass(frozen=True, slots=True)
class _Document:
    shingles: Hashes
    """Ascending, each once."""
    preference: dict[str, Any]


def similarity(first: Hashes, second: Hashes, rules: DedupSettings) -> float:
    """Jaccard's index of two ascending sets of shingles, or the share of the smaller one that is in the other."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    smaller = min(len(first), len(second))
    return common / (smaller if rules.measure == "containment" else len(first) + len(second) - common)


def _documents(plan: Plan, ids: Ids) -> dict[int, _Document]:
    """What is to be compared of some documents."""
    rules = plan.corpus.dedup
    documents: dict[int, _Document] = {}
    for part in np.unique(ids >> np.uint64(32)):
        here = ids[ids >> np.uint64(32) == part]
        rows = (here & np.uint64(0xFFFFFFFF)).astype(np.int64).tolist()
        table = read_rows(merged_file(plan, int(part)), rows, ["source", "split", "rank"])
        texts = table["source"].to_pylist()
        hashes, offsets = shingles(texts, rules.shingle_words)
        for number, (id, text) in enumerate(zip(here.tolist(), texts, strict=True)):
            order = -len(text) if rules.keep == "longest" else table["rank"][number].as_py()
            preference = {"trained": table["split"][number].as_py() == "train", "order": order, "id": id}
            documents[id] = _Document(np.unique(hashes[offsets[number] : offsets[number + 1]]), preference)
    return documents


# ------------------------------------------------------------------------------------------ components


@dataclass(frozen=True)
class _Components:
    """The connected components of the graph of similar pairs, one behind another in each array."""

    ids: Ids
    """The documents, in a component by preference."""
    begins: NDArray[np.int64]
    """(components + 1,), where each one's `ids` begin."""
    edges: Ids
    """(edges, 2), the preferred document first."""
    edge_begins: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.begins) - 1

    def members(self, number: int) -> list[int]:
        found: list[int] = self.ids[self.begins[number] : self.begins[number + 1]].tolist()
        return found

    def pairs(self, number: int) -> set[tuple[int, int]]:
        """Those known to be similar."""
        edges = self.edges[self.edge_begins[number] : self.edge_begins[number + 1]]
        return set(map(tuple, edges.tolist()))


def _components(tables: Iterable[pa.Table]) -> _Components:
    """The components of a graph, in the order of their preferred documents' ids."""
    edges = pa.concat_tables([_EDGES.empty_table(), *tables])
    sides = pa.chunked_array([*edges["of_a"].chunks, *edges["of_b"].chunks], _PREFERENCE).combine_chunks()
    trained, order, id = (sides.field(name).to_numpy(zero_copy_only=False) for name in ("trained", "order", "id"))
    ids, firsts, places = np.unique(id, return_index=True, return_inverse=True)
    a, b = np.split(places, 2)
    by_rank = np.lexsort((ids, order[firsts], trained[firsts]))
    ranks = np.empty(len(ids), np.int64)
    ranks[by_rank] = np.arange(len(ids))
    roots = _roots(len(ids), a, b)
    best = ranks.copy()
    np.minimum.at(best, roots, ranks)
    component = ids[by_rank[best[roots]]]  # named by its preferred document

    by_component = np.lexsort((ranks, component))
    numbers, begins = np.unique(component[by_component], return_index=True)
    first, second = np.where(ranks[a] < ranks[b], (a, b), (b, a))
    of_edges = component[first]
    edge_order = np.argsort(of_edges, kind="stable")
    return _Components(
        ids[by_component],
        np.append(begins, len(ids)),
        np.stack([ids[first], ids[second]], axis=1)[edge_order],
        np.append(np.searchsorted(of_edges[edge_order], numbers), len(of_edges)),
    )


def _roots(nodes: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """(nodes,) the smallest node that each is connected with by the edges from `a` to `b`.

    All trees are hooked onto smaller ones at once, and flattened by pointer jumping (Shiloach and Vishkin 1982).
    """
    roots = np.arange(nodes)
    while len(a):
        low, high = np.minimum(roots[a], roots[b]), np.maximum(roots[a], roots[b])
        are_apart = low != high
        a, b = a[are_apart], b[are_apart]
        np.minimum.at(roots, high[are_apart], low[are_apart])
        while not np.array_equal(jumped := roots[roots], roots):
            roots = jumped
    return roots


def _resolve(plan: Plan, ids: list[int], pairs: set[tuple[int, int]]) -> list[int]:
    """The documents of a component that are similar to one that stays."""
    kept = ids[:1]
    removed = [id for id in ids[1:] if (ids[0], id) in pairs]
    unsure = [id for id in ids[1:] if (ids[0], id) not in pairs]
    if unsure:
        documents = _documents(plan, np.array(sorted([*kept, *unsure]), np.uint64))
        for id in unsure:
            alike = (
                (other, id) in pairs
                or similarity(documents[other].shingles, documents[id].shingles, plan.corpus.dedup)
                >= plan.corpus.dedup.threshold
                for other in kept
            )
            (removed if any(alike) else kept).append(id)
    return removed


def _largest(plan: Plan, components: _Components, removed: list[list[int]]) -> list[dict[str, Any]]:
    """The largest groups of near-copies, with the text that stays and one of those that go."""

    def text(id: int) -> str:
        row = read_rows(merged_file(plan, id >> 32), [id & 0xFFFFFFFF], ["source"])
        return excerpt(row["source"][0].as_py(), None)

    kept = components.ids[components.begins[:-1]].tolist()
    groups = [(ids, id) for ids, id in zip(removed, kept, strict=True) if ids]
    groups.sort(key=lambda group: (-len(group[0]), group[1]))
    return [
        {"copies": len(ids) + 1, "text": text(kept), "other": text(ids[0])} for ids, kept in groups[:_SHOWN_CLUSTERS]
    ]
