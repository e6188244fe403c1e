"""The last steps: a tokenizer, the tokens of each part, and the shards that training reads."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer

from raylm.corpus import mixture
from raylm.corpus.cleaning import SAMPLES, add_sample, dropped_rows, excerpt, write_dropped
from raylm.corpus.dedup import near_duplicates
from raylm.corpus.filters import width
from raylm.corpus.merge import merged_file, part_names
from raylm.corpus.pack import Packed, pack, token_type
from raylm.corpus.paragraphs import repeats, without
from raylm.corpus.plan import Plan
from raylm.corpus.rows import DOCUMENT, Dropped
from raylm.corpus.steps import Result, read_table, run_step, write_table
from raylm.corpus.tokenizer import save_tokenizer, text_encoder, train_tokenizer
from raylm.errors import ArtifactError
from raylm.models import MAX_POSITIONS, load_tokenizer
from raylm.storage import StoragePath, without_passwords
from raylm.tasks import CLASSIFY, TASKS

TOKENIZER = "tokenizer"
_ENCODED_CHARS = 2 << 20  # at once: the encodings take some fifty times as much memory as their text


# ---------------------------------------------------------------------------------------------- the rows


def _rows(plan: Plan, part: int, parts: int) -> tuple[pa.Table, list[Dropped], int]:
    """What is left of a part: its rows, those dropped here, and how many paragraphs went."""
    table = read_table(merged_file(plan, part))
    is_near = np.zeros(len(table), bool)
    is_near[near_duplicates(plan, part)] = True
    dropped = dropped_rows(table.filter(pa.array(is_near)), "near_duplicate")
    gone = repeats(plan, part, parts)
    if gone:
        texts = table["source"].to_pylist()
        for row, places in gone.items():
            texts[row] = without(texts[row], places)
        table = table.set_column(table.schema.get_field_index("source"), "source", pa.array(texts, pa.string()))
    short = np.zeros(len(table), bool)
    short[list(gone)] = [width(table["source"][row].as_py()) < plan.corpus.filters.min_chars for row in gone]
    dropped += dropped_rows(table.filter(pa.array(short)), "repeated_paragraphs")
    conflicting = other_labels(table)
    dropped += dropped_rows(table.filter(pa.array(conflicting)), "conflicting_label")
    kept = table.filter(pa.array(~is_near & ~short & ~conflicting))
    return kept, dropped, sum(map(len, gone.values()))


def other_labels(rows: pa.Table) -> NDArray[np.bool_]:
    """Which labelled texts stand in the same part with another label that counts: a held-out one, else the first."""
    others = np.zeros(len(rows), bool)
    numbers = np.flatnonzero(pc.equal(rows["kind"], CLASSIFY.name).to_numpy(zero_copy_only=False))
    if not len(numbers):
        return others
    labelled = rows.select(["source", "split", "rank"]).take(numbers)
    labelled = labelled.append_column("is_trained", pc.equal(labelled["split"], "train"))
    by = [(name, "ascending") for name in ("source", "is_trained", "rank")]
    order = pc.sort_indices(labelled, sort_keys=by).to_numpy()
    sources = labelled["source"].take(order).combine_chunks()
    others[numbers[order[1:]]] = pc.equal(sources[1:], sources[:-1]).to_numpy(zero_copy_only=False)
    return others


# ----------------------------------------------------------------------------------------- the tokenizer


@dataclass(frozen=True)
class Ids:
    """The special ids of a tokenizer."""

    end: int
    pad: int
    size: int
    """Of the vocabulary."""


def check_tokenizer(plan: Plan) -> None:
    """:raises ArtifactError: the tokenizer that is to be taken cannot be loaded, or has no `tokenizer.json`."""
    start = plan.start_from
    if start and not load_tokenizer(start).is_fast:
        raise ArtifactError(
            f"model {without_passwords(start)}: its tokenizer is written in Python and has no tokenizer.json, which"
            " tokenising needs; name another one with corpus.tokenizer.start_from"
        )


def learn_tokenizer(plan: Plan, parts: int) -> Ids:
    """The special ids of the tokenizer, after publishing it: trained on the first parts, which are a random sample, or
    that of a model.
    """

    def learn(_: int) -> Result:
        with tempfile.TemporaryDirectory(prefix="raylm-tokenizer-") as local:
            if plan.start_from:
                load_tokenizer(plan.start_from).save_pretrained(local)
            else:
                texts = _sample(plan, parts)
                tokenizer = train_tokenizer(texts, plan.corpus.tokenizer, plan.task_languages)
                save_tokenizer(tokenizer, Path(local), MAX_POSITIONS)
            (plan.place("tokenizer") / TOKENIZER).upload_files(Path(local))
            learned = load_tokenizer(local)
        return asdict(Ids(learned.eos_token_id, learned.pad_token_id, len(learned)))

    [ids] = run_step(plan.place("tokenizer"), "prepare: tokenizer", ["learned"], learn)
    return Ids(**ids)


def _sample(plan: Plan, parts: int) -> Iterator[str]:
    """Training texts in order of their hashes; documents fill at most half of the limit where there are pairs."""
    limit = plan.corpus.tokenizer.sample_mb * 1e6
    share = limit / 2 if plan.corpus.pairs and plan.corpus.documents else limit
    left = {True: share if plan.corpus.documents else 0, False: share if plan.corpus.pairs else 0}
    for part in range(parts):
        for row in _rows(plan, part, parts)[0].select(["kind", "split", "source", "target"]).to_pylist():
            is_document = row["kind"] == DOCUMENT
            if row["split"] != "train" or left[is_document] <= 0:
                continue
            # A label stands in thousands of rows, and is no sample of how its language is written.
            has_target = row["kind"] not in (DOCUMENT, CLASSIFY.name)
            for text in (row["source"], row["target"]) if has_target else (row["source"],):
                left[is_document] -= len(text.encode())
                yield text
        if max(left.values()) <= 0:
            return


# -------------------------------------------------------------------------------------------- the tokens


def tokenize(plan: Plan, parts: int, special: Ids) -> list[Result]:
    """What each part's tokens are: how many rows are left, tokens by source, lengths and languages of the texts."""

    def detail(results: list[Result]) -> str:
        return f"{sum(sum(r['tokens'].values()) for r in results) / 1e6:,.1f} M tokens"

    return run_step(
        plan.place("tokenize"),
        "prepare: tokenize",
        part_names(parts),
        lambda part: _tokenize_part(plan, part, parts, special),
        detail=detail,
    )


def _tokenize_part(plan: Plan, part: int, parts: int, special: Ids) -> Result:
    tokenizer = Tokenizer.from_buffer((plan.place("tokenizer") / TOKENIZER / "tokenizer.json").read_bytes())
    encoder, end, ids = text_encoder(tokenizer), special.end, token_type(special.size)
    table, dropped, paragraphs = _rows(plan, part, parts)
    is_document = pc.equal(table["kind"], DOCUMENT)
    documents, pairs = table.filter(is_document), table.filter(pc.invert(is_document))

    place = plan.place("tokenize")
    tokens = encode(documents["source"].to_pylist(), encoder, end, ids)
    of_documents = pa.table(
        {"split": documents["split"], "from": documents["from"], "content": documents["content"], "ids": tokens}
    )
    write_table(place / f"documents-part-{part:05d}.arrow", of_documents)
    of_pairs = tokenized_pairs(pairs, encoder, tokenizer.get_vocab(), end, ids)
    write_table(place / f"pairs-part-{part:05d}.arrow", of_pairs)
    if dropped and plan.corpus.keep_dropped:
        write_dropped(place / f"part-{part:05d}-dropped.parquet", dropped)

    trained = pc.equal(of_documents["split"], "train")
    lengths = pc.list_value_length(of_documents["ids"]).filter(trained).to_numpy().astype(np.int64)
    by_source = np.bincount(of_documents["from"].filter(trained).to_numpy(), weights=lengths)
    counts: Counter[str] = Counter(f"dropped.{row.reason}" for row in dropped)
    samples = {"kept": [excerpt(row["source"], row["target"]) for row in table.slice(0, SAMPLES).to_pylist()]}
    for row in dropped:
        add_sample(samples, row)
    return {
        "rows": len(table),
        "counts": {**counts, "paragraphs_dropped": paragraphs},
        "tokens": {str(number): int(total) for number, total in enumerate(by_source) if total},
        "lengths": {"documents": _length_bins(documents), "pairs": _length_bins(pairs)},
        "languages": {
            "documents": Counter(documents["language"].to_pylist()),
            "pairs": Counter(pairs["language"].to_pylist()),
        },
        "samples": samples,
    }


def encode(texts: Sequence[str], encoder: Any, end: int, ids: pa.DataType) -> pa.ListArray:
    """The token ids of each text, with the end token behind them."""
    kind = ids.to_pandas_dtype()
    pieces = [np.zeros(0, kind)]
    lengths: list[int] = []
    for batch in _batches(texts):
        encoded = [encoding.ids for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False)]
        lengths += [len(one) + 1 for one in encoded]
        pieces.append(np.fromiter(chain.from_iterable(chain(one, (end,)) for one in encoded), kind))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(pieces), ids))


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    start = chars = 0
    for number, text in enumerate(texts):
        chars += len(text)
        if chars >= _ENCODED_CHARS:
            yield list(texts[start : number + 1])
            start, chars = number + 1, 0
    if start < len(texts):
        yield list(texts[start:])


def tokenized_pairs(pairs: pa.Table, encoder: Any, vocabulary: dict[str, int], end: int, ids: pa.DataType) -> pa.Table:
    """Pairs with `source_ids` (task token, text, end) and `target_ids` (text, end) beside their texts.

    A tokenizer that lacks the task token spells it out as text. A text to classify has no task token, but what the
    tokenizer itself begins texts with, such as `[CLS]`; its label has no tokens.
    """
    prompts: dict[tuple[str, str | None], list[int]] = {}
    sources = []
    for task, to, source in zip(
        pairs["kind"].to_pylist(),
        pairs["to"].to_pylist(),
        encode(pairs["source"].to_pylist(), encoder, end, ids).to_pylist(),
        strict=True,
    ):
        if (task, to) not in prompts:
            if task == CLASSIFY.name:
                prompts[task, to] = _opening(encoder)
            else:
                token = TASKS[task].prompt_token(to) or ""
                known = vocabulary.get(token)
                spelt = encoder.encode(token, add_special_tokens=False).ids
                prompts[task, to] = [known] if known is not None else spelt
        sources.append([*prompts[task, to], *source])
    return pa.table(
        {
            "split": pairs["split"],
            "task": pairs["kind"],
            "to": pairs["to"],
            "source": pairs["source"],
            "target": pairs["target"],
            "source_ids": pa.array(sources, pa.list_(ids)),
            "target_ids": _target_ids(pairs, encoder, end, ids),
        }
    )


def _opening(encoder: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text of its own accord."""
    encoded = encoder.encode("a")
    first_plain = encoded.special_tokens_mask.index(0)
    opening: list[int] = encoded.ids[:first_plain]
    return opening


def _target_ids(pairs: pa.Table, encoder: Any, end: int, ids: pa.DataType) -> pa.ListArray:
    is_text = pc.not_equal(pairs["kind"], CLASSIFY.name).to_numpy(zero_copy_only=False)
    encoded = encode(pairs["target"].filter(pa.array(is_text)).to_pylist(), encoder, end, ids)
    lengths = np.zeros(len(pairs), np.int32)
    lengths[is_text] = encoded.value_lengths().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), encoded.values)


def _length_bins(rows: pa.Table) -> dict[int, int]:
    """How many sources have at least 2^n characters, but not 2^(n + 1), by n."""
    chars = pc.utf8_length(rows["source"]).to_numpy()
    bins = np.floor(np.log2(np.maximum(chars, 1))).astype(int)
    return {int(n): int(count) for n, count in zip(*np.unique(bins, return_counts=True), strict=True)}


# -------------------------------------------------------------------------------------------- the shards


def write_shards(plan: Plan, tokenized: list[Result], special: Ids) -> list[Result]:
    """What each part's shards hold, after writing them into the artifact."""
    tokens: Counter[int] = Counter()
    for result in tokenized:
        tokens.update({int(number): total for number, total in result["tokens"].items()})
    sources = plan.corpus.documents
    epochs = mixture.epochs(
        [tokens[n] for n in range(len(sources))], [s.weight for s in sources], [s.epochs for s in sources]
    )
    return run_step(
        plan.place("pack"),
        "prepare: pack",
        part_names(len(tokenized)),
        lambda part: _pack_part(plan, part, epochs, special),
    )


def _pack_part(plan: Plan, part: int, epochs: list[float], special: Ids) -> Result:
    place = plan.place("tokenize")
    documents = read_table(place / f"documents-part-{part:05d}.arrow")
    pairs = read_table(place / f"pairs-part-{part:05d}.arrow")
    shards: list[Result] = []
    counts: Counter[str] = Counter()
    for split in ("train", "validation", "test"):
        chosen = documents.filter(pc.equal(documents["split"], split))
        rounds = _rounds(chosen, epochs) if split == "train" else [chosen]
        packed = [_packed(plan, one, special) for one in rounds if len(one)]
        if packed:
            for name in ("padding", "cut_documents", "truncated_documents", "truncated_tokens"):
                counts[name] += sum(getattr(one, name) for one in packed)
            table = pa.concat_tables(one.table for one in packed)
            size = sum(one.tokens for one in packed)
            shards.append(_write_shard(plan.root, f"documents/{split}/shard-{part:05d}.arrow", table, size))
        chosen = pairs.filter(pc.equal(pairs["split"], split)).drop_columns("split")
        if len(chosen):
            size = sum(len(chosen[name].combine_chunks().flatten()) for name in ("source_ids", "target_ids"))
            shards.append(_write_shard(plan.root, f"pairs/{split}/shard-{part:05d}.arrow", chosen, size))
    return {"shards": shards, "counts": dict(counts)}


def _rounds(documents: pa.Table, epochs: list[float]) -> list[pa.Table]:
    """The documents as often as their source's epochs say; packed apart, so that no copy stands beside another."""
    hashes, sources = documents["content"].to_numpy(), documents["from"].to_numpy()
    copies = np.zeros(len(documents), np.int64)
    for number, share in enumerate(epochs):
        copies[sources == number] = mixture.copies(hashes[sources == number], share)
    return [documents.filter(pa.array(copies > number)) for number in range(int(copies.max(initial=0)))]


def _packed(plan: Plan, documents: pa.Table, special: Ids) -> Packed:
    ids = documents["ids"].combine_chunks()
    return pack(
        ids.flatten().to_numpy(),
        pc.list_value_length(ids).to_numpy().astype(np.int64),
        plan.corpus.sequence_length,
        special.pad,
        plan.corpus.pack,
        special.end,
    )


def _write_shard(root: StoragePath, name: str, table: pa.Table, tokens: int) -> Result:
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
