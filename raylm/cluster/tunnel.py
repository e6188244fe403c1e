"""The way to a cluster's dashboard and its Jobs API, which listen on the head alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from raylm.cluster.commands import commands
from raylm.cluster.file import ClusterFile, read
from raylm.cluster.jobs import DASHBOARD_PORT
from raylm.errors import RaylmError, SettingsError
from raylm.settings.loading import BOOTSTRAP_CONFIG

_TUNNEL_S = 60.0
_TUNNEL_LOOK_S = 1.0
_TUNNEL_TRIES = 3
"""Ends of a tunnel before the head has ever answered through it, after which there will be none."""


@contextlib.contextmanager
def dashboard(cluster: ClusterFile) -> Iterator[str]:
    """The address of a cluster's Jobs API: on this machine where it is the head, else through a tunnel to it.

    :raises RaylmError: there is no way to it.
    """
    port = DASHBOARD_PORT
    for _, text in commands(cluster, "head_start_ray_commands"):
        if found := re.search(r"--dashboard-port[= ](\d+)", text):
            port = int(found[1])
    if cluster.provider in ("external", "kuberay") or (_has_file_of(cluster) and _answers(f"http://127.0.0.1:{port}")):
        yield f"http://127.0.0.1:{port}"
        return
    near = _free_port()  # another cluster may be at the head's own here
    tunnel = [ray_program(), "dashboard", "--port", str(near), "--remote-port", str(port), str(cluster.path)]
    with _kept_open(tunnel) as ends:
        end = time.monotonic() + _TUNNEL_S
        while not _answers(f"http://127.0.0.1:{near}"):
            if time.monotonic() > end or len(ends) >= _TUNNEL_TRIES:
                raise RaylmError(f"{cluster.path}: no tunnel to the head's dashboard; does `ray dashboard` work?")
            time.sleep(1)
        yield f"http://127.0.0.1:{near}"


@contextlib.contextmanager
def _kept_open(tunnel: Sequence[str]) -> Iterator[Sequence[int]]:
    """A command that runs meanwhile; one that ends is started again, as a line that was silent for too long does.

    It gives the exit codes of those that have ended.
    """
    ended = threading.Event()
    ends: list[int] = []

    def keep() -> None:
        while not ended.is_set():
            process = subprocess.Popen(
                tunnel,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            while process.poll() is None and not ended.wait(_TUNNEL_LOOK_S):
                pass
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            ends.append(process.wait())
            ended.wait(_TUNNEL_LOOK_S)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield ends
    finally:
        ended.set()
        thread.join()


def _has_file_of(cluster: ClusterFile) -> bool:
    """Whether this machine is one of the cluster's, on which its file was left."""
    left = BOOTSTRAP_CONFIG.expanduser()
    if not left.is_file():
        return False
    try:
        found = read(left)
    except SettingsError:
        return False
    return (found.get("cluster_name"), found.provider) == (cluster.get("cluster_name"), cluster.provider)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it asks for a token
    except OSError:
        return False
    return True


def ray_program() -> str:
    """The `ray` of this very Python."""
    return str(Path(sys.executable).parent / "ray")
