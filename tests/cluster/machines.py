"""Machines that ssh reaches: Linux namespaces with an sshd, a home and a network card of their own, behind one switch.

Nothing of them is left when their processes are gone, and none sees what else runs here. They share the disk, so that
a directory is a storage that all reach, and the environment of the tests stands for the one that `uv` would install.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

import pytest

REPOSITORY = Path(__file__).parents[2]
_NEEDED = ("unshare", "nsenter", "ip", "sshd", "ssh", "ssh-keygen", "rsync")
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h
_READY_S = 120

Result = TypeVar("Result")

_BOOT = """
mount --bind {place}/home {home}
mount --bind {place}/passwd /etc/passwd
mount --bind {place}/ray /tmp/ray
until ip link show eth0 > {place}/boot.log 2>&1; do sleep 0.05; done
ip link set lo up
ip link set eth0 up
ip address add {address} dev eth0
ip route add default dev eth0
mkdir -p /run/sshd
{sshd} -D -e -f {place}/sshd_config 2> {place}/sshd.log &
exec {python} -S -c '
import os, time
while True:  # a first process lays the orphans to rest
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.1)
'
"""
_SSHD = """
HostKey {place}/host_key
PidFile none
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
AcceptEnv *
Subsystem sftp internal-sftp
"""
_ANY_KEY = "AuthorizedKeysCommand /bin/echo %t %k\nAuthorizedKeysCommandUser root\n"
_UV = """#!/bin/sh
[ "$1" = venv ] && ln -sfn {prefix} ~/venv
exit 0
"""


class Machine:
    """One of them, from when it answers.

    :param users: names under which one may log in; all are root.
    :param environment: what its shells begin with.
    :param authorized_key: the public key that opens it; None for any.
    """

    def __init__(
        self,
        switch: Switch,
        place: Path,
        address: str,
        users: tuple[str, ...],
        environment: Mapping[str, str],
        authorized_key: Path | None,
    ) -> None:
        self.address = address
        self.home = place / "home"
        """Seen from outside; on the machine itself it has the path that all homes have."""
        self._own_home = place.parent / "home"
        self._own_home.mkdir(exist_ok=True)
        (self.home / ".ssh").mkdir(parents=True)
        (self.home / ".local" / "bin").mkdir(parents=True)
        (place / "ray").mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)
        make_key(place / "host_key")
        if authorized_key:
            shutil.copy(authorized_key, self.home / ".ssh" / "authorized_keys")
        others = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
        own = [f"{user}:x:0:0::{self._own_home}:/bin/bash" for user in ("root", *users)]
        (place / "passwd").write_text("\n".join([*own, *others, ""]))
        (place / "sshd_config").write_text(_SSHD.format(place=place) + ("" if authorized_key else _ANY_KEY))
        exports = "".join(f"export {name}='{value}'\n" for name, value in environment.items())
        (self.home / ".bashrc").write_text(exports)
        uv = self.home / ".local" / "bin" / "uv"
        uv.write_text(_UV.format(prefix=sys.prefix))
        uv.chmod(0o755)
        self._process = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *(
                    "sh",
                    "-ec",
                    _BOOT.format(
                        place=place,
                        home=self._own_home,
                        address=address,
                        sshd=shutil.which("sshd"),
                        python=sys.executable,
                    ),
                ),
            ],
            stdin=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
        )
        try:
            switch.connect(self._process.pid)
            end = time.monotonic() + _READY_S
            while "listening" not in (log := _text(place / "sshd.log")):
                assert time.monotonic() < end, f"{address} does not answer: {log} {_text(place / 'boot.log')}"
                time.sleep(0.05)
        except BaseException:
            self.stop()
            raise

    def command(self, *words: str) -> list[str]:
        """A command as it is started from outside to run on this machine."""
        namespaces = f"/proc/{self._process.pid}/ns"
        entered = (f"--net={namespaces}/net", f"--mount={namespaces}/mnt", f"--pid={namespaces}/pid_for_children")
        return ["nsenter", *entered, "--", *words]

    def run(self, *words: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        """A command of this machine's user in the checkout, with the environment of the tests on its path."""
        line = 'cd "$0" && . ~/.bashrc && exec "$@"'  # a process begins at the root of another's mounts
        path = f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"
        # Into files: an ssh that shares its connection stays for a while, and would keep pipes open.
        with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
            done = subprocess.run(
                self.command("bash", "-c", line, str(REPOSITORY), *words),
                env={"PATH": path, "HOME": str(self._own_home), "LANG": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                timeout=timeout_s,
                check=False,
            )
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, output.read(), errors.read())

    def processes(self) -> list[str]:
        """The command lines of what runs on it, but for its own beginning and sshd."""
        lines = self.run("ps", "-eo", "args", "--no-headers").stdout.splitlines()
        own = (f"{sys.executable} -S -c", "sshd", f"{shutil.which('sshd')} ", "ps -eo")
        return [line for line in lines if not line.startswith(own)]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Switch:
    """What machines are plugged into: a bridge, in a network of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self._ports = 0
        _wait_for_network_of(self._process.pid)
        self._ip("link", "add", "bridge", "type", "bridge")
        for device in ("lo", "bridge"):
            self._ip("link", "set", device, "up")
        self._inside = ThreadPoolExecutor(1, initializer=self._enter)

    def connect(self, process: int) -> None:
        """Plug in the network of a process, as its `eth0`."""
        self._ports += 1
        port = f"port{self._ports}"
        _wait_for_network_of(process)
        self._ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(process))
        self._ip("link", "set", port, "master", "bridge", "up")

    def add_address(self, address: str) -> None:
        """An address of the switch itself, where services of `inside` are reached."""
        self._ip("address", "add", address, "dev", "bridge")
        self._ip("route", "replace", "default", "dev", "bridge")

    def inside(self, work: Callable[[], Result]) -> Result:
        """What a function returns that runs in this network, as do the threads that it starts."""
        return self._inside.submit(work).result()

    def _enter(self) -> None:
        with Path(f"/proc/{self._process.pid}/ns/net").open() as network:
            if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _NEW_NETWORK):
                raise OSError(ctypes.get_errno(), "setns")

    def _ip(self, *words: str) -> None:
        subprocess.run(["nsenter", f"--net=/proc/{self._process.pid}/ns/net", "ip", *words], check=True)

    def stop(self) -> None:
        self._inside.shutdown()
        self._process.kill()
        self._process.wait()


class Site:
    """A switch and its machines."""

    def __init__(self, directory: Path, users: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.switch = Switch()
        self.machines: dict[str, Machine] = {}
        self.authorized_key: Path | None = None
        """The public key that opens machines; None: any does."""
        self._directory, self._users, self._environment = directory, users, environment
        self._made = 0

    def add(self, address: str) -> Machine:
        self._made += 1
        place = self._directory / f"machine-{self._made}"
        self.machines[address] = Machine(
            self.switch, place, address, self._users, self._environment, self.authorized_key
        )
        return self.machines[address]

    def remove(self, address: str) -> None:
        self.machines.pop(address).stop()

    def stop(self) -> None:
        for machine in self.machines.values():
            machine.stop()
        self.switch.stop()


@contextmanager
def site(directory: Path, *users: str, **environment: str) -> Iterator[Site]:
    """A network without machines; the test is skipped where this machine cannot have one.

    :param environment: what the machines' shells begin with.
    """
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    if os.geteuid() or tried.returncode:
        pytest.skip("needs the right to make networks of its own")
    usual = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(REPOSITORY)}
    found = Site(directory, users, usual | environment)
    try:
        yield found
    finally:
        found.stop()


def make_key(place: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place)], check=True)


def _wait_for_network_of(process: int) -> None:
    """Until a process that is starting has left the network of this one."""
    while Path(f"/proc/{process}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
        time.sleep(0.01)


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""
