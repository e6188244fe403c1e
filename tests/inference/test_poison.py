"""Rows that a worker does not survive cost nothing but themselves, and one job alone writes to an output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raylm import lease
from raylm.errors import OutputError
from raylm.inference import watchdog
from raylm.inference.claim import LOCK, claimed_output
from raylm.inference.quarantine import HUNG, STOPPED_WORKER
from raylm.storage import Manifest, StoragePath
from tests.conftest import REPOSITORY

ROWS = 400


def run_poisoned(source: Path, model: Path, batch: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """A translation in a Ray of its own whose engines choke on some texts."""
    settings = json.dumps({"batch": {"workers": 1, "chunk_rows": 100, "row_limit_s": 5, **batch}})
    with tempfile.TemporaryDirectory(prefix="rp-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        line = [sys.executable, "-m", "tests.inference.poison", str(source), str(model), directory, settings]
        return subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, timeout=600, check=False)


def errors_of(directory: Path) -> int:
    manifest = Manifest.read(StoragePath(str(directory / "in.translated.jsonl.raylm")))
    assert manifest is not None
    return int(manifest.counts["errors"])


def test_every_row_is_answered_whatever_the_others_do(
    tmp_path: Path, model_directory: Path, sentences: list[str]
) -> None:
    poison: dict[int, Any] = {
        10: None, 20: "", 30: 5, 40: "word " * 500, 150: "This text RAISES an error.",
        250: "This text KILLS its worker.", 350: "This text HANGS.",
    }  # fmt: skip
    rows = [{"id": n, "text": poison.get(n, sentences[n])} for n in range(ROWS)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_poisoned(source, model_directory, {})
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "in.translated.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == list(range(ROWS))
    assert {row["id"]: row["error"] for row in found if row["error"]} == {
        10: "null text",
        20: "empty text",
        30: "not a text but a JSON number",
        150: "engine: this text is poison",
        250: STOPPED_WORKER,
        350: HUNG.format(limit_s=5),
    }
    assert all(row["translation"] for row in found if not row["error"])
    assert found[40]["truncated"]
    assert errors_of(tmp_path) == 6


def test_a_job_with_more_errors_than_may_be_fails_and_goes_on_when_they_may(
    tmp_path: Path, model_directory: Path, sentences: list[str]
) -> None:
    rows = [{"text": None if n in (3, 250, 251) else sentences[n]} for n in range(300)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    failed = run_poisoned(source, model_directory, {"max_errors": 2})
    assert failed.returncode == 1 and not (tmp_path / "in.translated.jsonl").exists()
    assert "3 of 300 rows have an error, batch.max_errors allows 2 rows; one of them: " in failed.stderr
    assert re.search(r"in\.jsonl, row (3|250|251): null text\. What is done is kept", failed.stderr)
    again = run_poisoned(source, model_directory, {"max_errors": "0.5%"})
    assert "3 of 300 rows have an error, batch.max_errors allows 0.50% of the rows" in again.stderr
    passed = run_poisoned(source, model_directory, {"max_errors": "1%"})
    assert passed.returncode == 0, passed.stderr
    assert errors_of(tmp_path) == 3


HANGING = """
import sys, re
from raylm.inference import watchdog
from raylm.inference.quarantine import Tries
from raylm.storage import Manifest, StoragePath
place = StoragePath(sys.argv[1])
tries = Tries.note_one(place)
if not tries.is_careful:
    with watchdog.watching(0.5, watchdog.mark_of(place)):
        re.match("(a+)+$", "a" * 60 + "b")
print(tries)
"""


def test_a_worker_that_hangs_ends_itself_and_says_where(tmp_path: Path) -> None:
    place = tmp_path / "tries"
    line = [sys.executable, "-c", HANGING, str(place)]
    start = time.monotonic()
    hung = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert hung.returncode == 1 and time.monotonic() - start < 30
    mark = watchdog.mark_of(StoragePath(str(place)))
    assert "Timeout" in mark.read_text() and 'File "<string>", line 10' in mark.read_text()
    careful = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert "begun=3" in careful.stdout, careful.stderr
    assert not mark.exists()


# -------------------------------------------------------------------------------------- one job alone


def test_two_jobs_never_write_to_one_output(tmp_path: Path) -> None:
    target = StoragePath(str(tmp_path / "out.parquet"))
    with claimed_output(target, "key", overwrite=False) as work:
        other = claimed_output(target, "key", overwrite=True)
        with pytest.raises(OutputError, match=r"out\.parquet: another job writes to it now \(process \d+ on .*since"):
            other.__enter__()
        assert (work / "job.json").is_file()
    with claimed_output(target, "other", overwrite=False):
        pass
    assert [place.name for place, _ in work.list()] == ["job.json"]


def test_a_killed_job_holds_nothing(tmp_path: Path) -> None:
    program = """
import sys, os
from raylm.inference.claim import claimed_output
from raylm.storage import Manifest, StoragePath
with claimed_output(StoragePath(sys.argv[1]), "key", False):
    os.kill(os.getpid(), 9)
"""
    target = tmp_path / "out.parquet"
    subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert (tmp_path / "out.parquet.raylm" / LOCK).is_file()
    with claimed_output(StoragePath(str(target)), "key", overwrite=False):
        pass


def test_on_an_object_store_a_lease_holds_an_output(object_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_RENEWED_EVERY_S", 0.5), ("_DEAD_AFTER_S", 6.0), ("_SETTLED_AFTER_S", 0.2)):
        monkeypatch.setattr(lease, name, seconds)
    target = StoragePath(object_store.format("batch/out.parquet"))
    refused: list[str] = []

    def come_second() -> None:
        try:
            with claimed_output(target, "key", overwrite=True):
                refused.append("")
        except OutputError as error:
            refused.append(str(error))

    with claimed_output(target, "key", overwrite=False) as work:
        second = threading.Thread(target=come_second)
        second.start()
        second.join()
        assert "another job writes to it now" in refused[0]
    assert not (work / LOCK).is_file()
    (work / LOCK).write_json({"id": "dead", "pid": 1, "host": "gone"})
    start = time.monotonic()
    with claimed_output(target, "key", overwrite=False):
        assert time.monotonic() - start >= 6, "it waited for a sign of life"
    with pytest.raises(lease.Taken, match="process 2 on elsewhere"), lease.held(target, "taken by {who}") as check:
        check()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            # While this process slept; again, as its own renewal may have come between.
            target.write_json({"id": "another", "pid": 2, "host": "elsewhere"})
            check()
            time.sleep(0.1)
        pytest.fail("it was not told")
