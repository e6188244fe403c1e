"""`raylm up`, `down` and `run`: clusters that are checked first, and ended whatever happens."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from raylm.cli import main
from raylm.cluster import logs
from raylm.errors import RaylmError
from raylm.settings import Settings
from raylm.storage import StoragePath
from tests.cluster.conftest import PATIENCE_S, REPOSITORY, Cluster

CLUSTERS = REPOSITORY / "clusters"


@pytest.fixture
def unlaunched(tmp_path: Path, small_settings: Settings) -> Iterator[Cluster]:
    """The file of a cluster that is not up, and a home without a token."""
    cluster = Cluster(tmp_path, small_settings, network="127.77.3")
    cluster.token.unlink()
    yield cluster
    cluster.end()


def run(cluster: Cluster, script: str, *arguments: str) -> subprocess.Popen[str]:
    place = cluster.file.parent / "job.py"
    place.write_text(f"#!{sys.executable}\n{script}")
    place.chmod(0o755)
    return subprocess.Popen(
        [sys.executable, "-m", "raylm", "run", str(cluster.file), str(place), *arguments],
        env=cluster.environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_cluster_ends_with_its_job_though_that_fails(unlaunched: Cluster) -> None:
    process = run(unlaunched, "import sys\nsys.stdout.write(f'said {sys.argv[1]}\\n')\nsys.exit(7)\n", "this")
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 7, output
    assert "said this\n" in output
    assert unlaunched.processes() == []
    assert unlaunched.provider.non_terminated_nodes({}) == []
    machines, log = sorted((unlaunched.storage / "jobs").iterdir())
    assert log.name == f"{machines.name}.log" and log.name.startswith("raylm-job-")
    assert "said this\n" in log.read_text()
    [archive] = machines.iterdir()
    with tarfile.open(archive) as logs:
        assert {"raylet.out", "gcs_server.out", f"job-driver-{machines.name}.log"} <= set(logs.getnames())
    assert stat.S_IMODE(unlaunched.token.stat().st_mode) == 0o600


@pytest.mark.slow
def test_a_cluster_ends_when_its_command_is_stopped(unlaunched: Cluster) -> None:
    process = run(unlaunched, "import sys, time\nsys.stdout.write('at work\\n')\ntime.sleep(600)\n")
    assert process.stdout
    seen = ""
    for line in process.stdout:
        seen += line
        if line == "at work\n":
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, seen + rest
    assert unlaunched.processes() == []
    assert unlaunched.provider.non_terminated_nodes({}) == []
    [log] = (unlaunched.storage / "jobs").iterdir()
    assert log.name.startswith("job-stopped-") and "at work\n" in log.read_text()


def test_a_setup_that_fails_is_told_with_how_to_end_what_it_left(unlaunched: Cluster) -> None:
    values = yaml.safe_load(unlaunched.file.read_text())
    unlaunched.file.write_text(yaml.safe_dump(values | {"setup_commands": ["exit 3"]}))
    found = unlaunched.raylm("up", str(unlaunched.file))
    assert found.returncode == 1 and f"; its head may run: raylm down {unlaunched.file}\n" in found.stderr
    assert unlaunched.provider.non_terminated_nodes({})
    assert unlaunched.raylm("down", str(unlaunched.file)).returncode == 0
    assert unlaunched.provider.non_terminated_nodes({}) == []


_COLLECT = """
import sys, time
from raylm.cluster import launch
from raylm.cluster.jobs import connect
from raylm.settings import JobSettings
launch._LOGS_S = 8
client = connect(sys.argv[1])
launch._keep_logs(client, "a-job", JobSettings(retries=2, entrypoint_resources={"absent": 1}), print)
while not (found := [job for job in client.list_jobs() if "collect_logs" in job.entrypoint]):
    time.sleep(0.5)  # a head is slow to take its first job
[job] = found
client.stop_job(job.submission_id)
"""


@pytest.mark.slow
def test_an_end_does_not_wait_for_logs_that_do_not_come(cluster: Cluster) -> None:
    """No machine can run the job that would bring them."""
    found = subprocess.run(
        [sys.executable, "-c", _COLLECT, f"http://127.0.0.1:{cluster.dashboard}"],
        env=cluster.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (0, "the machines' logs are lost: not collected within 8 s\n"), found


@pytest.mark.usefixtures("ray_cluster")
def test_logs_that_take_too_long_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._private.worker

    endless = Path(ray._private.worker.global_worker.node.get_logs_dir_path()) / "endless.log"
    with endless.open("w") as file:
        file.truncate(1 << 42)  # which takes no room, and hours to read
    try:
        with monkeypatch.context() as hurried, pytest.raises(RaylmError, match="no logs: not written within 3 s"):
            hurried.setattr(logs, "_PATIENCE_S", 3)
            logs.collect(StoragePath(str(tmp_path)))
    finally:
        endless.write_text("")  # which ends what reads it
        endless.unlink()
    assert logs.collect(StoragePath(str(tmp_path))).missed == {}


def test_a_file_with_errors_is_not_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # which the command sets, and would stay
    values = yaml.safe_load((CLUSTERS / "local.yaml").read_text())
    values["metadata"]["raylm"]["pretrian"] = {}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    found = CliRunner().invoke(main, ["up", str(path)])
    assert found.exit_code == 1
    assert "has 1 errors; nothing was launched" in found.output
    assert "metadata.raylm.pretrian: error: unknown key; did you mean 'pretrain'?" in found.output
    for command, verb in (("up", "apply"), ("down", "delete")):
        pods = CliRunner().invoke(main, [command, str(CLUSTERS / "kuberay.yaml")])
        assert pods.exit_code == 1 and "raylm: error: " in pods.output
        assert f"raylm render --to raycluster {CLUSTERS}/kuberay.yaml | kubectl {verb} -f -" in pods.output
