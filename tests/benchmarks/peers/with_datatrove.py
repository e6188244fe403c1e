"""What datatrove does with the same documents; prints its seconds, taken after the imports, and its results as JSON.

Run in the peers' environment: `python with_datatrove.py '{"work": "signatures", …}'`. The stages are put together as in
its own examples, with its defaults. Words are cut at white space; its own choice for English is spaCy's tokenizer,
which is slower, so a comparison of speed errs in datatrove's favour.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.logging import logger
from datatrove.utils.word_tokenizers import WordTokenizer

_SENTENCE = re.compile(r".+?(?:[.!?]+[\"')\]]*(?=\s|$)|$)")


class SpaceTokenizer(WordTokenizer):
    """Words between white space; sentences end with a full stop, exclamation or question mark."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return _SENTENCE.findall(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in _SENTENCE.finditer(text)]


WORDS = SpaceTokenizer()


def signatures(documents: str) -> dict[str, Any]:
    """Seconds in which one process makes the MinHash signatures of all texts."""
    texts = pq.read_table(documents, columns=["text"])["text"].to_pylist()
    step = MinhashDedupSignature("/nowhere", language=WORDS)
    start = time.perf_counter()
    for text in texts:
        step.get_signature(step.get_shingles(text))
    return {"seconds": time.perf_counter() - start, "documents": len(texts)}


def dedup(documents: str, workers: int) -> dict[str, Any]:
    """Seconds from documents on disk to the list of those to go, and their ids (the column `id`)."""
    place = Path(tempfile.mkdtemp())
    reader = ParquetReader(documents, read_metadata=False)
    start = time.perf_counter()
    _minhash(reader, place, workers)
    seconds = time.perf_counter() - start
    excluded = place / "excluded"
    steps = [reader, MinhashDedupFilter(f"{place}/remove", exclusion_writer=JsonlWriter(str(excluded)))]
    _run(steps, place, "filter", workers, workers)
    removed = JsonlReader(str(excluded), glob_pattern="*.jsonl.gz")
    return {"seconds": seconds, "removed": [document.id for document in removed.run()] if excluded.is_dir() else []}


def pipeline(documents: str, workers: int, tokenizer: str, end: str) -> dict[str, Any]:
    """Seconds from parquet to tokens: Unicode mended, filtered by Gopher's and C4's rules, deduplicated, tokenised."""
    place = Path(tempfile.mkdtemp())
    cleaned = str(place / "cleaned")
    start = time.perf_counter()
    _run(
        [
            ParquetReader(documents, read_metadata=False),
            FTFYFormatter(),
            GopherRepetitionFilter(language=WORDS),
            GopherQualityFilter(language=WORDS),
            C4QualityFilter(filter_no_terminal_punct=False, language=WORDS),
            JsonlWriter(cleaned),
        ],
        place,
        "clean",
        workers,
        workers,
    )
    reader = JsonlReader(cleaned)
    _minhash(reader, place, workers)
    tokens = place / "tokens"
    writer = DocumentTokenizer(str(tokens), tokenizer, eos_token=end, seed=1)
    _run([reader, MinhashDedupFilter(f"{place}/remove"), writer], place, "tokenise", workers, workers)
    seconds = time.perf_counter() - start
    counted = (file.read_text().splitlines()[1] for file in tokens.glob("*.metadata"))
    return {"seconds": seconds, "tokens": sum(map(int, counted))}


def _minhash(reader: PipelineStep, place: Path, workers: int) -> None:
    signed, buckets = f"{place}/signatures", f"{place}/buckets"
    signature = MinhashDedupSignature(signed, language=WORDS)
    _run([reader, signature], place, "signatures", workers, workers)
    number = signature.config.num_buckets
    _run([MinhashDedupBuckets(signed, buckets)], place, "buckets", number, workers)
    _run([MinhashDedupCluster(buckets, f"{place}/remove")], place, "cluster", 1, 1)


def _run(steps: list[PipelineStep], place: Path, name: str, tasks: int, workers: int) -> None:
    logs = f"{place}/logs/{name}"
    LocalPipelineExecutor(steps, tasks=tasks, workers=workers, logging_dir=logs, skip_completed=False).run()


if __name__ == "__main__":
    logger.remove()
    asked = json.loads(sys.argv[1])
    work = {"signatures": signatures, "dedup": dedup, "pipeline": pipeline}[asked.pop("work")]
    sys.stdout.write("\n" + json.dumps(work(**asked)) + "\n")
