"""The frame of the benchmarks: rows and goals, rounds, environments of peers, sessions of processes."""

from __future__ import annotations

import json
import os
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from tests.benchmarks import measure
from tests.benchmarks.measure import (
    BenchmarkError,
    Goal,
    Row,
    Session,
    beside,
    interleaved,
    peer_python,
    run_benchmark,
    run_script,
    single,
)


def test_ratio_is_the_median_of_the_rounds() -> None:
    row = beside("speed", [10, 30, 20], "MB/s", "peer", [5, 10, 20], Goal("ratio", ">=", 2))
    assert (row.value, row.peer_value, row.ratio, row.spread, row.holds) == (20, 10, 2, 1, True)


def test_less_time_is_a_larger_ratio() -> None:
    row = beside("time", [2.0], "s", "peer", [8.0], Goal("ratio", ">=", 5), smaller_is_better=True)
    assert (row.ratio, row.holds) == (4, False)


def test_nothing_divides_by_zero() -> None:
    row = beside("lost", [0.0], "share", "peer", [0.9], Goal("value", "<=", 0.01), smaller_is_better=True)
    assert (row.ratio, row.holds) == (None, True)


def test_a_goal_is_met_at_its_bound() -> None:
    assert single("growth", [11.0], "×", Goal("value", "<=", 11)).holds
    assert not single("growth", [11.1], "×", Goal("value", "<=", 11)).holds
    assert not Goal("ratio", ">=", 1).holds(None)


def test_a_peer_that_cannot_run_is_a_row_that_does_not_hold() -> None:
    row = beside("speed", [10.0], "MB/s", "peer 1.0", BenchmarkError("no wheel"), Goal("ratio", ">=", 2))
    assert (row.value, row.peer, row.peer_value, row.holds) == (10, "peer 1.0: no wheel", None, False)


def test_rounds_are_interleaved_and_a_failure_ends_one_way_only() -> None:
    order: list[str] = []

    def goes(name: str) -> int:
        order.append(name)
        return len(order)

    def fails() -> None:
        goes("b")
        raise BenchmarkError("broken")

    results = interleaved({"a": lambda: goes("a"), "b": fails, "c": lambda: goes("c")})
    assert order == ["a", "b", "c", "c", "a", "c", "a"]
    assert results["a"] == [1, 5, 7]
    assert isinstance(results["b"], BenchmarkError)


def test_rows_are_written_with_the_fields_that_readers_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(scale: float) -> list[Row]:
        raise BenchmarkError("cannot be measured")

    parts = {"good": lambda scale: [single("share", [scale], "of 1", Goal("value", ">=", 0.4))], "bad": broken}
    file = tmp_path / "rows.json"
    assert run_benchmark("a room", parts, ["--json", str(file), "--only", "good", "--scale", "0.5"]) == 0
    assert run_benchmark("a room", parts, ["--json", str(file), "--scale", "0.5"]) == 1
    good, bad = json.loads(file.read_text())
    assert good == {
        "name": "share", "value": 0.5, "unit": "of 1", "peer": None, "peer_value": None, "ratio": None, "spread": None,
        "goal": "value >= 0.4", "holds": True,
    }  # fmt: skip
    assert (bad["name"], bad["value"], bad["holds"]) == ("bad: cannot be measured", None, False)
    assert "cannot be measured" in capsys.readouterr().out


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one package, which is all that pip finds; environments are made below the same folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "tiny_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_peer.py", "ANSWER = 42\n")
        wheel.writestr("tiny_peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-peer\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_peer-1.0.dist-info/RECORD", "")
    return tmp_path


def test_a_peer_runs_in_an_environment_of_its_own(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = wheels / "requirements.txt"
    requirements.write_text("tiny-peer==1.0\n")
    (wheels / "ask.py").write_text(
        "import importlib.util, json, sys, tiny_peer\n"
        "print('a line before')\n"
        "has_raylm = importlib.util.find_spec('pyarrow') is not None\n"
        "print(json.dumps({'answer': tiny_peer.ANSWER, 'asked': json.loads(sys.argv[1]), 'has_ours': has_raylm}))\n"
    )
    monkeypatch.setattr(measure, "PEERS", wheels)
    python = peer_python(requirements)
    assert run_script(python, "ask.py", n=1) == {"answer": 42, "asked": {"n": 1}, "has_ours": False}
    made = python.stat().st_ctime_ns
    assert peer_python(requirements) == python and python.stat().st_ctime_ns == made
    with pytest.raises(BenchmarkError, match=r"missing\.py failed: .*No such file"):
        run_script(python, "missing.py")


def test_an_environment_that_cannot_be_made_says_why(wheels: Path) -> None:
    requirements = wheels / "requirements.txt"
    requirements.write_text("no-such-peer==1.0\n")
    for _ in range(2):  # what failed is not taken for complete
        with pytest.raises(BenchmarkError, match="No matching distribution found for no-such-peer"):
            peer_python(requirements)


def test_the_largest_process_of_a_session_is_seen(tmp_path: Path) -> None:
    held = "import subprocess, sys, time; x = bytearray(150 << 20); time.sleep(4)"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"]
    finished = Session(command, os.environ, tmp_path).wait(watched=True)
    assert 150 << 20 < finished.peak_bytes < 250 << 20


def test_a_killed_session_leaves_nothing(tmp_path: Path) -> None:
    """Not even a process that has put itself into a group of its own."""
    grandchild = "import os, time; os.setpgrp(); print('ready', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"]
    session = Session(command, os.environ, tmp_path)
    while "ready" not in (tmp_path / "stdout").read_text():
        time.sleep(0.05)
    pids = session.pids()
    assert len(pids) == 2
    session.kill()
    assert not session.running
    assert not session.pids()
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):  # it is gone, and not even waited for
            assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_command_that_fails_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    session = Session([sys.executable, "-c", "import sys; sys.exit('no room left')"], os.environ, tmp_path)
    with pytest.raises(BenchmarkError, match="exit code 1: no room left"):
        session.wait()


def test_a_script_beside_raylm_imports_the_raylm_that_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "where.py").write_text("import json, raylm\nprint(json.dumps({'found': raylm.__file__}))\n")
    monkeypatch.setattr(measure, "PEERS", tmp_path)
    assert run_script(sys.executable, "where.py") == {"found": str(measure.REPOSITORY / "raylm" / "__init__.py")}


def test_the_table_of_a_file_is_renewed_between_its_marks(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("above\n<!-- benchmarks -->\nold | one\n<!-- /benchmarks -->\nbelow\n")
    parts = {
        "good": lambda _: [beside("speed", [10, 30, 20], "MB/s", "peer|1", [5, 10, 20], Goal("ratio", ">=", 2))],
        "bad": lambda _: [single("lost", [3.0], "rows", Goal("value", "<=", 0))],
        "read": lambda _: [
            Row("kept", 0.1234, "share", "others", None, 1.5),
            single("signatures", [12345.6], "documents/s"),
        ],
    }
    assert run_benchmark("rooms", parts, ["--readme"], readme=file) == 1
    assert file.read_text().splitlines() == [
        "above",
        "<!-- benchmarks -->",
        "| work | raylm | beside | ratio | spread |",
        "|---|---:|---|---:|---:|",
        "| speed | 20 MB/s | peer/1: 10 MB/s | 2.00 | 100 % |",
        "| lost | 3 rows |  | (goal: value <= 0) |  |",
        "| kept | 12.3 % | others: – | 1.50 |  |",
        "| signatures | 12,346 documents/s |  |  |  |",
        "<!-- /benchmarks -->",
        "below",
    ]
    file.write_text("no marks")
    with pytest.raises(SystemExit):
        run_benchmark("rooms", parts, ["--readme"], readme=file)


def test_all_rooms_are_measured_at_a_share_of_their_length() -> None:
    from tests.benchmarks.__main__ import ROOMS, parts

    found = parts()
    assert set(found) == {f"{room}.{name}" for room, (_, shares) in ROOMS.items() for name in shares}
    assert all(0 < share <= 1 for _, shares in ROOMS.values() for share in shares.values())
