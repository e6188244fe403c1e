"""`python -m tests.benchmarks.inference`: how fast batch jobs and the service decode, what is lost, how much is held.

A Marian of two million parameters, fine-tuned here for some minutes on real pairs, translates real sentences. The
engines are compared on one thread by tokens per CPU second; whole jobs by wall-clock on all CPUs.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.commands import CPUS, DATA, raylm_session, run_on_real_text
from tests.benchmarks.measure import (
    BenchmarkError,
    Goal,
    Row,
    beside,
    interleaved,
    mapped,
    run_script,
    single,
    succeeded,
)
from tests.benchmarks.training import PAIRS, raylm, translation_corpus

UI = DATA / "translate.en-de.ui.train.parquet"
_STEPS = 4_000
_ROWS = 5_000
_SLOW_ROWS = 500
"""For ways that take long; rates are compared."""
_KILLS = 20
_RESUMED_ROWS = 40_000
_CLIENTS = 32
_REQUESTS = 2_000
_START_S = 120
_MODELS: dict[float, Path] = {}
"""By the share of `_STEPS` that they were trained for."""
_DIRECTORY = tempfile.TemporaryDirectory(prefix="raylm-benchmark-models-")


def translator(scale: float) -> str:
    """The directory of a finished model, which has learned to translate a little; one that learned longer will do."""
    trained = next((place for share, place in _MODELS.items() if share >= scale), None)
    if trained is None:
        place = Path(_DIRECTORY.name) / f"{scale:g}"
        settings = {"storage": str(place), "corpus": translation_corpus(), "finetune": {
            "start": "scratch", "steps": max(round(_STEPS * scale), 50), "global_batch_tokens": 1_200,
            "micro_batch_tokens": 1_200, "learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 200,
            "max_source_tokens": 128, "max_target_tokens": 128, "validation_batches": 1, "validate_every": 1_000,
            "checkpoint_every": 1_000, "zero_stage": 0, "seed": 1,
        }}  # fmt: skip
        for command in ("prepare", "finetune", "export"):
            raylm(command, settings)
        trained = _MODELS[scale] = place / "models" / "default"
    return str(trained)


@contextmanager
def rows_of(source: Path, column: str, rows: int, evenly: bool = True) -> Iterator[Path]:
    """A parquet file with texts of a corpus, from its beginning again where there are too few.

    :param evenly: take every so-manieth, as texts are alike where they stand together; else the first ones.
    """
    texts = [text for text in pq.read_table(source, columns=[column])[column].to_pylist() if text and text.strip()]
    if evenly:
        texts = texts[:: max(len(texts) // rows, 1)]
    with tempfile.TemporaryDirectory(prefix="raylm-benchmark-rows-") as place:
        file = Path(place) / "rows.parquet"
        chosen = list(itertools.islice(itertools.cycle(texts), rows))
        pq.write_table(pa.table({"id": range(rows), "text": chosen}), file, row_group_size=rows)
        yield file


def translated(file: Path, model: str, **batch: Any) -> Any:
    """A finished job of the command line, watched; what an earlier one has left is deleted, as it would do nothing."""
    output = file.with_suffix(".translated.parquet")
    output.unlink(missing_ok=True)
    shutil.rmtree(output.with_name(f"{output.name}.raylm"), ignore_errors=True)
    settings = {"batch": batch} if batch else {}
    arguments = ("batch-translate", str(file), "--model", model)
    with raylm_session(arguments, settings) as session:
        return session.wait(watched=True)


# --------------------------------------------------------------------------------------------- engines


def measure_engines(scale: float) -> list[Row]:
    """Source tokens per CPU second, beside transformers and beside CTranslate2 as it comes.

    Those are the same for all; what an 8-bit model writes may be longer than what an exact one does.
    """
    model = translator(scale)
    rows: list[Row] = []
    with (
        rows_of(PAIRS, "src", max(round(_ROWS * scale), 500)) as file,
        rows_of(PAIRS, "src", max(round(_SLOW_ROWS * scale), 100)) as fewer,
        rows_of(UI, "src", _ROWS, evenly=False) as interface,
    ):

        def way(name: str, place: Path, beam_size: int = 1, batch_size: int = 8) -> dict[str, Any]:
            return run_script(sys.executable, "with_engines.py", model=model, rows=str(place), way=name,
                              beam_size=beam_size, batch_size=batch_size)  # fmt: skip

        ways = {
            "raylm": partial(way, "raylm", file),
            "raylm, beam 4": partial(way, "raylm", file, beam_size=4),
            "iterable": partial(way, "iterable", file),
            "sorted": partial(way, "generate", fewer),
            "sorted, beam 4": partial(way, "generate", fewer, beam_size=4),
            "single": partial(way, "generate", fewer, batch_size=1),
            "raylm, ui": partial(way, "raylm", interface),
            "iterable, ui": partial(way, "iterable", interface),
        }
        found = interleaved(ways)
        for what, ours, key, peer, measure, goal in (
            ("greedy", "raylm", "sorted", "generate, sorted batches of 8", "tokens_per_s", 4.0),
            ("beam 4", "raylm, beam 4", "sorted, beam 4", "generate, sorted batches of 8", "tokens_per_s", 2.5),
            ("greedy", "raylm", "single", "generate, one by one", "tokens_per_s", 10.0),
            ("greedy", "raylm", "iterable", "translate_iterable", "tokens_per_s", 0.9),
            ("greedy, texts of an interface", "raylm, ui", "iterable, ui", "translate_iterable", "rows_per_s", 1.0),
        ):
            unit = measure.replace("_per_s", "/CPU s")
            values = [float(run[measure]) for run in succeeded(found[ours])]
            peers = mapped(found[key], lambda run, name=measure: float(run[name]))
            rows.append(beside(f"decoding, {what}", values, unit, peer, peers, Goal("ratio", ">=", goal)))
    return rows


def measure_naive(scale: float) -> list[Row]:
    """Whole jobs beside Ray Data as an introduction uses it; and what both lose to one bad row."""
    model = translator(scale)
    with rows_of(PAIRS, "src", max(round(_ROWS * scale), 500)) as file:
        count = pq.read_metadata(file).num_rows

        def naive(place: Path, output: Path) -> dict[str, Any]:
            return run_script(sys.executable, "naive_ray_data.py", model=model, rows=str(place), output=str(output),
                              cpus=CPUS, batch_size=64)  # fmt: skip

        numbers = itertools.count()
        found = interleaved({
            "raylm": lambda: count / translated(file, model).seconds,
            "naive": lambda: count / float(naive(file, file.parent / f"naive-{next(numbers)}")["seconds"]),
        })  # fmt: skip
        values = succeeded(found["raylm"])
        what = f"batch-translate, {count:,} rows on {CPUS} CPUs"
        peer = "read_parquet().map_batches().write_parquet()"
        rows = [beside(what, values, "rows/s", peer, mapped(found["naive"], float), Goal("ratio", ">=", 1))]
        poisoned = file.parent / "poisoned.parquet"
        table = pq.read_table(file)
        texts = table["text"].to_pylist()
        texts[count // 2] = None
        pq.write_table(table.set_column(1, "text", pa.array(texts)), poisoned)
        translated(poisoned, model)
        output = file.parent / "naive-poisoned"
        lost = count - _rows_in(poisoned.with_suffix(".translated.parquet"))
        theirs = count - _rows_in(output, lambda: naive(poisoned, output))
        rows.append(beside("rows lost to one null text", [lost], "rows", peer, [theirs], smaller_is_better=True))
        return rows


def _rows_in(place: Path, make: Any = None) -> int:
    """The rows of a parquet file or of a directory of such; of what a failing command leaves behind."""
    if make is not None:
        with suppress(BenchmarkError):
            make()
    files = [place] if place.is_file() else list(place.rglob("*.parquet"))
    return sum(pq.read_metadata(file).num_rows for file in files)


# ---------------------------------------------------------------------------------------------- faults


def measure_kills(scale: float) -> list[Row]:
    """A job that is killed again and again, with all its processes, at any point."""
    model, kills = translator(scale), max(round(_KILLS * scale), 1)
    chance = random.Random(6)
    with rows_of(PAIRS, "src", 20_000) as file:
        target = file.with_name("rows.translated.parquet")
        arguments = ("batch-translate", str(file), "--model", model)
        settings = {"batch": {"chunk_rows": 64}}
        parts = target.with_name(f"{target.name}.raylm") / "parts"
        killed = 0
        while killed < kills and not target.exists():
            before = len(list(parts.glob("*/part-*.arrow")))
            with raylm_session(arguments, settings) as session:
                if chance.random() < 0.2:
                    time.sleep(chance.uniform(0.5, 8))
                else:
                    while session.running and len(list(parts.glob("*/part-*.arrow"))) <= before:
                        time.sleep(0.02)
                    time.sleep(chance.uniform(0, 0.5))
                killed += session.running
                session.kill()
        with raylm_session(arguments, settings) as session:
            session.wait()
        found = pq.read_table(target)
        wrong = sum(one != other for one, other in zip(found["id"].to_pylist(), range(20_000), strict=False))
        wrong += abs(found.num_rows - 20_000) + found["translation"].null_count
    return [single(f"rows lost, doubled or misplaced after {killed} kill -9", [wrong], "rows", Goal("value", "<=", 0))]


def measure_resume(scale: float) -> list[Row]:
    """A job that is killed when three quarters are done, of a file with a single row group, and goes on."""
    model, count = translator(scale), max(round(_RESUMED_ROWS * scale), 4_000)
    settings = {"batch": {"chunk_rows": 128}}
    with rows_of(PAIRS, "src", count) as file:
        target = file.with_name("rows.translated.parquet")
        arguments = ("batch-translate", str(file), "--model", model)
        parts = target.with_name(f"{target.name}.raylm") / "parts"
        chunks = -(-count // 128)
        with raylm_session(arguments, settings) as session:
            while session.running and len(list(parts.glob("*/part-*.arrow"))) < 0.75 * chunks:
                time.sleep(0.02)
            session.kill()
        done = len(list(parts.glob("*/part-*.arrow")))
        with raylm_session(arguments, settings) as session:
            resumed = session.wait()
        metrics = json.loads(resumed.stdout)["metrics"]
        with raylm_session(arguments, settings) as session:
            again = session.wait()
    with (
        rows_of(PAIRS, "src", (chunks - done) * 128) as rest,
        raylm_session(("batch-translate", str(rest), "--model", model), settings) as session,
    ):
        alone = session.wait()
    what = f"a job killed at {done} of {chunks} chunks: going on, beside a job of the rows that were left"
    return [
        single(what, [resumed.seconds / alone.seconds], "times", Goal("value", "<=", 1.2)),
        single("chunks done again", [done - metrics["chunks_reused"]], "chunks", Goal("value", "<=", 0)),
        single("the same command once more", [again.seconds], "s", Goal("value", "<=", 5)),
    ]


def measure_memory(scale: float) -> list[Row]:
    """What the largest process holds, from few rows to many."""
    model = translator(scale)
    peaks: Mapping[int, list[float]] = {rows: [] for rows in (10_000, max(round(200_000 * scale), 20_000))}
    for rows, found in peaks.items():
        with rows_of(PAIRS, "src", rows) as file:
            found.append(translated(file, model).peak_bytes / 1e6)
    few, many = (statistics.median(found) for found in peaks.values())
    what = f"memory of {max(peaks):,} rows beside that of {min(peaks):,}"
    return [single(what, [many / few], "times", Goal("value", "<=", 1.1))]


# --------------------------------------------------------------------------------------------- service


@contextmanager
def served(model: str, **serve: Any) -> Iterator[str]:
    """The URL of a service that is ready."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with raylm_session(("serve", "--model", model), {"serve": {"port": port} | serve}, as_json=False) as session:
        end = time.monotonic() + _START_S
        while not _answers(url):
            if time.monotonic() > end or not session.running:
                raise BenchmarkError(f"no service at {url} after {_START_S} s")
            time.sleep(0.5)
        yield url


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def measure_serve(scale: float) -> list[Row]:
    """People who ask at the same time, with and without their requests being decoded together, and too many of them."""
    model, count = translator(scale), max(round(_REQUESTS * scale), 200)

    def asked(clients: int = _CLIENTS, **serve: Any) -> dict[str, Any]:
        with served(model, **serve) as url, rows_of(PAIRS, "src", count) as file:
            ask = partial(run_script, sys.executable, "clients.py", url=url, rows=str(file))
            ask(limit=_CLIENTS, clients=_CLIENTS)
            return ask(limit=count, clients=clients)

    found = interleaved({"together": asked, "alone": partial(asked, max_batch_tokens=1)})
    runs = succeeded(found["together"])
    crowd = asked(4 * _CLIENTS, max_queued_requests=_CLIENTS)
    strange = sum(number for status, number in crowd["statuses"].items() if status not in ("200", "429"))
    answered, refused = crowd["statuses"].get("200", 0), crowd["statuses"].get("429", 0)
    overload = f"{4 * _CLIENTS} clients at a queue of {_CLIENTS}, {answered} × 200, {refused} × 429: other answers"
    return [
        beside(
            f"requests of {_CLIENTS} clients",
            [run["requests_per_s"] for run in runs],
            "requests/s",
            "each decoded alone",
            mapped(found["alone"], lambda run: float(run["requests_per_s"])),
            Goal("ratio", ">=", 2),
        ),
        single(f"the slowest of a hundred requests, {_CLIENTS} clients", [1_000 * run["p99_s"] for run in runs], "ms"),
        single(overload, [strange], "requests", Goal("value", "<=", 0)),
    ]


PARTS = {
    "engines": measure_engines,
    "naive": measure_naive,
    "kills": measure_kills,
    "resume": measure_resume,
    "memory": measure_memory,
    "serve": measure_serve,
}


if __name__ == "__main__":
    sys.exit(run_on_real_text(__doc__.splitlines()[0], PARTS))
