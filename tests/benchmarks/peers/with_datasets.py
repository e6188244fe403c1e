"""What datasets and tokenizers do with the same documents; prints seconds, taken after the imports, as JSON.

Run in the peers' environment: `python with_datasets.py '{"work": "pack", …}'`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer


def pack(documents: str, tokenizer: str, end: str, sequence_length: int, cpus: int) -> dict[str, Any]:
    """Seconds in which `map` tokenises and groups texts into sequences, as in transformers' `run_clm.py`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process for each CPU
    texts = Dataset.from_parquet(sorted(map(str, Path(documents).glob("*.parquet")))).select_columns("text")
    encoder = Tokenizer.from_file(tokenizer)
    end_id = encoder.token_to_id(end)

    def tokenised(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = encoder.encode_batch(batch["text"], add_special_tokens=False)
        return {"input_ids": [[*one.ids, end_id] for one in encoded]}

    def grouped(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        whole = len(ids) // sequence_length * sequence_length
        return {"input_ids": [ids[at : at + sequence_length] for at in range(0, whole, sequence_length)]}

    start = time.perf_counter()
    lists = texts.map(tokenised, batched=True, num_proc=cpus, remove_columns="text")
    packed = lists.map(grouped, batched=True, num_proc=cpus)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": len(packed) * sequence_length}


def encode(documents: str, tokenizer: str) -> dict[str, Any]:
    """Seconds of `encode_batch` over all texts, a thousand at once, on all CPUs; an end token is counted for each."""
    texts = pq.read_table(documents, columns=["text"])["text"].to_pylist()
    encoder = Tokenizer.from_file(tokenizer)
    tokens = 0
    start = time.perf_counter()
    for at in range(0, len(texts), 1_000):
        tokens += sum(
            len(one.ids) + 1 for one in encoder.encode_batch(texts[at : at + 1_000], add_special_tokens=False)
        )
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


if __name__ == "__main__":
    disable_progress_bars()
    asked = json.loads(sys.argv[1])
    work = {"pack": pack, "encode": encode}[asked.pop("work")]
    sys.stdout.write("\n" + json.dumps(work(**asked)) + "\n")
