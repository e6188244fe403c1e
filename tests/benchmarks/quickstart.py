"""`python -m tests.benchmarks.quickstart`: what a person waits for: the whole road, the first rows, the first step.

Each command has a Ray of its own, which it starts; how much of the time that alone takes is told beside it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.commands import CPUS, raylm_session, run_on_real_text
from tests.benchmarks.inference import rows_of, translated, translator
from tests.benchmarks.measure import REPEATS, Goal, Row, single
from tests.benchmarks.training import PAIRS, prepared, text_corpus

_ROWS = 100
_SHORT = 0.01
"""The share of its steps that the model is trained for: enough to be there."""
_RAY = """
import time
start = time.perf_counter()
import ray
imported = time.perf_counter() - start
ray.init(address="local", num_cpus={cpus}, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(imported, time.perf_counter() - start)
ray.shutdown()
"""


def _timed(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - start


def measure_imports(_: float) -> list[Row]:
    """What every command costs before it does anything."""
    return [
        single("import raylm", [_timed("-c", "import raylm") for _ in range(REPEATS)], "s"),
        single(
            "raylm --help", [_timed("-m", "raylm", "--help") for _ in range(REPEATS)], "s", Goal("value", "<=", 0.5)
        ),
    ]


def measure_first_rows(_: float) -> list[Row]:
    """A batch job so small that all of it is starting; its model has been converted before."""
    model = translator(_SHORT)
    with rows_of(PAIRS, "src", _ROWS) as file:
        translated(file, model)
        seconds = [translated(file, model).seconds for _ in range(REPEATS)]
    starts = [_ray_start() for _ in range(REPEATS)]
    share = [start / whole for start, whole in zip(starts, seconds, strict=True)]
    return [
        single(f"batch-translate of {_ROWS} rows", seconds, "s", Goal("value", "<=", 20)),
        single(f"batch-translate of {_ROWS} rows: importing and starting Ray", share, "share"),
    ]


def _ray_start() -> float:
    found = subprocess.run(
        [sys.executable, "-c", _RAY.format(cpus=CPUS)], check=True, capture_output=True, text=True
    ).stdout.split()
    return float(found[1])


def measure_first_step(_: float) -> list[Row]:
    """From the command to the first optimizer step, which is in a checkpoint by then."""
    training = {"steps": 1, "checkpoint_every": 1, "validation_batches": 1, "zero_stage": 0}
    seconds = []
    with prepared(text_corpus(128)) as settings:
        for number in range(REPEATS):
            name = f"first-{number}"
            done = Path(settings["storage"], "runs", name, "checkpoints", "step-00000001", "manifest.json")
            with raylm_session("pretrain", {**settings, "pretrain": training | {"name": name}}) as session:
                start = time.perf_counter()
                while session.running and not done.is_file():
                    time.sleep(0.05)
                seconds.append(time.perf_counter() - start)
                session.wait()
    return [single("from `raylm pretrain` to the first step", seconds, "s", Goal("value", "<=", 30))]


def measure_road(_: float) -> list[Row]:
    """`raylm quickstart`, from nothing to translated and summarised files."""
    with tempfile.TemporaryDirectory(prefix="raylm-quickstart-") as place:
        start = time.perf_counter()
        with raylm_session(("quickstart", "--out", place), None, as_json=False) as session:
            session.wait()
        return [single("raylm quickstart", [(time.perf_counter() - start) / 60], "minutes")]


PARTS = {
    "imports": measure_imports,
    "first-rows": measure_first_rows,
    "first-step": measure_first_step,
    "road": measure_road,
}


if __name__ == "__main__":
    sys.exit(run_on_real_text(__doc__.splitlines()[0], PARTS))
