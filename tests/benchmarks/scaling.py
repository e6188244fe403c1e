"""`python -m tests.benchmarks.scaling`: how work grows, and whether less of it foretells more.

A line through the times of two sizes foretells a third, three times as large: where it does, the README's figures of
what nobody can measure here are read off such lines. What a job costs for each of its items is measured by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from raylm import models
from raylm.inference.chunks import plan_chunks
from raylm.training.batches import PackedOrder
from tests.benchmarks.commands import run_on_real_text
from tests.benchmarks.corpus import prepare, read_from, some_texts, variant, workplace, write_documents
from tests.benchmarks.inference import rows_of, translated, translator
from tests.benchmarks.measure import Goal, Row, single
from tests.benchmarks.training import PAIRS, prepared, run_of, text_corpus, trained

_OFF = 0.25
"""How far the time that is foretold may be from the one that is measured, as a share of it."""
_ROWS = 5_000
_DOCUMENTS_SHARE = 0.2
_CHUNKS = 3_000
_FILES, _ROWS_OF_A_FILE = 10_000, 100_000
"""Of a night with a billion rows."""
_SEQUENCES = 244_000_000
"""Of 1,024 tokens: a terabyte of English."""


def foretold(what: str, sizes: Sequence[float], seconds: Callable[[float], float], unit: str) -> list[Row]:
    """How far a line through the first two sizes is off at the third, and how much of that time is in its slope."""
    small, middle, large = (seconds(size) for size in sizes)
    slope = (middle - small) / (sizes[1] - sizes[0])
    line = small + slope * (sizes[2] - sizes[0])
    return [
        single(
            f"{what}, {sizes[2]:,.0f} {unit}: time foretold from {sizes[0]:,.0f} and {sizes[1]:,.0f}, off by",
            [abs(line / large - 1)],
            "of it",
            Goal("value", "<=", _OFF),
        ),
        single(f"{what}: speed without what starting takes", [1 / slope], f"{unit}/s"),
    ]


def measure_rows(scale: float) -> list[Row]:
    """Batch jobs by their rows."""
    model = translator(scale)

    def seconds(rows: float) -> float:
        with rows_of(PAIRS, "src", round(rows)) as file:
            return float(translated(file, model).seconds)

    seconds(_ROWS * scale)  # converts the model
    return foretold("batch-translate", [_ROWS * scale * times for times in (1, 3, 9)], seconds, "rows")


def measure_documents(scale: float) -> list[Row]:
    """Preparation by its text."""
    texts = some_texts(_DOCUMENTS_SHARE * scale)
    megabytes = sum(len(text) for text in texts) / 1e6

    def seconds(size: float) -> float:
        with workplace() as place:
            for number in range(round(size / megabytes)):
                write_documents(place / "documents", variant(texts, number), first=number * len(texts))
            return prepare(read_from(place / "documents", shard_mb=4 * scale)).seconds

    return foretold("prepare", [megabytes * times for times in (1, 3, 9)], seconds, "MB")


def measure_parameters(scale: float) -> list[Row]:
    """Training by the size of its model: the share of the machine's speed that it uses."""
    steps, warmup = max(round(10 * scale), 6), 3
    rows = []
    for size in ("tiny", "small", "base"):
        with prepared(text_corpus(512), model={"family": "llama", "size": size}) as settings:
            found = trained(
                settings, "pretrain", warmup, steps=steps, global_batch_tokens=2_048, micro_batch_tokens=2_048,
                log_every=1, validate_every=steps, checkpoint_every=steps, validation_batches=1, zero_stage=0, seed=1,
                name="llama",
            )  # fmt: skip
            model = models.build_shapes(models.load_config(str(run_of(settings, "llama") / "model")))
            weights = sum(weight.numel() for weight in model.parameters())
            name = f"pretraining a Llama of {weights / 1e6:.0f} million weights: share of the matmul peak"
            rows.append(single(name, [found["mfu"]], "share"))
    return rows


def measure_items(scale: float) -> list[Row]:
    """What is paid for each chunk of a batch job, and for planning a billion rows and a terabyte of tokens."""
    model = translator(scale)
    with rows_of(PAIRS, "src", round(_CHUNKS * scale)) as file:
        translated(file, model)  # converts the model
        few = translated(file, model).seconds
        many = translated(file, model, chunk_rows=1).seconds
    rows = _FILES * _ROWS_OF_A_FILE
    start = time.perf_counter()
    chunks = sum(1 for _ in plan_chunks([_ROWS_OF_A_FILE] * _FILES, 1_024))
    planned = time.perf_counter() - start
    start = time.perf_counter()
    order = PackedOrder(_SEQUENCES, 2_048, seed=1)
    for step in np.linspace(0, _SEQUENCES / 2_048, 5):
        order.batch(int(step))
    first = (time.perf_counter() - start) / 5
    return [
        single("batch-translate: each chunk of one row", [1e3 * (many - few) / (_CHUNKS * scale)], "ms"),
        single(f"planning {rows:,} rows, {chunks:,} chunks", [planned], "s", Goal("value", "<=", 5)),
        single(f"a batch anywhere in {_SEQUENCES:,} sequences", [1e3 * first], "ms", Goal("value", "<=", 100)),
    ]


PARTS = {
    "rows": measure_rows,
    "documents": measure_documents,
    "parameters": measure_parameters,
    "items": measure_items,
}


if __name__ == "__main__":
    sys.exit(run_on_real_text(__doc__.splitlines()[0], PARTS))
