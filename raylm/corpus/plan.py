"""What a preparation is to do, and what each of its steps depends on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from raylm.corpus.sources import STREAM_UNIT_BYTES, Unit, list_files, plan_units
from raylm.errors import InputError
from raylm.models import located
from raylm.settings import CorpusSettings, Settings
from raylm.storage import StoragePath, fingerprint

WORK = "_work"
"""Below the artifact: what the steps wrote, so that a second start, or a changed setting, redoes only what it must."""
_FORMAT = 5
"""Raised when the same input and settings give other bytes than before."""
_LARGE_BYTES = 4e9
"""Of a corpus whose parts hold what `shard_mb` says; those of a larger one hold more: of a terabyte 16 times that."""
_CLEAN = {"clean", "filters", "pair_filters", "pii", "keep_dropped"}
_MERGE = {"validation", "shard_mb", "decontaminate"}
_MINHASH = ("fuzzy", "shingle_words", "bands", "rows_per_band")
_DEDUP = ("measure", "threshold", "keep")
_PARAGRAPHS = ("paragraphs", "min_paragraph_chars")


def part_bytes(total: float, shard_mb: float) -> float:
    """How much of a corpus is sorted at once: what a shard holds, and in a large corpus more.

    Every part of the corpus is read from each of the runs that it was first written in. While both grow with the root
    of its size, as units do (`sources`), the number of these reads grows with the size alone, and not with its square.
    """
    return shard_mb * 1e6 * max(math.sqrt(total / _LARGE_BYTES), 1)


@dataclass(frozen=True)
class Plan:
    """Travels with the work to every worker."""

    corpus: CorpusSettings
    start_from: str | None
    """A model whose tokenizer is taken."""
    start_hash: str | None
    """Of that tokenizer's file, where it is one, which may change in its place."""
    tokens: str
    """The artifact's directory."""
    units: tuple[Unit, ...]
    evaluation: tuple[dict[str, Any], ...] = ()
    """Name, size and time of each file to keep out of training."""

    @property
    def root(self) -> StoragePath:
        return StoragePath(self.tokens)

    @property
    def key(self) -> str:
        """Of all that the shards depend on."""
        return self.keys["pack"]

    def place(self, step: str) -> StoragePath:
        """The directory of a step's results."""
        return self.root / WORK / (step if step == "clean" else f"{step}-{self.keys[step][:16]}")

    @cached_property
    def keys(self) -> dict[str, str]:
        """For each step, a hash of its settings, its inputs, and the steps before it."""
        corpus = self.corpus.model_dump(mode="json")
        dedup = corpus["dedup"]
        keys: dict[str, str] = {"clean": self._clean_key}
        sources = [unit.source for unit in self.units]
        merge = [self.unit_names, sources, dedup["keep"], {name: corpus[name] for name in _MERGE}, self.evaluation]
        if dedup["pairs"] == "target":
            merge.append("held out by source")  # rows are dropped that earlier versions kept
        keys["merge"] = fingerprint(merge)
        keys["minhash"] = fingerprint([keys["merge"], [dedup[name] for name in _MINHASH]])
        keys["dedup"] = fingerprint([keys["minhash"], [dedup[name] for name in _DEDUP]])
        keys["paragraphs"] = fingerprint([keys["dedup"], [dedup[name] for name in _PARAGRAPHS]])
        keys["tokenizer"] = fingerprint(
            [keys["paragraphs"], corpus["tokenizer"], self.start_from, self.start_hash, self.task_languages,
             bool(self.corpus.documents)]
        )  # fmt: skip
        keys["tokenize"] = fingerprint([keys["tokenizer"], "tokenize"])
        mixture = [[source.get("weight"), source.get("epochs")] for source in corpus["documents"]]
        keys["pack"] = fingerprint([keys["tokenize"], corpus["sequence_length"], corpus["pack"], mixture])
        return keys

    @property
    def _clean_key(self) -> str:
        corpus = self.corpus.model_dump(mode="json")
        return fingerprint([_FORMAT, {name: corpus[name] for name in _CLEAN}, corpus["dedup"]["pairs"]])

    @cached_property
    def unit_names(self) -> list[str]:
        """What each unit's cleaned rows are called: a hash of what they depend on."""
        names, key = [], self._clean_key
        for unit in self.units:
            content = [key, unit.kind, unit.identity, unit.documents, unit.pairs]
            if unit.kind == "cldr":  # whose rows are split as they are made
                content.append(self.corpus.validation)
            names.append(f"unit-{fingerprint(content)}")
        return names

    @property
    def task_languages(self) -> list[str]:
        """The target languages that get a task token."""
        wanted = {getattr(source, "to", None) for source in self.corpus.pairs}
        return sorted({*self.corpus.tokenizer.languages, *(language for language in wanted if language)})


def make_plan(settings: Settings) -> Plan:
    """The plan of the settings' corpus; files are looked at, not read.

    Where pretraining streams its documents, the corpus is all pairs and a sample of the documents.

    :raises InputError: there is no source, or one is missing or damaged.
    """
    if settings.pretrain.stream:
        units = plan_units(settings.corpus, STREAM_UNIT_BYTES)
        return _plan(settings, _sampled(units, settings.corpus))
    return _plan(settings, plan_units(settings.corpus))


def plan_stream(settings: Settings) -> tuple[Plan, Plan]:
    """Where pretraining streams its documents: the plan of the sample to prepare, and that of the documents to stream.

    :raises InputError: as `make_plan`, or there are no documents.
    """
    units = plan_units(settings.corpus, STREAM_UNIT_BYTES)
    documents = tuple(unit for unit in units if unit.documents)
    if not documents:
        raise InputError("corpus.documents: pretrain.stream reads documents, and none are named here")
    sample = _plan(settings, _sampled(units, settings.corpus))
    return sample, replace(sample, units=documents)


def _plan(settings: Settings, units: list[Unit]) -> Plan:
    corpus = settings.corpus
    if not units:
        raise InputError("corpus: no sources; name some under corpus.documents or corpus.pairs")
    evaluation = [
        file.identity
        for number, source in enumerate(corpus.decontaminate.against)
        for file in list_files(source, f"corpus.decontaminate.against[{number}]")
    ]
    named = corpus.tokenizer.start_from or settings.model.start_from
    start_from = located(named) if named else None
    tokenizer = StoragePath(start_from) / "tokenizer.json" if start_from else None
    return Plan(
        corpus=corpus,
        start_from=start_from,
        start_hash=tokenizer.content_hash() if tokenizer and tokenizer.is_file() else None,
        tokens=(StoragePath(settings.storage) / "tokens" / corpus.name).address,
        units=tuple(units),
        evaluation=tuple(evaluation),
    )


def _sampled(units: list[Unit], corpus: CorpusSettings) -> list[Unit]:
    """All units with pairs, and of each source of documents as many as its part of the tokenizer's sample takes."""
    wanted = corpus.tokenizer.sample_mb * 1e6 / max(len(corpus.documents), 1)
    sizes: Counter[int] = Counter()
    chosen = {unit.order for unit in units if unit.pairs}
    for unit in sorted(units, key=lambda unit: fingerprint(unit.identity)):
        if not unit.pairs and sizes[unit.source] < wanted:
            chosen.add(unit.order)
            sizes[unit.source] += unit.bytes
    return [unit for unit in units if unit.order in chosen]
