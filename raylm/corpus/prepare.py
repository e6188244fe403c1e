"""`raylm prepare`: sources → clean → filter → deduplicate → tokenizer → pack → token shards.

Two passes over files on storage, each a Ray Data pipeline. Pass one cleans every unit of the sources and writes its
records sorted into partitions by a hash of their content. Pass two reads one partition of all units, drops exact
duplicates, tokenises and packs. Order by content hash shuffles the corpus and makes every shard the same bytes,
whatever the number of CPUs, the cut into units or the order of files. Nothing crosses a shuffle in memory.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from raylm.corpus.clean import clean, clean_line
from raylm.corpus.filters import reject_document, reject_pair
from raylm.corpus.pack import pack, token_type
from raylm.corpus.sources import Document, Pair, Record, Rejected, Split, Unit, plan_units, read_unit
from raylm.corpus.tokenizer import save_tokenizer, text_encoder, train_tokenizer
from raylm.errors import InputError, RaylmError, from_plain, to_plain
from raylm.models import MAX_POSITIONS, load_tokenizer
from raylm.progress import Progress, note
from raylm.settings import CorpusSettings, Settings
from raylm.storage import MANIFEST, Manifest, Stopwatch, StoragePath, fingerprint
from raylm.tasks import TASKS

WORK = "_work"
"""Below the artifact while it is being made: the cleaned units, kept so that a second start continues."""
_FORMAT = 1
"""Raised when the same input and settings give other bytes than before."""

_CLEANED = pa.schema(
    [
        ("hash", pa.binary(16)),
        ("kind", pa.string()),  # the task of a pair, or "document"
        ("to", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),  # the text of a document
        ("target", pa.string()),
    ]
)


@dataclass(frozen=True)
class Plan:
    """What the workers need to know; travels with their tasks."""

    corpus: CorpusSettings
    work: str
    tokens: str
    partitions: int
    """Parts that records are sorted into by hash: the shards."""


def prepare(settings: Settings) -> Manifest:
    """Token shards and a tokenizer of the corpus in the settings; nothing is done where they exist already.

    :raises InputError: a source is missing or damaged, or nothing of it is left after filtering.
    """
    corpus, stopwatch = settings.corpus, Stopwatch()
    tokens = StoragePath(settings.storage) / "tokens" / corpus.name
    units = plan_units(corpus)
    if not units:
        raise InputError("corpus: no sources; name some under corpus.documents or corpus.pairs")
    key = _key(corpus, settings.model.start_from, units)
    earlier = Manifest.read(tokens)
    if earlier and earlier.inputs.get("key") == key:
        note(f"prepare: {tokens} is up to date")
        return earlier

    (tokens / MANIFEST).delete()  # unfinished from here on
    plan = Plan(
        corpus=corpus,
        work=(tokens / WORK / key).uri,
        tokens=tokens.uri,
        partitions=max(math.ceil(sum(unit.bytes for unit in units) / (corpus.shard_mb * 1e6)), 1),
    )
    cleaned = _clean_units(plan, units)
    _learn_tokenizer(plan, cleaned, settings.model.start_from)
    shards, duplicates = _pack_partitions(plan, cleaned)
    _remove_other_shards(tokens, shards)
    counts: Counter[str] = Counter()
    for unit in cleaned:
        counts.update(unit.counts)
    counts["kept"] -= duplicates
    counts["dropped.duplicate"] = duplicates
    if not shards:
        dropped = ", ".join(f"{name} {number}" for name, number in counts.items() if number and name != "read")
        raise InputError(f"corpus: nothing is left of {counts['read']} rows read: {dropped}")
    manifest = _manifest(plan, key, units, counts, shards, stopwatch).write(tokens)
    (tokens / WORK).delete()
    return manifest


# ------------------------------------------------------------------------------- pass one: clean, filter


@dataclass(frozen=True)
class CleanedUnit:
    """A file of cleaned records, one record batch for each partition."""

    file: str
    counts: dict[str, int]


def _clean_units(plan: Plan, units: list[Unit]) -> list[CleanedUnit]:
    total = sum(unit.bytes for unit in units) / 1e6
    by_file: dict[str, CleanedUnit] = {}
    items = [asdict(unit) for unit in units]
    with Progress("prepare: clean", total, "MB") as progress:
        done = 0.0
        counts: Counter[str] = Counter()
        for row in _mapped(items, lambda item: _clean_unit(plan, Unit(**item))):
            by_file[row["file"]] = CleanedUnit(row["file"], row["counts"])
            counts.update(by_file[row["file"]].counts)
            done += row["bytes"] / 1e6
            progress.update(done, f"{counts['kept']:,} kept of {counts['read']:,}")
    return [by_file[file] for file in sorted(by_file)]


def _clean_unit(plan: Plan, unit: Unit) -> dict[str, Any]:
    """Clean the records of a unit into a file of its own; a file that is there is done."""
    file = StoragePath(plan.work) / f"unit-{fingerprint(asdict(unit))}.arrow"
    if not file.is_file():
        counts: Counter[str] = Counter()
        parts: list[list[tuple[Any, ...]]] = [[] for _ in range(plan.partitions)]
        for record in cleaned_records(read_unit(unit), plan.corpus, counts):
            parts[_partition(record[0], plan.partitions)].append(record)
        schema = _CLEANED.with_metadata({"counts": json.dumps(counts, sort_keys=True)})
        with file.writing() as stream, pa.ipc.new_file(stream, schema) as writer:
            for part in parts:
                part.sort()
                columns = list(zip(*part, strict=True)) or [()] * len(_CLEANED)
                arrays = [pa.array(values, field.type) for values, field in zip(columns, _CLEANED, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
    with file.open_input() as stream:
        counted = json.loads(pa.ipc.open_file(stream).schema.metadata[b"counts"])
    return {"file": file.name, "counts": counted, "bytes": unit.bytes}


def cleaned_records(
    records: Iterable[Record], corpus: CorpusSettings, counts: Counter[str]
) -> Iterator[tuple[bytes, str, str | None, str, str, str | None]]:
    """Rows of the `_CLEANED` schema: what is left of records, each read and dropped one counted.

    A document out of which a held-out pair was made is held out as well.
    """
    held_out: Split | None = None
    for record in records:
        counts["read"] += 1
        if isinstance(record, Rejected):
            counts[f"dropped.{record.reason}"] += 1
            continue
        if isinstance(record, Pair):
            row = _cleaned_pair(record, corpus)
            if record.with_document and not isinstance(row, str):
                held_out = None if row[3] == "train" else "validation"
        else:
            row = _cleaned_document(replace(record, split=held_out) if held_out else record, corpus)
            held_out = None
        if isinstance(row, str):
            counts[f"dropped.{row}"] += 1
        else:
            counts["kept"] += 1
            yield row


_Row = tuple[bytes, str, str | None, str, str, str | None]


def _cleaned_document(document: Document, corpus: CorpusSettings) -> _Row | str:
    text = clean(document.text)
    reason = reject_document(text, corpus.filters)
    if reason is not None:
        return reason
    digest = xxhash.xxh3_128_digest(text.encode())
    return digest, "document", None, document.split or _split(digest, corpus.validation, 0.0), text, None


def _cleaned_pair(pair: Pair, corpus: CorpusSettings) -> _Row | str:
    is_translation = pair.task == "translate"
    source = clean_line(pair.source) if is_translation else clean(pair.source)
    target = clean_line(pair.target)
    reason = reject_pair(source, target, corpus.pair_filters, compare_lengths=is_translation)
    if reason is not None:
        return reason
    digest = xxhash.xxh3_128_digest("\0".join((pair.task, pair.to or "", source, target)).encode())
    # By the source alone: the same source with two targets must not be learned and tested.
    by_source = xxhash.xxh3_128_digest(source.encode())
    test_share = 0.0 if pair.split else corpus.validation
    return digest, pair.task, pair.to, pair.split or _split(by_source, corpus.validation, test_share), source, target


def _split(digest: bytes, validation: float, test: float) -> Split:
    position = int.from_bytes(digest[8:], "big") / 2**64
    if position < validation:
        return "validation"
    return "test" if position < validation + test else "train"


def _partition(digest: bytes, partitions: int) -> int:
    """The number of the part of the hash's range that a digest falls into."""
    return int.from_bytes(digest[:8], "big") * partitions >> 64


# --------------------------------------------------------------------------------------- the tokenizer


def _learn_tokenizer(plan: Plan, cleaned: list[CleanedUnit], start_from: str | None) -> None:
    """Publish the tokenizer: trained on the first partitions, which are a random sample, or that of a model."""
    directory = StoragePath(plan.tokens) / "tokenizer"
    directory.delete()
    with tempfile.TemporaryDirectory(prefix="raylm-tokenizer-") as local:
        if start_from:
            load_tokenizer(start_from).save_pretrained(local)
        else:
            settings = plan.corpus.tokenizer
            wanted = {getattr(source, "to", None) for source in plan.corpus.pairs}
            languages = {*settings.languages, *(language for language in wanted if language)}
            with Progress("prepare: tokens", 0, "texts") as progress:
                texts = _sample(plan, cleaned, settings.sample_mb * 1e6, progress)
                tokenizer = train_tokenizer(texts, settings.vocab_size, sorted(languages))
            save_tokenizer(tokenizer, Path(local), MAX_POSITIONS)
        directory.upload_files(Path(local))


def _sample(plan: Plan, cleaned: list[CleanedUnit], limit_bytes: float, progress: Progress) -> Iterator[str]:
    """Training texts in order of their hashes; documents fill at most half of the limit where there are pairs."""
    share = limit_bytes / 2 if plan.corpus.pairs and plan.corpus.documents else limit_bytes
    left = {True: share, False: share}
    texts = 0
    for partition in range(plan.partitions):
        for row in _partition_rows(plan, cleaned, partition)[0].to_pylist():
            is_document = row["kind"] == "document"
            if row["split"] != "train" or left[is_document] <= 0:
                continue
            for text in (row["source"], row["target"]):
                if text is not None:
                    left[is_document] -= len(text.encode())
                    texts += 1
                    progress.update(texts)
                    yield text
        if max(left.values()) <= 0:
            return


# --------------------------------------------------------------------- pass two: deduplicate, tokenise, pack


def _pack_partitions(plan: Plan, cleaned: list[CleanedUnit]) -> tuple[list[dict[str, Any]], int]:
    """Write the shards; returns what each file holds, and how many duplicates were dropped."""
    shards: list[dict[str, Any]] = []
    duplicates = 0
    items = [{"partition": partition} for partition in range(plan.partitions)]
    with Progress("prepare: pack", plan.partitions, "shards") as progress:
        for done, row in enumerate(_mapped(items, lambda item: _pack_partition(plan, cleaned, item["partition"])), 1):
            shards += row["shards"]
            duplicates += row["duplicates"]
            progress.update(done, f"{sum(shard['tokens'] for shard in shards) / 1e6:,.1f} M tokens")
    return sorted(shards, key=lambda shard: str(shard["name"])), duplicates


def _pack_partition(plan: Plan, cleaned: list[CleanedUnit], partition: int) -> dict[str, Any]:
    root = StoragePath(plan.tokens)
    with tempfile.TemporaryDirectory(prefix="raylm-tokenizer-") as local:
        (root / "tokenizer").download_files(Path(local))
        tokenizer = load_tokenizer(local)
    encoder = text_encoder(tokenizer.backend_tokenizer)
    end, pad, ids = tokenizer.eos_token_id, tokenizer.pad_token_id, token_type(len(tokenizer))

    rows, duplicates = _partition_rows(plan, cleaned, partition)
    is_document = pa.compute.equal(rows["kind"], "document")
    documents, pairs = rows.filter(is_document), rows.filter(pa.compute.invert(is_document))
    shards = []
    for split in ("train", "validation", "test"):
        chosen = documents.filter(pa.compute.equal(documents["split"], split))
        if len(chosen):
            encoded = encoder.encode_batch_fast(chosen["source"].to_pylist(), add_special_tokens=False)
            tokens = [[*encoding.ids, end] for encoding in encoded]
            table = pack(tokens, plan.corpus.sequence_length, pad, ids)
            name = f"documents/{split}/shard-{partition:05d}.arrow"
            shards.append(_write_shard(root, name, table, sum(map(len, tokens))))
        chosen = pairs.filter(pa.compute.equal(pairs["split"], split))
        if len(chosen):
            table = tokenized_pairs(chosen, encoder, tokenizer.get_vocab(), end, ids)
            tokens_in = len(table["source_ids"].combine_chunks().values) + len(
                table["target_ids"].combine_chunks().values
            )
            shards.append(_write_shard(root, f"pairs/{split}/shard-{partition:05d}.arrow", table, tokens_in))
    return {"shards": shards, "duplicates": duplicates}


def tokenized_pairs(pairs: pa.Table, encoder: Any, vocabulary: dict[str, int], end: int, ids: pa.DataType) -> pa.Table:
    """Pairs with `source_ids` (task token, text, end) and `target_ids` (text, end) beside their texts.

    A tokenizer that lacks the task token spells it out as text.
    """
    sources = encoder.encode_batch_fast(pairs["source"].to_pylist(), add_special_tokens=False)
    targets = encoder.encode_batch_fast(pairs["target"].to_pylist(), add_special_tokens=False)
    prompts: dict[tuple[str, str | None], list[int]] = {}
    source_ids = []
    for task, to, source in zip(pairs["kind"].to_pylist(), pairs["to"].to_pylist(), sources, strict=True):
        if (task, to) not in prompts:
            token = TASKS[task].prompt_token(to)
            known = vocabulary.get(token)
            prompts[task, to] = [known] if known is not None else encoder.encode(token, add_special_tokens=False).ids
        source_ids.append([*prompts[task, to], *source.ids, end])
    target_ids = [[*target.ids, end] for target in targets]
    return pa.table(
        {
            "task": pairs["kind"],
            "to": pairs["to"],
            "source": pairs["source"],
            "target": pairs["target"],
            "source_ids": pa.array(source_ids, pa.list_(ids)),
            "target_ids": pa.array(target_ids, pa.list_(ids)),
        }
    )


def _partition_rows(plan: Plan, cleaned: list[CleanedUnit], partition: int) -> tuple[pa.Table, int]:
    """The records of one partition from all units, in the order of their hashes, without exact duplicates.

    :returns: the records that are left, and how many duplicates there were.
    """
    batches = []
    for unit in cleaned:
        with (StoragePath(plan.work) / unit.file).open_input() as stream:
            batches.append(pa.ipc.open_file(stream).get_batch(partition).replace_schema_metadata())
    table = pa.Table.from_batches(batches, _CLEANED)
    # A copy that must be held out decides for all copies.
    order = pa.compute.sort_indices(
        table.append_column("held_out", pa.compute.not_equal(table["split"], "train")),
        sort_keys=[("hash", "ascending"), ("held_out", "descending"), ("split", "ascending")],
    )
    table = table.take(order)
    hashes = table["hash"].to_pylist()
    first = [index == 0 or hashes[index] != hashes[index - 1] for index in range(len(hashes))]
    return table.filter(pa.array(first, pa.bool_())), len(first) - sum(first)


def _write_shard(root: StoragePath, name: str, table: pa.Table, tokens: int) -> dict[str, Any]:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    data = sink.getvalue()
    (root / name).write_bytes(data)
    return {
        "name": name,
        "rows": len(table),
        "tokens": tokens,
        "bytes": data.size,
        "xxh3_128": xxhash.xxh3_128_hexdigest(data),
    }


# ------------------------------------------------------------------------------------------- the frame


def _mapped(items: list[dict[str, Any]], work: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What `work` makes of each item, on the cluster's CPUs, in the order in which results arrive.

    Items and results cross as JSON: Ray Data would make columns of them.

    :raises RaylmError: the one that `work` raised.
    """
    import ray

    def worked(row: dict[str, str]) -> dict[str, str]:
        try:
            result = work(json.loads(row["item"]))
        except RaylmError as error:
            result = to_plain(error)
        return {"result": json.dumps(result)}

    rows = [{"item": json.dumps(item)} for item in items]
    for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(worked, num_cpus=1).iter_rows():
        result = json.loads(row["result"])
        if "failure" in result:
            raise from_plain(result)
        yield result


def _key(corpus: CorpusSettings, start_from: str | None, units: list[Unit]) -> str:
    """What the shards depend on, as a hash."""
    content = {
        "format": _FORMAT,
        "corpus": corpus.model_dump(mode="json", exclude={"name"}),
        "start_from": start_from,
        "units": sorted(fingerprint([unit.kind, unit.identity]) for unit in units),
    }
    return fingerprint(content)


def _remove_other_shards(tokens: StoragePath, shards: list[dict[str, Any]]) -> None:
    """Delete what an earlier preparation left behind."""
    names = {shard["name"] for shard in shards}
    for kind in ("documents", "pairs"):
        root = tokens / kind
        for file, info in root.list(recursive=True):
            if info.is_file and file.uri[len(tokens.uri.rstrip("/")) + 1 :] not in names:
                file.delete()


def _manifest(
    plan: Plan,
    key: str,
    units: list[Unit],
    counts: Counter[str],
    shards: list[dict[str, Any]],
    stopwatch: Stopwatch,
) -> Manifest:
    rows, tokens = Counter[str](), Counter[str]()
    for shard in shards:
        split = shard["name"].rpartition("/")[0]
        rows[split] += shard["rows"]
        tokens[split] += shard["tokens"]
    size, seconds = sum(unit.bytes for unit in units), stopwatch.elapsed_s
    return Manifest(
        stage="prepare",
        settings={"corpus": plan.corpus.model_dump(mode="json")},
        inputs={"key": key, "units": len(units), "bytes": size},
        outputs=shards,
        counts={**dict(sorted(counts.items())), "rows": dict(rows), "tokens": dict(tokens)},
        metrics={"mb_per_s": round(size / 1e6 / seconds, 2), "tokens": sum(tokens.values())},
        wall_time_s=seconds,
    )
