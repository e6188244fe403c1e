"""Clusters made and ended by Ray's launcher, and a job on one that lasts as long as the job."""

from __future__ import annotations

import contextlib
import copy
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from raylm.auth import ensure_token
from raylm.cluster.check import check
from raylm.cluster.file import ClusterFile, read
from raylm.cluster.jobs import Ended, connect, submit
from raylm.cluster.providers import ENDING
from raylm.cluster.tunnel import dashboard, ray_program
from raylm.errors import RaylmError, SettingsError, first_line
from raylm.settings import JobSettings, load
from raylm.storage import StoragePath

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_TOKEN = Path("~/.ray/auth_token")
_OUT_OF_REACH_S = 3_600.0
"""How long a cluster that was made for a job may not answer: the line to it may be down, while the job goes on."""
_LOGS_S = 600.0
"""How long the end of a cluster waits for its logs."""
_AGAIN_S = (10, 60)
"""Between tries to end a cluster."""
_SSH = (
    "ssh -n -o BatchMode=yes -o LogLevel=ERROR -o ConnectTimeout=10 -o StrictHostKeyChecking=no"
    " -o UserKnownHostsFile=/dev/null"
)
_SSH_FAILED = 255
"""The exit code of an ssh that has not reached its machine."""
_HEAD_RUNS = 'pgrep -g "$(cat ~/ray-head.pid)" -f "ray start" || pgrep -u "$(id -u)" -x gcs_server'
"""Whether this machine is a head: one that the packaged files begin, or any other."""
_STOP = "if command -v ray; then ray stop; fi"
"""Where the setup has failed, there may be no `ray`."""


def up(path: Path) -> None:
    """Make a cluster, or bring one that is there up to its file.

    :raises SettingsError: the file has errors, as `raylm cluster check` finds them, or is not for Ray's launcher.
    :raises RaylmError: Ray's launcher fails; what it said is above.
    """
    _launchers_file(path, "apply")
    _ensure_token()
    _refuse_errors(path)
    try:
        _ray("up", "-y", "--no-config-cache", str(path))
    except RaylmError as error:
        raise RaylmError(f"{error}; its head may run: raylm down {path}") from error


def down(path: Path) -> None:
    """End a cluster with all its machines.

    :raises SettingsError: the file is not for Ray's launcher.
    :raises RaylmError: Ray's launcher fails, and what it said is above; or Ray runs on where it cannot be stopped.
    """
    cluster = _launchers_file(path, "delete")
    if cluster.provider == "local":
        _stop_ray(cluster)
    _ray("down", "-y", str(path), **{ENDING: "1"})


def run(
    path: Path, script: str, arguments: Sequence[str], echo: Callable[[str], None], note: Callable[[str], None]
) -> Ended:
    """Run a script on a cluster that is made for it, and ended when the job is: also when that fails, or is stopped.

    What the job prints is kept in `<storage>/jobs/<submission id>.log`, also of one that is stopped; of one that has
    ended, what its machines have logged as well, beside it, each in an archive.

    :raises RaylmError: the cluster cannot be made, or is up already, or the job cannot be submitted; or the cluster has
        not answered for an hour, and is ended then, or cannot be ended.
    """
    settings, printed = load(path), []
    name = f"{Path(script).stem}-stopped-{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}"

    def heard(text: str) -> None:
        printed.append(text)
        echo(text)

    cluster = _launchers_file(path, "apply")
    _ensure_token()
    _refuse_errors(path)
    if _is_up(cluster):
        raise RaylmError(
            f"{path}: its cluster is up already, and would end with the job; `raylm submit` runs a job on it,"
            f" `raylm down {path}` ends it"
        )
    is_there = True
    with _stoppable():
        try:
            try:
                _ray("up", "-y", "--no-config-cache", str(path))
            except RaylmError:
                is_there = _may_be_up(cluster)
                raise
            with dashboard(cluster) as address:
                client = connect(address)
                ended = submit(client, script, arguments, settings.job, heard, note, _OUT_OF_REACH_S)
                name = ended.submission_id
                _keep_logs(client, name, settings.job, note)
        finally:
            with _unstoppable():
                try:
                    if is_there:
                        _end(path, note)
                finally:
                    _keep_output(StoragePath(settings.storage) / "jobs" / f"{name}.log", printed, note)
    return ended


# -------------------------------------------------------------------------------------------- helpers


def _launchers_file(path: Path, verb: str) -> ClusterFile:
    """A file that is for Ray's launcher.

    :param verb: what `kubectl` would do with another one.
    :raises SettingsError: it is for KubeRay.
    """
    cluster = read(path)
    if cluster.provider == "kuberay":
        raise SettingsError(f"{path}: pods are KubeRay's: raylm render --to raycluster {path} | kubectl {verb} -f -")
    return cluster


def _refuse_errors(path: Path) -> None:
    """:raises SettingsError: a file has errors, as `raylm cluster check` finds them."""
    errors = [str(finding) for finding in check([path]) if finding.is_error]
    if errors:
        raise SettingsError("\n".join([f"{path} has {len(errors)} errors; nothing was launched", *errors]))


def _is_up(cluster: ClusterFile) -> bool:
    """Whether a cluster has a head, be it one that is only being set up.

    :raises RaylmError: nobody says.
    """
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.tags import NODE_KIND_HEAD, STATUS_UP_TO_DATE, TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS

    try:
        provider = _get_node_provider(copy.deepcopy(cluster.get("provider")), cluster.get("cluster_name"))
        heads = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD})
        if not cluster.get("provider", "head_ip"):
            return bool(heads)
        begun = [head for head in heads if provider.node_tags(head).get(TAG_RAY_NODE_STATUS) != STATUS_UP_TO_DATE]
    except Exception as error:  # of each cloud its own
        raise RaylmError(
            f"{cluster.path}: its provider does not say whether the cluster is up already: {first_line(error)}"
        ) from error
    # Of machines of one's own, the provider knows what was done from this one alone.
    return bool(begun) or _on_head(cluster, _HEAD_RUNS).returncode == 0


def _may_be_up(cluster: ClusterFile) -> bool:
    """Whether there may be something to end after a launch that failed."""
    try:
        return _is_up(cluster)
    except RaylmError:
        return True


def _end(path: Path, note: Callable[[str], None]) -> None:
    """`down`, tried again for a while.

    :raises RaylmError: it fails each time; machines may still run then.
    """
    for wait_s in (*_AGAIN_S, None):
        try:
            return down(path)
        except RaylmError as error:
            if wait_s is None:
                raise RaylmError(f"{error}; its machines may still run: raylm down {path}") from error
            note(f"{error}; trying again in {wait_s} s")
            time.sleep(wait_s)


def _keep_output(log: StoragePath, printed: Sequence[str], note: Callable[[str], None]) -> None:
    if not printed:
        return
    try:
        log.parent.mkdir()
        log.write_bytes("".join(printed).encode())
    except (RaylmError, OSError) as error:  # a storage that the cluster alone reaches
        note(f"{log}: not written: {first_line(error)}")


def _keep_logs(
    client: JobSubmissionClient, submission_id: str, settings: JobSettings, note: Callable[[str], None]
) -> None:
    """Let the cluster itself bring its logs to storage, in one try; that it cannot is said, and fails nothing."""
    said: list[str] = []
    lost = [f"not collected within {_LOGS_S:.0f} s"]
    once = settings.model_copy(update={"retries": 0})

    def collect() -> None:
        try:
            ended = submit(client, "jobs/collect_logs.py", ["--name", submission_id], once, said.append, said.append)
        except RaylmError as error:
            lost[0] = str(error)
        else:
            lost[0] = " ".join("".join(said).split())[-500:] if ended.exit_code else ""

    # Nothing that the cluster does, or does not do, is to keep its machines from being ended.
    collecting = threading.Thread(target=collect, daemon=True)
    collecting.start()
    collecting.join(_LOGS_S)
    if lost[0]:
        note(f"the machines' logs are lost: {lost[0]}")


def _stop_ray(cluster: ClusterFile) -> None:
    """End Ray on machines of one's own, which stay: Ray's launcher leaves it running on all but the head.

    They are told by the head, which reaches them; of the head itself, what would start it again ends first, as the
    packaged files begin it.

    :raises RaylmError: the head cannot be reached, or Ray is not stopped on one of them.
    """
    user = cluster.get("auth", "ssh_user")
    key = " -i ~/ray_bootstrap_key.pem" if cluster.get("auth", "ssh_private_key") else ""
    workers = cluster.get("provider", "worker_ips", default=[])
    stop = shlex.quote(f"bash -i -c '{_STOP}' 2> /dev/null")
    told = [f"({_SSH}{key} {user}@{address} {stop} >&2 || echo {address}) &" for address in workers]
    done = _on_head(cluster, " ".join([*told, "wait;", 'pkill -g "$(cat ~/ray-head.pid)";', _STOP, ">&2"]))
    missed = [address for address in workers if address in done.stdout.split()]
    missed += [_head_of(cluster)] * bool(done.returncode)
    if missed:
        raise RaylmError(f"{cluster.path}: Ray is not stopped on {', '.join(missed)}; end it there by `ray stop`")


def _head_of(cluster: ClusterFile) -> str:
    """The address of the head of machines of one's own, as this machine reaches it."""
    return str(cluster.get("provider", "external_head_ip") or cluster.get("provider", "head_ip", default="its head"))


def _on_head(cluster: ClusterFile, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on the head of machines of one's own, with what its shells begin with.

    Ray's launcher would reach it only from where that has made the cluster.

    :raises RaylmError: the head cannot be reached.
    """
    if not cluster.get("provider", "head_ip"):  # a coordinator gives out the machines: the launcher asks it for them
        words = [ray_program(), "exec", str(cluster.path), command]
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    key, proxy = cluster.get("auth", "ssh_private_key"), cluster.get("auth", "ssh_proxy_command")
    options = ["-i", str(Path(key).expanduser())] if key else []
    options += ["-o", f"ProxyCommand={proxy}"] if proxy else []
    head = f"{cluster.get('auth', 'ssh_user')}@{_head_of(cluster)}"
    done = subprocess.run(
        [*shlex.split(_SSH), *options, head, shlex.join(["bash", "-i", "-c", command])],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == _SSH_FAILED:
        raise RaylmError(f"{cluster.path}: the head {_head_of(cluster)} cannot be reached: {done.stderr.strip()}")
    return done


def _ensure_token() -> None:
    """A token that only this user can read; Ray itself would make one that all can."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    ensure_token(_TOKEN.expanduser())


def _ray(*words: str, **environment: str) -> None:
    done = subprocess.run([ray_program(), *words], stdin=subprocess.DEVNULL, env=os.environ | environment, check=False)
    if done.returncode:
        raise RaylmError(f"ray {' '.join(words)} failed with exit code {done.returncode}")


def _stoppable() -> AbstractContextManager[None]:
    """SIGTERM and a terminal that is gone end what runs as Ctrl-C does, so that nothing stays up."""

    def stop(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt

    return _handled(stop, signal.SIGTERM, signal.SIGHUP)


def _unstoppable() -> AbstractContextManager[None]:
    """Nothing but SIGKILL keeps a cluster from being ended; Ray's launcher inherits that."""
    return _handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None] | signal.Handlers, *numbers: int) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
