"""What one process of raylm does with the same documents; prints its seconds, taken after the imports, as JSON.

Run in raylm's own environment: `python with_raylm.py '{"documents": …}'`.
"""

from __future__ import annotations

import json
import sys
import time

import pyarrow.parquet as pq

from raylm.corpus.dedup import signatures
from raylm.corpus.shingles import shingles
from raylm.settings import DedupSettings

if __name__ == "__main__":
    rules = DedupSettings()
    texts = pq.read_table(json.loads(sys.argv[1])["documents"], columns=["text"])["text"].to_pylist()
    signatures(*shingles(texts[:1], rules.shingle_words), 1)  # tables and libraries are loaded at the first use
    start = time.perf_counter()
    for at in range(0, len(texts), 256):
        hashes, offsets = shingles(texts[at : at + 256], rules.shingle_words)
        signatures(hashes, offsets, rules.bands * rules.rows_per_band)
    seconds = time.perf_counter() - start
    sys.stdout.write("\n" + json.dumps({"seconds": seconds, "documents": len(texts)}) + "\n")
