"""A batch job answers every row, in order, once; says what it did; and a second run does nothing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylm.errors import ArtifactError, InputError, OutputError, RaylmError, SettingsError
from raylm.inference import results, workers
from raylm.inference.answers import Output
from raylm.inference.batch import run_batch
from raylm.inference.chunks import plan_job
from raylm.inference.engines import load_engine
from raylm.inference.io import list_inputs
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Prompt, prompt_for
from raylm.inference.quarantine import STOPPED_WORKER, Tries, answer_one_by_one
from raylm.inference.workers import ChunkWorker
from raylm.settings import Settings
from raylm.storage import Manifest, StoragePath
from raylm.tasks import SUMMARIZE, TRANSLATE
from tests.inference.conftest import wait_for_a_part

ONE_WORKER = Settings.model_validate({"batch": {"workers": 1}})


def table_of(sentences: list[str], rows: int) -> pa.Table:
    texts: list[str | None] = list(sentences[:rows])
    texts[3:7] = [None, "", "  \n", "word " * 200]
    return pa.table({"id": pa.array(range(rows), pa.int32()), "text": texts, "label": ["l"] * rows})


def never() -> None:
    raise AssertionError("Ray is not needed for this")


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory, model_directory: Path, sentences: list[str], ray_cluster: None
) -> tuple[Path, Manifest]:
    """A finished translation of a Parquet file of 300 rows by two workers, and its manifest."""
    folder = tmp_path_factory.mktemp("batch")
    pq.write_table(table_of(sentences, 300), folder / "input.parquet", row_group_size=64)
    settings = Settings.model_validate({"batch": {"workers": 2}})
    manifest = run_batch(
        settings, TRANSLATE, str(folder / "input.parquet"), model=str(model_directory), columns={"text": "text"}
    )
    return folder, manifest


def test_rows_columns_and_order_are_kept(done: tuple[Path, Manifest], model_directory: Path) -> None:
    folder, manifest = done
    before, after = pq.read_table(folder / "input.parquet"), pq.read_table(folder / "input.translated.parquet")
    assert after.column_names == [*before.column_names, "translation", "error", "truncated", "quality"]
    assert after.select(before.column_names).equals(before)
    rows = after.to_pylist()
    assert [row["error"] for row in rows[3:6]] == ["null text", "empty text", "empty text"]
    assert rows[6]["truncated"] and rows[6]["translation"] and rows[6]["error"] is None
    assert [row["translation"] is None for row in rows] == [n in (3, 4, 5) for n in range(300)]
    assert manifest.counts["rows"] == 300 and manifest.counts["answered"] == 297
    assert manifest.counts["error_reasons"] == {"empty text": 2, "null text": 1}
    assert manifest.counts["truncated"] == sum(row["truncated"] for row in rows)


def test_each_row_has_the_answer_to_its_own_text(done: tuple[Path, Manifest], model_directory: Path) -> None:
    rows = pq.read_table(done[0] / "input.translated.parquet").to_pylist()
    single = [row for row in rows if row["translation"] and "." not in row["text"][:-1] and len(row["text"]) < 30]
    engine = load_engine(ModelInfo.load(str(model_directory)), Settings().batch.decode)
    outputs = engine.decode([(row["text"],) for row in single], Prompt("translate", token=">>de<<"))
    agreed = sum((o.text or "").strip() == row["translation"] for o, row in zip(outputs, single, strict=True))
    # int8 rounds by batch: a few answers may differ, misplaced ones nearly all would.
    assert len(single) > 20 and agreed >= 0.8 * len(single)


def test_the_manifest_says_what_was_done(done: tuple[Path, Manifest]) -> None:
    folder, manifest = done
    work = folder / "input.translated.parquet.raylm"
    assert [file.name for file in work.iterdir()] == ["manifest.json"], "parts are gone"
    assert Manifest.read(StoragePath(str(work))) == manifest
    output = folder / "input.translated.parquet"
    assert manifest.outputs == [{"path": str(output), "rows": 300, "bytes": output.stat().st_size}]
    assert manifest.stage == "batch-translate" and manifest.settings["columns"] == {"text": "text"}
    assert manifest.inputs["files"][0]["rows"] == 300
    assert manifest.metrics["chunks"] == 8 and manifest.metrics["output_tokens"] > 300
    assert len(manifest.samples) == 3 and all(sample["output"] for sample in manifest.samples)


def test_the_same_job_again_does_nothing(done: tuple[Path, Manifest], model_directory: Path) -> None:
    folder, manifest = done
    stamp = (folder / "input.translated.parquet").stat().st_mtime_ns
    again = run_batch(
        ONE_WORKER,
        TRANSLATE,
        str(folder / "input.parquet"),
        model=str(model_directory),
        columns={"text": "text"},
        to=None,
        connect=never,
    )
    assert again == manifest
    assert (folder / "input.translated.parquet").stat().st_mtime_ns == stamp


def test_another_job_does_not_replace_the_output(done: tuple[Path, Manifest], model_directory: Path) -> None:
    folder, _ = done
    other = Settings.model_validate({"batch": {"decode": {"max_output_tokens": 5}}})
    with pytest.raises(OutputError, match="exists already, made by another model, input or setting; use --overwrite"):
        run_batch(
            other,
            TRANSLATE,
            str(folder / "input.parquet"),
            model=str(model_directory),
            columns={"text": "text"},
            connect=never,
        )


@pytest.mark.usefixtures("ray_cluster")
def test_overwriting_and_limits(tmp_path: Path, model_directory: Path, sentences: list[str]) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in sentences[:90]))
    output = tmp_path / "out.csv"
    output.write_text("mine")
    asked: dict[str, Any] = {"model": str(model_directory), "output": str(output), "limit": 40}
    with pytest.raises(OutputError, match=r"out\.csv: exists already, made elsewhere"):
        run_batch(ONE_WORKER, SUMMARIZE, str(tmp_path / "in.jsonl"), connect=never, **asked)
    assert output.read_text() == "mine"
    manifest = run_batch(ONE_WORKER, SUMMARIZE, str(tmp_path / "in.jsonl"), overwrite=True, **asked)
    with output.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["text"] for row in rows] == sentences[:40] and all(row["summary"] for row in rows)
    assert list(rows[0]) == ["text", "n", "summary", "error", "truncated", "quality"]
    assert manifest.counts["rows"] == 40
    output.write_text("mine again")
    with pytest.raises(OutputError, match="exists already, changed since it was made"):
        run_batch(ONE_WORKER, SUMMARIZE, str(tmp_path / "in.jsonl"), connect=never, **asked)


@pytest.mark.usefixtures("ray_cluster")
def test_a_directory_gives_a_directory(tmp_path: Path, model_directory: Path, sentences: list[str]) -> None:
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    pq.write_table(pa.table({"text": sentences[:50]}), source / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), source / "b.parquet")
    rows = [{"text": sentences[50]}, {"text": 5}, {}]
    (source / "deep" / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (source / "d.csv").write_text("id,text\n1,Find\n2,Find Bar\n")
    manifest = run_batch(ONE_WORKER, TRANSLATE, str(source), model=str(model_directory))
    target = tmp_path / "in.translated"
    assert pq.read_table(target / "a.parquet")["text"].to_pylist() == sentences[:50]
    assert pq.read_table(target / "b.parquet").num_rows == 0
    lines = [json.loads(line) for line in (target / "deep" / "c.jsonl").read_text().splitlines()]
    assert [line["error"] for line in lines] == [None, "not a text but a JSON number", "null text"]
    assert (target / "d.csv").read_text().splitlines()[1].startswith("1,Find,")
    assert [Path(output["path"]).name for output in manifest.outputs] == ["a.parquet", "b.parquet", "d.csv", "c.jsonl"]
    # A glob over the same files, through another output, gives the same answers.
    run_batch(ONE_WORKER, TRANSLATE, f"{source}/*.parquet", model=str(model_directory), output=str(tmp_path / "g"))
    assert pq.read_table(tmp_path / "g" / "a.parquet").column_names == [
        "text",
        "translation",
        "error",
        "truncated",
        "quality",
    ]
    assert sorted(file.name for file in (tmp_path / "g").iterdir()) == ["a.parquet", "b.parquet"]


@pytest.mark.usefixtures("ray_cluster")
def test_what_an_earlier_job_left_goes_and_nothing_elsewhere(
    tmp_path: Path, model_directory: Path, sentences: list[str]
) -> None:
    source, target, copy = tmp_path / "in", tmp_path / "out", tmp_path / "copy"
    source.mkdir()
    for name in ("a", "b", "c"):
        pq.write_table(pa.table({"text": sentences[:3]}), source / f"{name}.parquet")

    def run(output: Path) -> list[str]:
        run_batch(ONE_WORKER, TRANSLATE, str(source), model=str(model_directory), output=str(output), overwrite=True)
        return sorted(file.name for file in output.iterdir())

    assert run(target) == ["a.parquet", "b.parquet", "c.parquet"]
    for name in ("", ".raylm"):
        shutil.copytree(f"{target}{name}", f"{copy}{name}")
    (source / "c.parquet").unlink()
    assert run(copy) == ["a.parquet", "b.parquet", "c.parquet"]  # it knows nothing of the copied one
    assert sorted(file.name for file in target.iterdir()) == ["a.parquet", "b.parquet", "c.parquet"]
    assert run(target) == ["a.parquet", "b.parquet"]
    (source / "b.parquet").unlink()
    assert run(target) == ["a.parquet"]


def test_what_an_earlier_job_left_on_a_store_is_found_with_its_password() -> None:
    options = "?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1"
    target = StoragePath(f"s3://someone:secret@bucket/out{options}")
    old = [{"path": str(target / name)} for name in ("a.parquet", "deep/b 1.parquet")]
    elsewhere = {"path": f"s3://bucket/other/c.parquet{options}"}
    found = results.outdated([*old, elsewhere], [target / "a.parquet"], target)
    assert found == [target / "deep/b 1.parquet"] and "secret" in found[0].uri


@pytest.mark.usefixtures("ray_cluster")
def test_a_large_directory_is_put_together_by_all_machines(
    tmp_path: Path, model_directory: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(3):
        texts = [*sentences[20 * number : 20 * (number + 1)], None]
        pq.write_table(pa.table({"text": texts}), source / f"{number}.parquet")
    alone = run_batch(ONE_WORKER, TRANSLATE, str(source), model=str(model_directory), output=str(tmp_path / "alone"))
    monkeypatch.setattr(results, "_SHARED_ROWS", 1)
    shared = run_batch(ONE_WORKER, TRANSLATE, str(source), model=str(model_directory), output=str(tmp_path / "shared"))
    for number in range(3):
        one, other = (pq.read_table(tmp_path / place / f"{number}.parquet") for place in ("alone", "shared"))
        assert one.equals(other) and one.num_rows == 21
    assert shared.counts == alone.counts and shared.counts["errors"] == 3
    assert shared.metrics["output_tokens"] == alone.metrics["output_tokens"] > 0
    (tmp_path / "taken" / "1.parquet" / "deep").mkdir(parents=True)  # a directory where a file should be
    with pytest.raises(OutputError, match=r"taken/1\.parquet") as told:
        run_batch(ONE_WORKER, TRANSLATE, str(source), model=str(model_directory), output=str(tmp_path / "taken"),
                  overwrite=True)  # fmt: skip
    assert "Traceback" not in str(told.value)


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_does_not_answer_again_what_is_published(
    tmp_path: Path, model_directory: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data hands a dead worker's whole block to another one, done chunks among them."""
    pq.write_table(pa.table({"text": [*sentences[:99], None]}), tmp_path / "t.parquet")
    info = ModelInfo.load(str(model_directory))
    files = list_inputs(str(tmp_path / "t.parquet"))
    work = StoragePath(str(tmp_path / "work")).mkdir()
    prompt = prompt_for(info, TRANSLATE, None, None, None, None)
    job = plan_job(files, prompt, {}, None, ONE_WORKER.batch, work, "key")
    decode = ONE_WORKER.batch.decode
    first = ChunkWorker(job, str(model_directory), decode, "cpu")
    counts = [first({"chunk": [number]}) for number in range(len(job.chunks))]
    written = [job.part(chunk).info().mtime_ns for chunk in job.chunks]

    def no_engine(*_: Any) -> None:
        raise AssertionError("nothing is left to be answered")

    monkeypatch.setattr(workers, "load_engine", no_engine)
    second = ChunkWorker(job, str(model_directory), decode, "cpu")
    assert [second({"chunk": [number]}) for number in range(len(job.chunks))] == counts
    assert [job.part(chunk).info().mtime_ns for chunk in job.chunks] == written
    assert sum(count["errors"][0] for count in counts) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_workers_wait_for_a_busy_cluster(tmp_path: Path, model_directory: Path, sentences: list[str]) -> None:
    """Three of four CPUs are taken, more workers are asked for than can start: the one that starts does it all."""
    import ray

    @ray.remote(num_cpus=3)
    class Busy:
        def ready(self) -> bool:
            return True

    busy = Busy.remote()
    ray.get(busy.ready.remote())
    try:
        pq.write_table(pa.table({"text": sentences[:100]}), tmp_path / "t.parquet")
        settings = Settings.model_validate({"batch": {"workers": "auto"}})
        manifest = run_batch(settings, TRANSLATE, str(tmp_path / "t.parquet"), model=str(model_directory))
        assert manifest.counts["answered"] == 100
    finally:
        ray.kill(busy)


def test_a_dry_run_foretells_and_writes_nothing(tmp_path: Path, model_directory: Path, sentences: list[str]) -> None:
    pq.write_table(pa.table({"text": sentences[:400]}), tmp_path / "t.parquet")
    manifest = run_batch(
        ONE_WORKER, TRANSLATE, str(tmp_path / "t.parquet"), model=str(model_directory), dry_run=True, connect=never
    )
    assert manifest.counts["rows"] == 400 and manifest.metrics["sample_rows"] == 32
    characters = sum(map(len, sentences[:400]))
    assert characters / 3 < manifest.counts["characters"] < characters * 3
    assert manifest.metrics["predicted_s"] > 0 and manifest.counts["output_tokens"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["t.parquet"]
    with pytest.raises(SettingsError, match="a column is named for txt, but the prompt reads text"):
        run_batch(ONE_WORKER, TRANSLATE, str(tmp_path / "t.parquet"), model=str(model_directory),
                  columns={"txt": "text"}, dry_run=True)  # fmt: skip


@pytest.mark.usefixtures("ray_cluster")
def test_answers_are_checked_before_they_are_published(
    tmp_path: Path, model_directory: Path, sentences: list[str]
) -> None:
    """The model copies: beside its sources it scores well, beside other sentences it does not."""
    texts = [text for text in sentences if len(text) < 40][:120]
    pq.write_table(pa.table({"text": texts, "same": texts, "other": texts[::-1]}), tmp_path / "t.parquet")
    source, model = str(tmp_path / "t.parquet"), str(model_directory)

    def run(references: str, min_chrf: float, overwrite: bool = False) -> Manifest:
        check = {"references": references, "min_chrf": min_chrf, "rows": 100}
        settings = Settings.model_validate({"batch": {"workers": 1, "check": check}})
        asked: dict[str, Any] = {"model": model, "columns": {"text": "text"}, "overwrite": overwrite}
        return run_batch(settings, TRANSLATE, source, **asked)

    with pytest.raises(InputError, match=r"t\.parquet: batch\.check\.references: there is no column 'absent'"):
        run("absent", 40)
    with pytest.raises(RaylmError, match=r"chrF of 100 answers beside 'other' is .*, min_chrf is 60; nothing is publ"):
        run("other", 60)
    assert not (tmp_path / "t.translated.parquet").exists()
    manifest = run("same", 60)
    assert run("same", 50) == manifest, "it holds this as well"
    with pytest.raises(RaylmError, match=r"min_chrf is 100; the output was published before$"):
        run("same", 100)
    with pytest.raises(RaylmError, match=r"was done without this batch\.check; do it again with --overwrite"):
        run("other", 10)
    assert manifest.metrics["checked_chrf"] > 60 and manifest.metrics["checked_rows"] == 100
    assert manifest.metrics["chunks_reused"] == manifest.metrics["chunks"], "what was answered is not asked again"
    assert run("same", 50, overwrite=True) == manifest, "what holds is not done again"
    again = run("other", 0, overwrite=True)
    assert again.metrics["checked_chrf"] < 60 and again.metrics["chunks_reused"] == 0
    assert run("other", 0) == again


# --------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("asked", "error", "reason"),
    [
        ({"input": "absent.parquet"}, InputError, "there is no such file"),
        ({"input": "*.txt"}, InputError, "no file matches"),
        ({"columns": {"text": "absent"}}, InputError, "there is no column 'absent'"),
        ({"input": "clash.parquet"}, InputError, "has a column 'translation' already"),
        ({"input": "corrupt.parquet"}, InputError, "corrupt or cut off"),
        ({"model": "absent"}, ArtifactError, "there is no such directory"),
        ({"to": "zz"}, ArtifactError, "cannot translate to 'zz'"),
        ({"output": "out.xlsx"}, OutputError, "its suffix should be one of"),
        ({"output": "t.parquet"}, OutputError, "is the input itself"),
        ({"output": "t.parquet/below/out.parquet"}, OutputError, "cannot make the directory"),
        ({"output": "/proc/none/out.parquet"}, OutputError, "cannot make the directory /proc/none"),
        ({"input": ".", "output": "out.parquet"}, OutputError, "give a directory, this names a file"),
        ({"input": ".", "output": "./below"}, OutputError, "lies in its own input"),
        ({"input": "*.parquet"}, OutputError, "name a directory for the results with --output"),
    ],
)
def test_faults_are_told_before_ray_is_needed(
    tmp_path: Path,
    model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any],
    error: type[RaylmError],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"text": ["a"]}), "t.parquet")
    pq.write_table(pa.table({"text": ["a"], "translation": [1]}), "clash.parquet")
    Path("corrupt.parquet").write_bytes(b"PAR1 and no more")
    before = sorted(tmp_path.iterdir())
    arguments: dict[str, Any] = {"input": "t.parquet", "model": str(model_directory)} | asked
    with pytest.raises(error, match=reason) as failure:
        run_batch(ONE_WORKER, TRANSLATE, arguments.pop("input"), connect=never, **arguments)
    assert len(str(failure.value).splitlines()) == 1
    left = [file for file in sorted(tmp_path.iterdir()) if file not in before]
    assert all(file.name.endswith(".raylm") for file in left)


@pytest.mark.usefixtures("ray_cluster")
def test_a_fault_of_a_worker_is_told_as_plainly(tmp_path: Path, model_directory: Path, sentences: list[str]) -> None:
    """The device lacks the compute type: that is found out in the actor."""
    pq.write_table(pa.table({"text": sentences[:40]}), tmp_path / "t.parquet")
    settings = Settings.model_validate({"batch": {"workers": 1, "decode": {"compute_type": "float16"}}})
    with pytest.raises(ArtifactError, match="cannot compute in 'float16'"):
        run_batch(settings, TRANSLATE, str(tmp_path / "t.parquet"), model=str(model_directory))
    assert not (tmp_path / "t.translated.parquet").exists()


# --------------------------------------------------------------------------------------------- deaths

DRIVER = """
import sys, ray
from raylm.inference.batch import run_batch
from raylm.settings import Settings
from raylm.tasks import TRANSLATE
source, model, temp = sys.argv[1:]
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=temp,
         object_store_memory=1 << 27)
settings = Settings.model_validate({"batch": {"workers": 1, "chunk_rows": 32}})
run_batch(settings, TRANSLATE, source, model=model)
"""


def test_a_killed_job_goes_on_where_it_stopped(
    tmp_path: Path, model_directory: Path, sentences: list[str], ray_cluster: None
) -> None:
    """The whole process group of a job, Ray and all, is killed after some chunks; the next run does the others."""
    import tempfile

    source = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [f"{text} {n}" for n, text in enumerate(sentences[:3_000])]}), source)
    parts = tmp_path / "t.translated.parquet.raylm" / "parts"
    with tempfile.TemporaryDirectory(prefix="rk-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(source), str(model_directory), temp],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 300
            while len(list(parts.glob("*/part-*.arrow"))) < 3:
                assert driver.poll() is None and time.monotonic() < deadline, "the job ended before it was killed"
                time.sleep(0.005)
        finally:
            kill_session(driver)
    published = {file.name: file.read_bytes() for file in parts.glob("*/part-*.arrow")}
    assert not (tmp_path / "t.translated.parquet").exists()

    settings = Settings.model_validate({"batch": {"workers": 1, "chunk_rows": 32}})
    resumed = run_batch(settings, TRANSLATE, str(source), model=str(model_directory))
    assert resumed.metrics["chunks_reused"] == len(published) >= 3
    undisturbed = run_batch(
        settings, TRANSLATE, str(source), model=str(model_directory), output=str(tmp_path / "again.parquet")
    )
    assert undisturbed.metrics["chunks_reused"] == 0
    again = (tmp_path / "again.parquet").read_bytes()
    assert (tmp_path / "t.translated.parquet").read_bytes() == again
    assert pq.read_table(tmp_path / "again.parquet").num_rows == 3_000
    assert resumed.counts == undisturbed.counts


def kill_session(driver: subprocess.Popen[bytes]) -> None:
    """Kill every process of the driver's session: it and the Ray that it started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
                if session == driver.pid:
                    os.kill(int(entry.name), signal.SIGKILL)
            except (OSError, IndexError):
                continue
    driver.wait()


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_is_replaced(tmp_path: Path, model_directory: Path, sentences: list[str]) -> None:
    import threading

    source = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [f"{text} {n}" for n, text in enumerate(sentences[:3_000])]}), source)
    killed: list[int] = []

    def kill_one() -> None:
        wait_for_a_part(tmp_path / "t.translated.parquet")
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and b"ray::MapWorker" in (entry / "cmdline").read_bytes():
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    if is_below(parent, os.getpid()):
                        os.kill(int(entry.name), signal.SIGKILL)
                        killed.append(int(entry.name))
            except OSError:
                continue

    killer = threading.Thread(target=kill_one)
    killer.start()
    settings = Settings.model_validate({"batch": {"workers": 1, "chunk_rows": 32}})
    manifest = run_batch(settings, TRANSLATE, str(source), model=str(model_directory))
    killer.join()
    assert killed, "a worker was killed"
    assert manifest.counts["answered"] == 3_000
    assert pq.read_table(tmp_path / "t.translated.parquet")["translation"].null_count == 0


def is_below(pid: int, ancestor: int) -> bool:
    """Whether a process descends from another."""
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    return False


DEADLY = """
import os, sys
from functools import partial
from raylm.inference.answers import Output, answer_rows
from raylm.inference.prompts import Prompt
from raylm.inference.quarantine import Tries, answer_one_by_one
from raylm.storage import StoragePath

class Engine:
    def decode(self, rows, prompt):
        if ("poison",) in rows:
            os.kill(os.getpid(), 9)
        return [Output(text.upper()) for (text,) in rows]
    def room(self, prompt):
        return 100

place = StoragePath(sys.argv[1])
tries = Tries.note_one(place)
rows, prompt = [("a",), ("poison",), ("b",), (None,)], Prompt("summarize")
answer = partial(answer_rows, Engine())
if tries.is_careful:
    print([(o.text, o.error) for o in answer_one_by_one(answer, rows, prompt, tries, place, 60)])
else:
    answer(rows, prompt)
"""


def test_a_row_that_kills_its_worker_becomes_an_error(tmp_path: Path) -> None:
    results = [
        subprocess.run(
            [sys.executable, "-c", DEADLY, str(tmp_path / "tries")], capture_output=True, text=True, check=False
        )
        for _ in range(5)
    ]
    assert [result.returncode for result in results] == [-9, -9, -9, -9, 0], results[-1].stderr
    expected = [("A", None), (None, STOPPED_WORKER), ("B", None), (None, "null text")]
    assert results[-1].stdout.strip() == str(expected)


def test_workers_that_die_before_any_row_end_the_job(tmp_path: Path) -> None:
    place = StoragePath(str(tmp_path / "tries"))
    for _ in range(6):
        Tries.note_one(place)
    with pytest.raises(RaylmError, match="6 workers died before they came to a row"):
        Tries.note_one(place)


@pytest.mark.usefixtures("ray_cluster")
def test_a_finished_job_is_held_to_what_is_asked_for_now(
    tmp_path: Path, model_directory: Path, sentences: list[str]
) -> None:
    pq.write_table(pa.table({"text": [*sentences[:38], None, None]}), tmp_path / "t.parquet")

    def run(**batch: Any) -> Manifest:
        settings = Settings.model_validate({"batch": {"workers": 1, **batch}})
        return run_batch(settings, TRANSLATE, str(tmp_path / "t.parquet"), model=str(model_directory))

    assert run().counts["errors"] == 2
    assert run(max_errors=2).counts["errors"] == run(max_errors="5%").counts["errors"] == 2
    with pytest.raises(RaylmError, match="2 of 40 rows have an error, batch.max_errors allows 1 rows"):
        run(max_errors=1)


@pytest.mark.usefixtures("ray_cluster")
def test_half_an_emoji_is_the_error_of_its_row(tmp_path: Path, model_directory: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("Open it.", "Hello there. \ud83d", "Close it.")]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    manifest = run_batch(ONE_WORKER, TRANSLATE, str(tmp_path / "t.jsonl"), model=str(model_directory))
    rows = [json.loads(line) for line in (tmp_path / "t.translated.jsonl").read_text().splitlines()]
    assert [row["error"] for row in rows] == [None, "text is not valid Unicode", None]
    assert manifest.counts["errors"] == 1


def test_a_column_for_nothing_is_refused(tmp_path: Path, model_directory: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(RaylmError, match="a column is named for body, but the prompt reads text"):
        run_batch(ONE_WORKER, TRANSLATE, str(tmp_path / "t.parquet"), model=str(model_directory),
                  columns={"body": "text"}, connect=never)  # fmt: skip


def test_careful_answers_are_the_same(tmp_path: Path) -> None:
    def answer(rows: Any, prompt: Prompt) -> list[Output]:
        return [Output(text.upper() if text else None) for (text,) in rows]

    place = StoragePath(str(tmp_path / "tries"))
    outputs = answer_one_by_one(answer, [("a. B",), (None,)], Prompt("translate"), Tries(), place, limit_s=60)
    assert [(output.text, output.error) for output in outputs] == [("A. B", None), (None, None)]


@pytest.mark.usefixtures("ray_cluster")
def test_a_pool_of_workers_grows_with_the_work(tmp_path: Path, model_directory: Path, sentences: list[str]) -> None:
    source = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [f"{text} {n}" for n, text in enumerate(sentences[:3_000])]}), source)
    settings = Settings.model_validate({"batch": {"workers": [1, 3], "chunk_rows": 64}})
    manifest = run_batch(settings, TRANSLATE, str(source), model=str(model_directory))
    assert manifest.counts["answered"] == 3_000
    assert manifest.settings["workers"] == (1, 3)


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_says_what_it_costs(
    tmp_path: Path, model_directory: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": sentences[:200]}), source)
    said: list[str] = []
    monkeypatch.setattr("raylm.progress.Progress.update", lambda _, done, detail: said.append(detail))
    settings = Settings.model_validate({"batch": {"workers": 1}, "prices": {"other": 7_200}})
    manifest = run_batch(settings, TRANSLATE, str(source), model=str(model_directory))
    assert manifest.metrics["cost"] == pytest.approx(2 * manifest.wall_time_s, rel=0.01)
    assert float(said[-1].split()[-3]) == pytest.approx(manifest.metrics["cost"], rel=0.9)
    assert said[-1].endswith("predicted cost")
    unknown = Settings.model_validate({"batch": {"workers": 1}, "prices": {"gpu": 1}})
    other = str(tmp_path / "other.parquet")
    assert "cost" not in run_batch(unknown, TRANSLATE, str(source), model=str(model_directory), output=other).metrics
