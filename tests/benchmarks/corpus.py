"""`python -m tests.benchmarks.corpus`: how well and how fast `raylm prepare` works, beside datatrove and datasets.

Everything is measured on real text, through the command line wherever there is one. What is planted in the text, and
whether a removed document was a copy, is decided here with plain sets of words, without raylm.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.commands import CPUS, TEXT, raylm_session, run_on_real_text
from tests.benchmarks.measure import (
    PEERS,
    REPEATS,
    BenchmarkError,
    Goal,
    Row,
    beside,
    interleaved,
    mapped,
    peer,
    run_script,
    single,
    succeeded,
)

_SEED = 7
_SHINGLE_WORDS, _THRESHOLD = 5, 0.8  # raylm's defaults
_END, _SEQUENCE = "</s>", 128
_VERSIONS = dict(line.split("==") for line in (PEERS / "requirements.txt").read_text().split())
_DATATROVE, _DATASETS, _TOKENIZERS = (f"{name} {_VERSIONS[name]}" for name in ("datatrove", "datasets", "tokenizers"))


# ------------------------------------------------------------------------------------- raylm's command


@dataclass(frozen=True, slots=True)
class Prepared:
    root: Path
    """The artifact: `<storage>/tokens/<name>`."""
    manifest: dict[str, Any]
    digest: str
    """Of the names and bytes of all shards and of the tokenizer."""
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """What it took, without the start of Python and Ray."""
        return float(self.manifest["wall_time_s"])

    def step_s(self, *steps: str) -> float:
        return sum(float(self.manifest["metrics"]["seconds"][step]) for step in steps)

    @property
    def tokens(self) -> int:
        return int(self.manifest["metrics"]["tokens"])


def prepare(corpus: dict[str, Any], storage: Path | None = None, cpus: int = CPUS, watched: bool = False) -> Prepared:
    """What the command made; where no storage is given, only what is known of it stays.

    :raises BenchmarkError: it failed.
    """
    if storage is None:
        with workplace() as place:
            return prepare(corpus, place, cpus, watched)
    with raylm_session("prepare", {"storage": str(storage), "corpus": corpus}, cpus) as session:
        finished = session.wait(watched)
    root = storage / "tokens" / "default"
    digest = hashlib.sha256()
    for file in sorted(file for kind in ("documents", "pairs", "tokenizer") for file in (root / kind).rglob("*.*")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return Prepared(root, json.loads((root / "manifest.json").read_text()), digest.hexdigest(), finished.peak_bytes)


def read_from(path: Path | str, **corpus: Any) -> dict[str, Any]:
    """A corpus of the documents of some files."""
    kind = "jsonl" if Path(path).suffix == ".jsonl" else "parquet"
    return {"documents": [{"type": kind, "path": str(path)}], **corpus}


AS_IT_IS = {
    "clean": {"markup": False, "boilerplate": False, "cjk": False},
    "filters": {
        "min_chars": 0,
        "min_letter_ratio": 0,
        "max_digit_ratio": 1,
        "max_uppercase_ratio": 1,
        "max_symbol_ratio": 100,
        "max_bullet_line_ratio": 1,
        "max_ellipsis_line_ratio": 1,
        "max_duplicate_line_ratio": 1,
        "max_duplicate_line_char_ratio": 1,
        "repeated_ngrams": False,
        "max_mean_word_chars": 1_000,
        "max_compression": 1_000,
        "placeholder_text": False,
    },
}
"""Settings under which deduplication alone drops documents."""


@contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="raylm-benchmark-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


# --------------------------------------------------------------------------------------- text to work on


@lru_cache(maxsize=1)
def real_texts() -> list[str]:
    return list(pq.read_table(TEXT, columns=["text"])["text"].to_pylist())


def some_texts(scale: float) -> list[str]:
    """A share of the documents, the same each time."""
    texts = real_texts()
    return random.Random(_SEED).sample(texts, max(int(len(texts) * min(scale, 1)), 40))


def write_documents(directory: Path, texts: Sequence[str], files: int = 2 * CPUS, first: int = 0) -> Path:
    """The directory, after writing the texts with their numbers as `id` into parquet files of like size."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        ids = [str(first + at) for at in range(number, len(texts), files)]
        table = pa.table({"id": ids, "text": list(texts[number::files])})
        pq.write_table(table, directory / f"{first:08d}-{number:03d}.parquet", compression="zstd")
    return directory


Shingles = frozenset[tuple[str, ...]]


def shingle_set(text: str) -> Shingles:
    words = re.findall(r"\w+", text.lower())
    return frozenset(zip(*(words[n:] for n in range(_SHINGLE_WORDS)), strict=False))


def jaccard(first: Shingles, second: Shingles) -> float:
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def plain(text: str) -> str:
    """A text of words and common punctuation on one line, which cleaning leaves as it is."""
    return " ".join(re.sub(r"[^A-Za-z0-9 .,;:?!()'-]", " ", text).split())


@dataclass(frozen=True, slots=True)
class Planted:
    texts: list[str]
    pairs: list[tuple[int, int, float]]
    """An original, its copy, and their Jaccard index."""


def planted(scale: float, seed: int) -> Planted:
    """Real documents, and copies of two thirds of them with so many words edited that Jaccard spreads over 0.5 to 1."""
    chance = random.Random(seed)
    chosen = [text for text in map(plain, real_texts()) if 120 <= text.count(" ") <= 1_500]
    texts = chance.sample(chosen, min(int(3_000 * scale), len(chosen)))
    vocabulary = " ".join(chosen[:500]).split()
    originals = list(enumerate(texts))[: len(texts) * 2 // 3]
    pairs = []
    for number, text in originals:
        copy = edited(text, chance.uniform(0.5, 1), vocabulary, chance)
        pairs.append((number, len(texts), jaccard(shingle_set(text), shingle_set(copy))))
        texts.append(copy)
    return Planted(texts, pairs)


def edited(text: str, target: float, vocabulary: Sequence[str], chance: random.Random) -> str:
    """A copy whose Jaccard index with the text is about the target.

    A replaced word changes n shingles of each side: with e edits far apart among s shingles, J = (s - n e) / (s + n e).
    """
    words = text.split()
    edits = round(len(words) * (1 - target) / (1 + target) / _SHINGLE_WORDS)
    for at in sorted(chance.sample(range(len(words)), max(edits, 1)), reverse=True):
        kind = chance.random()
        if kind < 0.8:
            words[at] = chance.choice(vocabulary)
        elif kind < 0.9:
            del words[at]
        else:
            words.insert(at, chance.choice(vocabulary))
    return " ".join(words)


def from_template(documents: int) -> list[str]:
    """Documents of which 60 % of the words are one boilerplate, around sentences that are in no other."""
    sentences = [s for text in real_texts() for s in re.split(r"(?<=[.?!]) ", plain(text)) if 8 <= s.count(" ") <= 30]
    sentences = list(dict.fromkeys(sentences))
    random.Random(_SEED).shuffle(sentences)
    take = iter(sentences)

    def passage(words: int) -> str:
        chosen: list[str] = []
        while sum(s.count(" ") + 1 for s in chosen) < words:
            chosen.append(next(take))
        return " ".join(" ".join(chosen).split()[:words])

    head, foot = passage(90), passage(60)
    return [f"{head} {passage(100)} {foot}" for _ in range(documents)]


def variant(texts: Sequence[str], seed: int) -> list[str]:
    """Documents of the same make that are no copies: lines in another order, a tenth of the words others'."""
    chance = np.random.default_rng(seed)
    vocabulary = np.array(" ".join(texts[:200]).split(" "), object)
    changed = []
    for text in texts:
        lines = text.split("\n")
        words = np.array("\n".join(lines[n] for n in chance.permutation(len(lines))).split(" "), object)
        at = np.flatnonzero(chance.random(len(words)) < 0.1)
        words[at] = vocabulary[chance.integers(len(vocabulary), size=len(at))]
        changed.append(" ".join(words))
    return changed


# ---------------------------------------------------------------------------------------------- quality


@dataclass(frozen=True, slots=True)
class Found:
    recall: float
    precision: float


def measure_quality(scale: float) -> list[Row]:
    """What share of planted near-copies goes, and what share of what goes has a near-copy that stays."""
    with workplace() as place:
        rounds = [planted(scale, _SEED + number) for number in range(REPEATS)]
        for number, one in enumerate(rounds):
            write_documents(place / str(number), one.texts)

        def ours(number: int) -> Found:
            return judged(rounds[number], removed_by_raylm(place / str(number), rounds[number].texts))

        def theirs(number: int) -> Found:
            return judged(rounds[number], removed_by_datatrove(place / str(number)))

        found = interleaved({"raylm": _numbered(ours), "datatrove": _numbered(theirs)})
        ours_found: list[Found] = succeeded(found["raylm"])
        rows = [
            beside(
                f"near-copies with Jaccard ≥ 0.85 found ({len(rounds[0].texts):,} documents)",
                [one.recall for one in ours_found],
                "share",
                _DATATROVE,
                mapped(found["datatrove"], lambda one: one.recall),
                Goal("value", ">=", 0.98),
            ),
            beside(
                "removed documents that have a kept one with Jaccard ≥ 0.8",
                [one.precision for one in ours_found],
                "share",
                _DATATROVE,
                mapped(found["datatrove"], lambda one: one.precision),
                Goal("value", ">=", 0.99),
            ),
        ]
        return [*rows, template_row(place / "template", from_template(int(2_000 * scale)))]


def template_row(place: Path, texts: list[str]) -> Row:
    """How many of documents that differ go because they share a template."""
    write_documents(place, texts)
    ways = {"raylm": lambda: removed_by_raylm(place, texts), "datatrove": lambda: removed_by_datatrove(place)}
    lost = interleaved(ways, repeats=1)
    return beside(
        f"lost of {len(texts):,} documents that share a template of 60 %",
        [len(removed) / len(texts) for removed in succeeded(lost["raylm"])],
        "share",
        _DATATROVE,
        mapped(lost["datatrove"], lambda removed: len(removed) / len(texts)),
        Goal("value", "<=", 0.01),
        smaller_is_better=True,
    )


def removed_by_datatrove(documents: Path) -> set[int]:
    return set(map(int, datatrove("dedup", documents=str(documents), workers=CPUS)["removed"]))


def removed_by_raylm(documents: Path, texts: Sequence[str]) -> set[int]:
    """The numbers of the texts that `raylm prepare` dropped as copies.

    :raises BenchmarkError: it dropped others, or one that is not there.
    """
    with workplace() as storage:
        made = prepare(read_from(documents, keep_dropped=True, **AS_IT_IS), storage)
        files = sorted((made.root / "dropped").glob("*.parquet"))
        dropped = [row for file in files for row in pq.read_table(file).to_pylist()]
        if made.manifest["counts"]["read"] != len(texts):
            raise BenchmarkError(f"{made.manifest['counts']['read']} rows read of {len(texts)}")
    numbers = defaultdict(list)
    for number, text in enumerate(texts):
        numbers[" ".join(text.split())].append(number)
    removed = set()
    for row in dropped:
        at = numbers[" ".join(row["source"].split())]
        if row["reason"] not in {"duplicate", "near_duplicate"} or not at:
            raise BenchmarkError(f"dropped as {row['reason']}: {row['source'][:80]!r}")
        removed.add(at.pop())
    return removed


def judged(given: Planted, removed: set[int]) -> Found:
    """Recall of the planted copies that are surely alike, precision of all that was removed."""
    sure = [(original, copy) for original, copy, index in given.pairs if index >= 0.85]
    recall = statistics.fmean(bool(removed & {original, copy}) for original, copy in sure)
    sets = [shingle_set(text) for text in given.texts]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, shingles in enumerate(sets):
        if number not in removed:
            for shingle in shingles:
                holders[shingle].append(number)
    right = 0
    for number in removed:
        common = Counter(other for shingle in sets[number] for other in holders.get(shingle, ()))
        best = max((jaccard(sets[number], sets[other]) for other, _ in common.most_common(5)), default=0.0)
        right += best >= _THRESHOLD - 1e-9
    return Found(recall, right / len(removed) if removed else 1.0)


def _numbered(work: Callable[[int], Found]) -> Callable[[], Found]:
    """`work` of 0 at the first call, of 1 at the next."""
    numbers = iter(range(REPEATS))
    return lambda: work(next(numbers))


# ------------------------------------------------------------------------------------------------ speed


def measure_signatures(scale: float) -> list[Row]:
    """MinHash signatures of one process."""
    with workplace() as place:
        documents = str(write_documents(place / "documents", some_texts(scale)))
        rounds = interleaved(
            {
                "raylm": lambda: run_script(sys.executable, "with_raylm.py", documents=documents),
                "datatrove": lambda: datatrove("signatures", documents=documents),
            }
        )
    return [
        beside(
            "MinHash signatures, one process",
            [_documents_per_s(result) for result in succeeded(rounds["raylm"])],
            "documents/s",
            _DATATROVE,
            mapped(rounds["datatrove"], _documents_per_s),
            Goal("ratio", ">=", 5),
        )
    ]


def _documents_per_s(result: dict[str, Any]) -> float:
    return float(result["documents"] / result["seconds"])


def _tokens_per_s(result: dict[str, Any]) -> float:
    return float(result["tokens"] / result["seconds"])


def measure_pipeline(scale: float) -> list[Row]:
    """The whole of `raylm prepare`, its deduplication, and its tokenisation, each beside who does the same."""
    with workplace() as place:
        texts = some_texts(scale)
        documents = str(write_documents(place / "documents", texts))
        # A tokenizer for all, since the peers learn none; and the documents that reach deduplication, for all.
        learned = prepare(read_from(documents), place / "learned")
        tokenizer = learned.root / "tokenizer"
        cleaned = str(write_documents(place / "cleaned", texts_to_compare(learned)))
        corpus = read_from(documents, tokenizer={"start_from": str(tokenizer)}, sequence_length=_SEQUENCE)
        encoder = {"tokenizer": str(tokenizer / "tokenizer.json")}
        packing = {"end": _END, "sequence_length": _SEQUENCE, "cpus": CPUS, **encoder}
        done = interleaved(
            {
                "raylm": lambda: prepare(corpus),
                "pipeline": lambda: datatrove("pipeline", documents=documents, workers=CPUS, end=_END, **encoder),
                "dedup": lambda: datatrove("dedup", documents=cleaned, workers=CPUS),
                "datasets": lambda: peer("with_datasets.py", work="pack", documents=cleaned, **packing),
                "tokenizers": lambda: peer("with_datasets.py", work="encode", documents=cleaned, **encoder),
            }
        )
    ours: list[Prepared] = succeeded(done["raylm"])
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokens_per_s = [made.tokens / made.step_s("tokenize", "pack") for made in ours]
    return [
        beside(
            f"prepare: parquet to token shards, {megabytes:.0f} MB",
            [megabytes / made.seconds for made in ours],
            "MB/s",
            f"{_DATATROVE}, Gopher and C4 filters, MinHash, tokens",
            mapped(done["pipeline"], lambda result: megabytes / result["seconds"]),
        ),
        beside(
            "near-duplicates, from documents on disk to those to go",
            [made.step_s("dedup") for made in ours],
            "s",
            _DATATROVE,
            mapped(done["dedup"], lambda result: float(result["seconds"])),
            Goal("ratio", ">=", 3),
            smaller_is_better=True,
        ),
        beside(
            "tokenise and pack, beside map and group",
            tokens_per_s,
            "tokens/s",
            _DATASETS,
            mapped(done["datasets"], _tokens_per_s),
            Goal("ratio", ">=", 1.2),
        ),
        beside(
            "tokenise and pack, beside encoding alone",
            tokens_per_s,
            "tokens/s",
            f"{_TOKENIZERS}, encode_batch",
            mapped(done["tokenizers"], _tokens_per_s),
            Goal("ratio", ">=", 0.9),
        ),
    ]


def texts_to_compare(made: Prepared) -> list[str]:
    """The documents that reached deduplication: cleaned, filtered, without exact copies."""
    texts: list[str] = []
    for file in sorted(made.root.glob("_work/merge-*/part-*.arrow")):
        with pa.OSFile(str(file)) as stream:
            texts += pa.ipc.open_file(stream).read_all()["source"].to_pylist()
    if not texts:
        raise BenchmarkError(f"no documents below {made.root}/_work")
    return texts


def datatrove(work: str, **asked: Any) -> dict[str, Any]:
    return peer("with_datatrove.py", work=work, **asked)


def measure_growth(scale: float) -> list[Row]:
    """Time and memory for ten times the rows."""
    texts, times = some_texts(0.3 * scale), 10
    # Small enough that one time fills the buffers, the tokenizer's sample and a shard for each CPU, as ten times do.
    full = {"shard_mb": 5 * scale, "tokenizer": {"sample_mb": 8 * scale}}
    with workplace() as place:
        for number in range(times):
            changed = variant(texts, _SEED + number)
            for directory in ["one", "ten"] if number == 0 else ["ten"]:
                write_documents(place / directory, changed, first=number * len(texts))
        one, ten = (read_from(place / name, **full) for name in ("one", "ten"))
        done = interleaved({"1": lambda: prepare(one, watched=True), "10": lambda: prepare(ten, watched=True)})
    pairs = list(zip(succeeded(done["1"]), succeeded(done["10"]), strict=True))
    kept = pairs[0][1].manifest["counts"]["kept"] / pairs[0][0].manifest["counts"]["kept"]
    if not 0.95 * times < kept < 1.05 * times:
        raise BenchmarkError(f"{kept:.2f} times the rows were kept, not {times}: the work is not comparable")
    megabytes = sum(len(text) for text in texts) / 1e6
    return [
        single(
            f"prepare: time for {times} × {megabytes:.0f} MB over the time for one",
            [large.seconds / small.seconds for small, large in pairs],
            "×",
            Goal("value", "<=", 11),
        ),
        single(
            f"prepare: largest process for {times} × {megabytes:.0f} MB over that for one",
            [large.peak_bytes / small.peak_bytes for small, large in pairs],
            "×",
            Goal("value", "<=", 1.3),
        ),
        single("prepare: largest process", [large.peak_bytes / 1e6 for _, large in pairs], "MB"),
    ]


# -------------------------------------------------------------------------------------------- endurance


def measure_endurance(scale: float) -> list[Row]:
    """Whether the shards are the same bytes after being killed, on other CPUs, from other files."""
    texts = some_texts(0.15 * scale)
    shuffled = random.Random(_SEED).sample(texts, len(texts))
    small = {"shard_mb": 0.5, "tokenizer": {"vocab_size": 1_000, "sample_mb": 1}}
    with workplace() as place:
        corpus = read_from(write_documents(place / "documents", texts), **small)
        made = prepare(corpus)
        others = {
            "one CPU": prepare(corpus, cpus=1),
            "other order": prepare(read_from(write_documents(place / "order", texts[::-1]), **small)),
            "other cut": prepare(read_from(write_documents(place / "cut", shuffled, files=7), **small)),
        }
        chance = random.Random(_SEED)
        kills = max(int(10 * min(scale, 1)), 2)
        equal = sum(killed_and_resumed(corpus, made.seconds, chance).digest == made.digest for _ in range(kills))
    differing = [name for name, other in others.items() if other.digest != made.digest]
    return [
        single(
            f"same bytes after kill -9 at {kills} random points, of {kills}",
            [equal],
            "runs",
            Goal("value", ">=", kills),
        ),
        single(
            f"same bytes with {', '.join(others)}" + (f" (not with {', '.join(differing)})" if differing else ""),
            [len(others) - len(differing)],
            f"of {len(others)}",
            Goal("value", ">=", len(others)),
        ),
    ]


def killed_and_resumed(corpus: dict[str, Any], usual_s: float, chance: random.Random) -> Prepared:
    """What a second start made, after all processes of the first were killed somewhere in its work."""
    after_s = chance.uniform(0, usual_s)
    while True:
        with workplace() as storage:
            with raylm_session("prepare", {"storage": str(storage), "corpus": corpus}) as session:
                while session.running and not any(storage.glob("tokens/*/_work")):
                    time.sleep(0.02)
                time.sleep(after_s)
                if not session.running:
                    session.wait()  # it failed, or it was faster than usual
                session.kill()  # returns when no process of the session is left
            if not any(storage.glob("tokens/*/manifest.json")):
                return prepare(corpus, storage)
        after_s *= 0.8


def measure_bad_row(scale: float) -> list[Row]:
    """What one line that is no JSON costs."""
    paragraphs = (line for text in real_texts() for line in text.split("\n") if len(line) >= 200)
    rows = list(dict.fromkeys(paragraphs))[: int(10_000 * scale)]
    lines = [json.dumps({"text": text}) + "\n" for text in rows]
    bad = len(lines) * 2 // 3
    small = {"tokenizer": {"vocab_size": 1_000, "sample_mb": 1}}
    with workplace() as place:
        whole, without = place / "whole.jsonl", place / "without.jsonl"
        without.write_text("".join(lines[:bad] + lines[bad + 1 :]))
        lines[bad] = lines[bad][: len(lines[bad]) // 2] + "\n"
        whole.write_text("".join(lines))
        made = prepare(read_from(whole, **small), place / "storage")
        rejected = made.root / "rejected" / "rows.jsonl"
        recorded = [json.loads(line) for line in rejected.read_text().splitlines()] if rejected.is_file() else []
        expected = prepare(read_from(without, **small))
    begins = len("".join(lines[:bad]).encode())
    is_it = [(row["file"], row["position"]) for row in recorded] == [(str(whole), begins)]
    return [
        single(
            f"of {len(lines):,} rows with one bad one, that one is rejected and recorded, no other",
            [int(is_it and made.manifest["counts"]["rejected"] == 1)],
            "of 1",
            Goal("value", ">=", 1),
        ),
        single(
            "all other rows give the same bytes as without it",
            [int(made.digest == expected.digest)],
            "of 1",
            Goal("value", ">=", 1),
        ),
    ]


PARTS = {
    "quality": measure_quality,
    "signatures": measure_signatures,
    "pipeline": measure_pipeline,
    "growth": measure_growth,
    "endurance": measure_endurance,
    "bad-row": measure_bad_row,
}


if __name__ == "__main__":
    sys.exit(run_on_real_text(__doc__.splitlines()[0], PARTS))
