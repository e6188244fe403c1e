"""`python -m tests.benchmarks.training`: how fast `raylm pretrain` and `raylm finetune` train, beside bare loops.

Everything is trained on real text. raylm runs through its command line, in groups of workers that Ray Train makes; its
speed is what it logs itself, without the steps of its first windows.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.commands import DATA, raylm_session, run_on_real_text
from tests.benchmarks.measure import Goal, Row, beside, interleaved, run_script, succeeded

PAIRS = DATA / "translate.en-de.docs.train.parquet"
_WARMUP = 20
_STEPS = 120


@contextmanager
def prepared(corpus: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of a storage with that corpus in it."""
    with tempfile.TemporaryDirectory(prefix="raylm-benchmark-") as place:
        settings = {"storage": place, "corpus": dict(corpus)}
        with raylm_session("prepare", settings) as session:
            session.wait()
        yield settings


def trained(settings: Mapping[str, Any], section: str, training: Mapping[str, Any]) -> dict[str, float]:
    """What a run logged: the median speed of its windows after the first ones, and its losses."""
    with raylm_session(section, {**settings, section: dict(training)}) as session:
        session.wait()
    run = Path(settings["storage"]) / "runs" / training["name"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_s"] for row in rows if "loss" in row and row["step"] > _WARMUP]
    return {"tokens_per_s": statistics.median(speeds)}


def measure_overhead(scale: float) -> list[Row]:
    """What the loop costs: raylm beside PyTorch on one worker and beside DeepSpeed's engine on two."""
    steps = max(round(_STEPS * scale), 2 * _WARMUP)
    training = {
        "steps": steps, "start": "scratch", "global_batch_tokens": 4_096, "micro_batch_tokens": 4_096, "log_every": 10,
        "validate_every": steps, "checkpoint_every": steps, "validation_batches": 1, "zero_stage": 1, "seed": 1,
    }  # fmt: skip
    corpus = {"pairs": [{"type": "parquet", "path": str(PAIRS), "source": "src", "target": "tgt", "to": "de"}]}
    rows: list[Row] = []
    with prepared(corpus) as settings:
        names = iter(range(1_000))

        def raylm(workers: int) -> dict[str, float]:
            return trained(settings, "finetune", training | {"workers": workers, "name": f"run-{next(names)}"})

        raylm(1)  # leaves the config and the tokenizer that the bare loops take
        model = Path(settings["storage"]) / "runs" / "run-0" / "model"
        asked = {
            "section": "finetune", "settings": training, "warmup": _WARMUP, "model": str(model),
            "tokens": str(Path(settings["storage"]) / "tokens" / "default"),
        }  # fmt: skip
        for workers, loop, peer, bound in ((1, "torch", "PyTorch", 0.95), (2, "deepspeed", "DeepSpeed", 0.97)):
            bare = partial(_bare, asked | {"workers": workers, "loop": loop})
            found = interleaved({"raylm": partial(raylm, workers), "bare": bare})
            rows.append(
                beside(
                    f"fine-tuning on {workers} worker{'s' * (workers > 1)}, padded tokens",
                    [result["tokens_per_s"] for result in succeeded(found["raylm"])],
                    "tokens/s",
                    f"a bare loop of {peer}",
                    [result["tokens_per_s"] for result in succeeded(found["bare"])],
                    Goal("ratio", ">=", bound),
                )
            )
    return rows


def _bare(asked: dict[str, Any]) -> dict[str, Any]:
    return run_script(sys.executable, "bare_loop.py", **asked)


PARTS = {"overhead": measure_overhead}


if __name__ == "__main__":
    sys.exit(run_on_real_text(__doc__.splitlines()[0], PARTS))
