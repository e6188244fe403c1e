"""Machines that are processes of this one: a real autoscaling cluster without a cloud, ssh or docker.

Each machine has an address of the loopback network, 127.0.0.N, and a directory of its own. What belongs to it is known
by a variable of its environment, which all that it starts inherits; so one cluster ends without touching another.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock
from ray.autoscaler._private.subprocess_output_util import ProcessRunnerError
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND

from raylm.capacity import NODE_IP
from raylm.settings.loading import BOOTSTRAP_CONFIG

NODE, NODE_DIR = "RAYLM_NODE", "RAYLM_NODE_DIR"
"""What a machine's commands find in their environment, beside its address: which it is, and its directory."""

_HEAD_NUMBER = 2
_MOST_NUMBER = 254
_STOP_S = 10.0
"""How long processes have to end after a SIGTERM."""


class ProcessNodeProvider(NodeProvider):  # type: ignore[misc]
    """Machines that are processes of this one.

    `provider.network` names the first three numbers of their addresses, by default `127.0.0`; two clusters that are up
    at once need two. The machines are kept in a file that the launcher and the head's autoscaler share.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._network = str(provider_config.get("network", "127.0.0"))
        # Ray's socket paths are limited to 107 bytes, so this has to be near the root.
        self._place = Path(tempfile.gettempdir()) / f"raylm-{os.getuid()}" / cluster_name
        self._place.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = self._place / "machines.json"

    # ------------------------------------------------------------------------------------- looking

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        return [name for name, tags in self._machines().items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        return node_id in self._machines()

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self._machines().get(node_id, {})

    def internal_ip(self, node_id: str) -> str:
        return f"{self._network}.{node_id.rsplit('-', 1)[1]}"

    def external_ip(self, node_id: str) -> str:
        return self.internal_ip(node_id)

    # ------------------------------------------------------------------------------------- changing

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """As many machines as are asked for: a name and an empty directory each, until Ray is started there.

        A name that was given is the last to be given again: to Ray's autoscaler, a machine that it has ended and whose
        name is there again is one that does not end. A head begins a new cluster, without its predecessor's logs.
        """
        made: dict[str, Any] = {}
        with self._changing() as machines:
            free = set(range(_HEAD_NUMBER, _MOST_NUMBER)) - {int(name.rsplit("-", 1)[1]) for name in machines}
            if tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD:
                for number in free:
                    shutil.rmtree(self._place / str(number), ignore_errors=True)
                free &= {_HEAD_NUMBER}
            else:
                free -= {_HEAD_NUMBER}
            for number in sorted(free, key=lambda number: (self._last_given(number), number))[:count]:
                name = f"{self.cluster_name}-{number}"
                shutil.rmtree(self.directory(name), ignore_errors=True)
                self.directory(name).mkdir(mode=0o700)
                machines[name] = dict(tags)
                made[name] = {}
        return made

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self._changing() as machines:
            if node_id in machines:
                machines[node_id].update(tags)

    def terminate_node(self, node_id: str) -> None:
        """End a machine; with a head goes the file that `ray up` left in its home, which is this user's."""
        self.stop(node_id)
        with self._changing() as machines:
            tags = machines.pop(node_id, {})
        if tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD:
            self._forget_file()

    def stop(self, node_id: str) -> None:
        """End all processes of a machine, and none else."""
        while processes := list(self._processes(node_id)):  # one that is ended may have started another meanwhile
            _end(processes)

    # --------------------------------------------------------------------------------- running commands

    def get_command_runner(self, log_prefix: str, node_id: str, *_: Any, **__: Any) -> CommandRunnerInterface:
        return _Commands(self, node_id)

    def directory(self, node_id: str) -> Path:
        """What a machine has for itself; its logs stay there until its number is given to another."""
        return self._place / node_id.rsplit("-", 1)[1]

    def environment(self, node_id: str) -> dict[str, str]:
        """What commands of a machine find around them; their programs are those of this Python."""
        return os.environ | {
            NODE: self._mark(node_id),
            NODE_IP: self.internal_ip(node_id),
            NODE_DIR: str(self.directory(node_id)),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }

    # ------------------------------------------------------------------------------------- helpers

    def _forget_file(self) -> None:
        """Remove the cluster's file, which commands of this user would read on; that of another cluster stays."""
        left = BOOTSTRAP_CONFIG.expanduser()
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
            if yaml.safe_load(left.read_text()).get("cluster_name") == self.cluster_name:
                left.unlink()

    def _last_given(self, number: int) -> float:
        directory = self._place / str(number)
        return directory.stat().st_mtime if directory.exists() else 0.0

    def _mark(self, node_id: str) -> str:
        return f"{self._place}/{node_id}"

    def _processes(self, node_id: str) -> Iterator[psutil.Process]:
        mark = self._mark(node_id)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(NODE) == mark:
                    yield process

    def _machines(self) -> dict[str, dict[str, str]]:
        """The tags of each machine."""
        with self._lock():
            return self._read()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, dict[str, str]]]:
        with self._lock():
            machines = self._read()
            yield machines
            written = self._file.with_suffix(".new")
            written.write_text(json.dumps(machines))
            written.replace(self._file)

    def _read(self) -> dict[str, dict[str, str]]:
        return dict(json.loads(self._file.read_text())) if self._file.exists() else {}

    def _lock(self) -> FileLock:
        return FileLock(self._place / "machines.lock")


class _Commands(CommandRunnerInterface):  # type: ignore[misc]
    """Runs commands as a machine's own: here, with its environment."""

    def __init__(self, provider: ProcessNodeProvider, node_id: str) -> None:
        self._provider, self._node_id = provider, node_id

    def run(
        self,
        cmd: str | None = None,
        timeout: int = 120,
        exit_on_fail: bool = False,
        port_forward: list[tuple[int, int]] | None = None,
        with_output: bool = False,
        environment_variables: dict[str, object] | None = None,
        run_env: str = "auto",
        ssh_options_override_ssh_key: str = "",
        shutdown_after_run: bool = False,
    ) -> str:
        if not cmd or cmd == "uptime":  # the launcher's question whether a machine is there
            return ""
        if not self._provider.is_running(self._node_id):  # what it starts would be nobody's
            raise ProcessRunnerError("the machine is gone", "ssh_command_failed", code=1, command=cmd)
        if cmd.strip() == "ray stop" or cmd.strip().endswith("; ray stop"):  # would end every Ray of this user
            self._provider.stop(self._node_id)
            return ""
        added = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in (environment_variables or {}).items()
        }
        done = subprocess.run(
            ["bash", "-c", cmd],
            env=self._provider.environment(self._node_id) | added,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if with_output else None,
            text=True,
            check=False,
        )
        if shutdown_after_run:
            self._provider.terminate_node(self._node_id)
        if done.returncode:
            if exit_on_fail:
                sys.exit(done.returncode)
            raise ProcessRunnerError("Command failed", "ssh_command_failed", code=done.returncode, command=cmd)
        return done.stdout or ""

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        _copy(Path(source).expanduser(), Path(target).expanduser())

    def run_rsync_down(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        _copy(Path(source).expanduser(), Path(target).expanduser())

    def remote_shell_command_str(self) -> str:
        return "bash"


def _copy(source: Path, target: Path) -> None:
    """A file or a tree, which is there already where both are the same."""
    if source.resolve() == target.resolve():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def _end(processes: list[psutil.Process]) -> None:
    """End processes: first by asking, after a while by force."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=_STOP_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=_STOP_S)
