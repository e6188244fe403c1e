"""A whole training that is killed, command and workers, and started again."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.benchmarks.training import SMALL_MODEL, endured, prepared


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_nothing_had_been() -> None:
    """Under ZeRO-3, where weights, gradients and the optimizer are shared out among two workers."""
    corpus: dict[str, Any] = {
        "documents": [{"type": "docstrings", "packages": ["email", "asyncio"]}],
        "tokenizer": {"vocab_size": 1_000, "sample_mb": 1},
        "sequence_length": 64,
        "validation": 0.05,
    }
    with prepared(corpus, model={"config": SMALL_MODEL}) as settings:
        steps, apart = endured(settings, stage=3, kills=1, chance=random.Random(2))
    assert steps > 50  # it was killed after a checkpoint
    assert apart <= 1e-6
