"""`raylm submit` and `raylm logs` on a running cluster, over a line that breaks."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cluster.conftest import PATIENCE_S, REPOSITORY, Cluster

pytestmark = pytest.mark.slow

_TALKER = """\
import sys, time
for number in range(int(sys.argv[1])):
    sys.stdout.write(f"line {number}\\n")
    if number % 40 == 39:
        time.sleep(0.5)
"""


class BreakingLine:
    """A TCP line to a port that cuts every connection after so many seconds."""

    def __init__(self, port: int, seconds: float) -> None:
        self._target, self._seconds = port, seconds
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()
            threading.Timer(self._seconds, self._break, (near, far)).start()

    @staticmethod
    def _carry(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65_536):
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _break(self, *ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                self.cut += 1

    def close(self) -> None:
        self._listener.close()


@contextmanager
def breaking_line(port: int, seconds: float) -> Iterator[BreakingLine]:
    line = BreakingLine(port, seconds)
    try:
        yield line
    finally:
        line.close()


def start(cluster: Cluster, *words: str, port: int | None = None, **environment: str) -> subprocess.Popen[str]:
    command, *rest = words
    address = f"http://127.0.0.1:{port or cluster.dashboard}"
    return subprocess.Popen(
        [sys.executable, "-m", "raylm", command, "--address", address, *rest],
        env=cluster.environment | environment, cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def told(process: subprocess.Popen[str], words: str) -> str:
    """What a command notes, up to the line with some words."""
    assert process.stderr
    said = ""
    while words not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


def own(output: str) -> str:
    """What the jobs themselves printed: Ray puts two lines to each, the second without waiting for its turn."""
    setting_up, running = "Runtime env is setting up", "Running entrypoint for job"
    assert output.count(setting_up) == output.count(running) > 0
    return "".join(line for line in output.splitlines(keepends=True) if setting_up not in line and running not in line)


@pytest.fixture(scope="module")
def scripts(cluster: Cluster) -> Path:
    """Scripts, executable."""
    directory = cluster.file.parent
    for name, text in {
        "talk.py": _TALKER,
        "fail.py": "import sys\nsys.stdout.write('no\\n')\nsys.exit(7)\n",
        "once.py": "import pathlib, sys\nmark = pathlib.Path(sys.argv[1])\nif not mark.exists():\n    mark.touch()\n"
        "    sys.exit(3)\nsys.stdout.write('at last\\n')\n",
        "wait.py": "import pathlib, sys, time\nsys.stdout.write('waiting\\n')\n"
        "while not pathlib.Path(sys.argv[1]).exists():\n    time.sleep(0.1)\nsys.stdout.write('done\\n')\n",
    }.items():
        script = directory / name
        script.write_text(f"#!{sys.executable}\n{text}")
        script.chmod(0o755)
    return directory


def test_output_has_no_gap_and_no_repeat_over_a_line_that_breaks(cluster: Cluster, scripts: Path) -> None:
    with breaking_line(cluster.dashboard, seconds=5) as line:
        code, out, err = ended(start(cluster, "submit", str(scripts / "talk.py"), "1000", port=line.port))
    assert code == 0, err
    assert own(out).splitlines() == [f"line {number}" for number in range(1_000)]
    assert line.cut > 2
    named = re.search(r"\braylm-talk-\w+-1\b", err)
    assert named, err
    assert ended(start(cluster, "logs", named[0]))[:2] == (0, out)


def test_the_exit_code_is_the_jobs_own(cluster: Cluster, scripts: Path) -> None:
    code, out, err = ended(start(cluster, "submit", str(scripts / "fail.py")))
    assert (code, own(out)) == (7, "no\n"), err


def test_a_job_that_fails_is_tried_again(cluster: Cluster, scripts: Path, tmp_path: Path) -> None:
    code, out, err = ended(
        start(cluster, "submit", "--set", "job.retries=2", str(scripts / "once.py"), str(tmp_path / "mark"))
    )
    assert (code, own(out)) == (0, "at last\n"), err
    assert "failed with exit code 3; attempt 2 of 3" in err


def test_a_second_call_joins_the_job_that_runs(cluster: Cluster, scripts: Path, tmp_path: Path) -> None:
    words = ("submit", str(scripts / "wait.py"), str(tmp_path / "mark"))
    first = start(cluster, *words)
    said = told(first, "submitted")
    second = start(cluster, *words)
    said_again = told(second, "runs already: following it")
    (tmp_path / "mark").touch()
    (code, out, err), (code_again, out_again, err_again) = ended(first), ended(second)
    assert (code, code_again, own(out)) == (0, 0, "waiting\ndone\n"), said + err + said_again + err_again
    assert out_again == out
    third = ended(start(cluster, *words))
    assert re.search(r"\braylm-wait-\w+-2\b", third[2]), third


def test_the_status_tells_machines_price_and_jobs(cluster: Cluster, scripts: Path) -> None:
    said = ended(start(cluster, "submit", str(scripts / "fail.py")))[2]
    named = re.search(r"\braylm-fail-\w+-\d+\b", said)
    assert named, said
    submitted = named[0]
    code, out, err = ended(start(cluster, "status", "--json", "--set", "prices.other=0.5"))
    assert code == 0, err
    found = json.loads(out)
    [head] = [machines for machines in found["machines"] if machines["node_type"] == "head"]
    assert (head["count"], head["cpus"], head["price"]) == (1, 2, 0.5)
    assert found["price"] == 0.5 * sum(machines["count"] for machines in found["machines"])
    [job] = [job for job in found["jobs"] if job["submission_id"] == submitted]
    assert job["status"] == "FAILED" and job["entrypoint"].endswith("fail.py")
    code, out, err = ended(start(cluster, "status"))
    assert code == 0 and submitted in out, err


def test_what_is_not_there_is_one_line(cluster: Cluster) -> None:
    code, out, err = ended(start(cluster, "logs", "raylm-nothing-1"))
    assert (code, out) == (1, "")
    assert "raylm: error: job raylm-nothing-1: " in err and "Traceback" not in err
    code, _, err = ended(start(cluster, "logs", "x", port=9))
    assert code == 1 and "there is no cluster at http://127.0.0.1:9" in err and "Traceback" not in err


def test_who_has_no_token_or_a_wrong_one_is_told_where_it_is_looked_for(cluster: Cluster, tmp_path: Path) -> None:
    where = f"raylm: error: http://127.0.0.1:{cluster.dashboard}: "
    for environment, said in (
        ({"RAY_AUTH_TOKEN": "9" * 64}, f"{where}Authentication failed: Forbidden: Invalid authentication token; "),
        (
            {"RAY_AUTH_MODE": "disabled"},
            f"{where}Authentication required: Unauthorized: Missing authentication token; ",
        ),
        (
            {"HOME": str(tmp_path)},
            f"{where}Token authentication is enabled but Ray couldn't find an authentication token",
        ),
    ):
        code, _, err = ended(start(cluster, "status", **environment))
        assert code == 1 and said in err and "~/.ray/auth_token" in err and "Traceback" not in err, err
    where = f"127.77.1.2:{cluster.gcs}"
    for environment, said in (
        ({"HOME": str(tmp_path)}, "no authentication token was found"),
        (
            {"RAY_AUTH_TOKEN": "9" * 64},
            f"Ray at {where}: something listens there, but no Ray that this process may join",
        ),
    ):
        joined = subprocess.run(
            [sys.executable, "-m", "raylm", "collect-logs"],
            env=cluster.environment | {"RAY_ADDRESS": where} | environment,
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert joined.returncode == 1 and said in joined.stderr, joined.stderr
        assert "is looked for in $RAY_AUTH_TOKEN" in joined.stderr and "Traceback" not in joined.stderr


_REFUSED = """
import os, sys
from ray._raylet import AuthenticationTokenLoader
from raylm.cluster import jobs, status
from raylm.errors import RaylmError
client = jobs.connect(sys.argv[1])
os.environ["RAY_AUTH_TOKEN"] = "9" * 64  # from now on
AuthenticationTokenLoader.instance().reset_cache()
client._headers = {"Authorization": "Bearer 9"}
for ask, words in ((jobs.follow, ["a-job", print, print]), (status._machines, [{}]), (status._jobs, [])):
    try:
        ask(client, *words)
    except RaylmError as error:
        print(error)
"""


def test_a_token_that_counts_no_longer_is_told(cluster: Cluster) -> None:
    address = f"http://127.0.0.1:{cluster.dashboard}"
    found = subprocess.run(
        [sys.executable, "-c", _REFUSED, address], env=cluster.environment, cwd=REPOSITORY, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert found.stdout.count("Invalid authentication token; the cluster's token is looked for") == 3, found
