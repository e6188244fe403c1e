"""Packed sequences straight from the sources, made while training reads them: the corpus itself is not written down.

A stream is a row of places. A place holds some units of the sources, drawn anew in each pass over them; its documents
are cleaned, shuffled, tokenised and packed together, on any CPU of the cluster. What it gives is a function of the
settings and the number of the place alone, so that a stream can be entered at any place.

The documents held out for validation are those that `raylm prepare` holds out, as their hash decides. What a prepared
corpus has beyond a stream: copies are found in all of it, here within a place alone.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tokenizers import Tokenizer

from raylm.corpus import mixture
from raylm.corpus.cleaning import check_rejected, rejected_row
from raylm.corpus.merge import contaminated, evaluation_ngrams, splits_of
from raylm.corpus.pack import pack, token_type
from raylm.corpus.plan import Plan, plan_stream
from raylm.corpus.reading import read_unit
from raylm.corpus.rows import DOCUMENT, Cleaned, Dropped, cleaned_records, cleaned_table
from raylm.corpus.shards import TOKENIZER, Ids, encode
from raylm.corpus.shingles import Hashes
from raylm.corpus.tokenizer import text_encoder
from raylm.errors import ArtifactError, RaylmError
from raylm.models import load_tokenizer
from raylm.settings import Settings
from raylm.storage import Manifest, StoragePath, fingerprint

if TYPE_CHECKING:
    import ray
    from ray.data import Dataset

_BLOCK_BYTES = 1 << 20
"""Of the blocks that a place is dealt out in: small, so that all workers read from the same few places."""
_LEAST_PLACES = 16


def open_stream(settings: Settings) -> Stream:
    """The stream of the settings' documents, beside the sample of them that `raylm prepare` has prepared.

    :raises ArtifactError: the sample is not there, or was made with other settings or of other files.
    :raises InputError: a source is missing or damaged.
    """
    sample, whole = plan_stream(settings)
    prepared = Manifest.read(sample.root)
    if prepared is None or prepared.inputs.get("key") != sample.key:
        raise ArtifactError(f"corpus {sample.root}: not prepared with these settings; run `raylm prepare` first")
    tokenizer = load_tokenizer((sample.root / TOKENIZER).address)
    documents = whole.corpus.documents
    tokens = [
        described.get("tokens", 0) * _bytes(whole, number) / max(_bytes(sample, number), 1)
        for number, described in enumerate(prepared.statistics["sources"][: len(documents)])
    ]
    shares = mixture.epochs(
        [round(n) for n in tokens], [source.weight for source in documents], [source.epochs for source in documents]
    )
    return Stream(
        plan=whole,
        special=Ids(tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)),
        shares=tuple(shares),
        tokens_per_pass=sum(share * number for share, number in zip(shares, tokens, strict=True)),
        seed=settings.pretrain.seed,
        forbidden=evaluation_ngrams(whole.corpus.decontaminate),
    )


def _bytes(plan: Plan, source: int) -> int:
    return sum(unit.bytes for unit in plan.units if unit.source == source)


@dataclass(frozen=True)
class Stream:
    """What makes the sequences of any place; travels to the workers.

    :param shares: how often each source of documents is taken in a pass.
    :param tokens_per_pass: roughly: what the sample has, in proportion.
    :param forbidden: the n-grams of evaluation texts.
    """

    plan: Plan
    special: Ids
    shares: tuple[float, ...]
    tokens_per_pass: float
    seed: int
    forbidden: Hashes

    @property
    def key(self) -> str:
        """Of all that the sequences depend on."""
        return fingerprint([self.plan.key, self.shares, self.seed])

    def dataset(self, first_place: int, sequences: int, record: str) -> Dataset:
        """Rows with `input_ids`, `document_lengths` and `place`, in the order of places, from one of them on.

        A row whose `failure` is not null stands for a place that cannot be read, and is the error's text.

        :param sequences: about how many are wanted; there will be more.
        :param record: a directory in which each place notes what became of its rows.
        """
        import ray.data

        tokens = sequences * self.plan.corpus.sequence_length
        places = math.ceil(2 * tokens / max(self.tokens_per_pass, 1) * self.places_per_pass)
        places = max(places, _LEAST_PLACES)
        reference = ray.put(self)  # once, not with every task

        def read(numbers: pa.Table) -> pa.Table:
            stream = _fetched(reference)
            return pa.concat_tables(stream.read(first_place + n, record) for n in numbers["id"].to_pylist())

        dataset = ray.data.range(places, override_num_blocks=places)
        dataset.context.target_max_block_size = _BLOCK_BYTES
        return dataset.map_batches(read, batch_size=None, batch_format="pyarrow", num_cpus=1)

    def read(self, place: int, record: str) -> pa.Table:
        """The rows of a place, as in `dataset`."""
        counts: Counter[str] = Counter()
        rejected: list[dict[str, Any]] = []
        try:
            documents = self._documents(place, counts, rejected)
            check_rejected(self.plan.corpus.max_rejected, counts["read"], counts["rejected"], rejected)
        except RaylmError as error:
            return self._table(place, pa.table({"input_ids": [[]], "document_lengths": [[]]}), failure=str(error))
        sequences = self._packed(documents, counts)
        (StoragePath(record) / _record_name(place)).write_json({"counts": counts, "rejected": rejected})
        return self._table(place, sequences)

    def counts(self, record: str, places: int) -> dict[str, int]:
        """What became of the rows of the first places."""
        names = {_record_name(place) for place in range(places)}
        counts: Counter[str] = Counter()
        for file, _ in StoragePath(record).list():
            if file.name in names:
                counts.update(file.read_json()["counts"])
        return dict(sorted(counts.items()))

    def _documents(self, place: int, counts: Counter[str], rejected: list[dict[str, Any]]) -> pa.Table:
        """The documents of a place to train on, shuffled, in the schema `CLEANED`, and which reading of them it is."""
        corpus = self.plan.corpus
        pieces = []
        for number, again in self._entries_at(place):
            unit = self.plan.units[number]
            source = corpus.documents[unit.source]
            rows: list[Cleaned] = []
            for outcome in cleaned_records(read_unit(unit, source), corpus, source, counts):
                if isinstance(outcome, Cleaned):
                    if outcome.kind == DOCUMENT:
                        rows.append(outcome)
                elif not isinstance(outcome, Dropped):
                    rejected.append(rejected_row(outcome, unit))
            # Of a source that is not taken a whole number of times, each pass takes another part.
            round_ = np.uint64(place // self.places_per_pass << 16 | again)
            hashes = np.array([row.split_hash for row in rows], np.uint64) ^ (round_ << np.uint64(32))
            share = self.shares[unit.source]
            taken = mixture.copies(hashes, share / math.ceil(share)) > 0
            piece = cleaned_table(rows).append_column("again", pa.array([again] * len(rows), pa.int64()))
            pieces.append(piece.filter(pa.array(taken)))
        table = pa.concat_tables(pieces)
        # Of copies, one that is held out stays, else the longest or the first, as in a prepared corpus. What a mixture
        # wants to be read several times is no copy.
        is_trained = splits_of(table, corpus) == "train"
        lengths = pc.binary_length(table["source"]).to_numpy() if corpus.dedup.keep == "longest" else is_trained
        order = np.lexsort([-lengths.astype(np.int64), is_trained])
        readings = zip(table["hash"].to_pylist(), table["again"].to_pylist(), strict=True)
        names = np.array([digest + reading.to_bytes(4) for digest, reading in readings], object)
        _, firsts = np.unique(names[order], return_index=True)
        counts["dropped.duplicate"] += len(table) - len(firsts)
        shuffled = np.random.default_rng((self.seed, place)).permutation(np.sort(order[firsts]))
        table, is_trained = table.take(shuffled), is_trained[shuffled]
        counts["held_out"] += int((~is_trained).sum())
        is_forbidden = contaminated(table, self.forbidden, corpus.decontaminate.ngram_words) & is_trained
        counts["dropped.contaminated"] += int(is_forbidden.sum())
        table = table.filter(pa.array(is_trained & ~is_forbidden))
        counts["trained"] += len(table)
        return table

    def _packed(self, documents: pa.Table, counts: Counter[str]) -> pa.Table:
        corpus = self.plan.corpus
        ids = encode(documents["source"].to_pylist(), self._encoder, self.special.end, token_type(self.special.size))
        packed = pack(
            ids.flatten().to_numpy(),
            ids.value_lengths().to_numpy().astype(np.int64),
            corpus.sequence_length,
            self.special.pad,
            corpus.pack,
            self.special.end,
        )
        counts.update({name: getattr(packed, name) for name in ("tokens", "truncated_documents", "truncated_tokens")})
        return packed.table

    def _table(self, place: int, sequences: pa.Table, failure: str | None = None) -> pa.Table:
        rows = len(sequences)
        ids = pa.list_(token_type(self.special.size))
        return pa.table(
            {
                "input_ids": sequences["input_ids"].cast(ids),
                "document_lengths": sequences["document_lengths"].cast(pa.list_(pa.int32())),
                "place": pa.array([place] * rows, pa.int64()),
                "failure": pa.array([failure] * rows, pa.string()),
            }
        )

    @cached_property
    def _entries(self) -> NDArray[np.int64]:
        """Units as often as a pass takes them: the unit's number, and how many times it has stood before."""
        return np.array(
            [
                (number, again)
                for number, unit in enumerate(self.plan.units)
                for again in range(math.ceil(self.shares[unit.source]))
            ],
            np.int64,
        )

    @cached_property
    def places_per_pass(self) -> int:
        size: int = sum(self.plan.units[number].bytes for number in self._entries[:, 0].tolist())
        places = min(round(size / (self.plan.corpus.shard_mb * 1e6)), len(self._entries))
        return max(places, 1)

    def _entries_at(self, place: int) -> list[list[int]]:
        number, within = divmod(place, self.places_per_pass)
        order = np.random.default_rng((self.seed, number)).permutation(len(self._entries))
        chosen: list[list[int]] = self._entries[np.array_split(order, self.places_per_pass)[within]].tolist()
        return chosen

    @cached_property
    def _encoder(self) -> Any:
        file = StoragePath(self.plan.tokens) / TOKENIZER / "tokenizer.json"
        return text_encoder(Tokenizer.from_buffer(file.read_bytes()))


@lru_cache(maxsize=1)
def _fetched(reference: ray.ObjectRef[Stream]) -> Stream:
    import ray

    stream: Stream = ray.get(reference)
    return stream


def _record_name(place: int) -> str:
    return f"place-{place:08d}.json"
