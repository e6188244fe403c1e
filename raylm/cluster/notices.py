"""What a cloud tells a spot machine before it takes it away, told to Ray: the machine is drained. And a lost head.

Then training writes a checkpoint and goes on with the machines that stay, and nothing new is placed here. The clouds
say it about two minutes (AWS) or half a minute (Google Cloud, Azure) before:
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html,
https://cloud.google.com/compute/docs/instances/preemptible,
https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from raylm.errors import RaylmError, first_line

_POLL_S = 5.0
_TIMEOUT_S = 2.0
_GOOGLE_S = 30.0

_SHUT_DOWN = ("sudo", "shutdown", "-h", "now")

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy would ask about itself."""

PLACES = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}
"""Where each cloud's machines ask about themselves."""


def notice_of(cloud: str, place: str) -> float | None:
    """How many seconds this machine still has, or None while the cloud says nothing.

    :param place: the metadata service's address, without a path.
    :raises OSError: it does not answer.
    """
    if cloud == "aws":
        return _aws(place)
    return _google(place) if cloud == "gcp" else _azure(place)


class Head:
    """The head of the cluster, which alone ends idle machines: without it they would run on, and cost.

    :param address: `host:port`, where it takes connections.
    :param patience_s: how long it may be away, as one that is started again is for a while.
    :raises RaylmError: the address is none.
    """

    def __init__(self, address: str, patience_s: float) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise RaylmError(f"--address: found '{address}', say host:port of the cluster's head")
        self._address, self.patience_s = (host.strip("[]"), int(port)), patience_s
        self._last_heard = time.monotonic()

    def is_lost(self) -> bool:
        """Whether it has taken no connection for so long."""
        with suppress(OSError):
            socket.create_connection(self._address, timeout=_TIMEOUT_S).close()
            self._last_heard = time.monotonic()
        return time.monotonic() - self._last_heard > self.patience_s


def watch(
    cloud: str, place: str, drain: Callable[[float], None], note: Callable[[str], None], head: Head | None = None
) -> None:
    """Wait for the notice, and drain; returns when that is done.

    :param head: without which this machine is to shut itself down; None: it stays.
    """
    note(f"watching for a notice of {cloud} at {place}")
    last = ""
    while True:
        try:
            if head and head.is_lost():
                note(f"the head has not answered for {head.patience_s / 60:.0f} minutes: this machine shuts down")
                subprocess.run(_SHUT_DOWN, check=False)
            seconds = notice_of(cloud, place)
            if seconds is not None:
                note(f"this machine will be taken away in {seconds:.0f} s")
                drain(seconds)
                return
        except (RaylmError, RuntimeError, OSError, ValueError, KeyError) as error:  # the head may be on its way back
            if last != (last := first_line(error)):
                note(f"{last}; trying on")
        time.sleep(_POLL_S)


def drain(address: str, node_ip: str, seconds: float) -> None:
    """Let Ray take nothing new onto the machine of an address, and tell what runs there.

    :param address: the cluster's, `host:port` of its head.
    :param seconds: until the machine is gone.
    :raises RaylmError: Ray does not answer, does not know the machine, or refuses.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import RayError

    try:
        nodes = GcsClient(address=address).get_all_node_info().values()
    except RayError as error:
        raise RaylmError(f"Ray at {address} does not answer: {first_line(error)}") from error
    alive = [node.node_id.hex() for node in nodes if node.node_manager_address == node_ip and node.state == 0]
    if not alive:
        raise RaylmError(f"Ray at {address} has no machine {node_ip} that is alive")
    command = Path(sys.executable).parent / "ray"
    for node_id in alive:
        done = subprocess.run(
            [str(command), "drain-node", "--address", address, "--node-id", node_id,
             "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away by the cloud",
             "--deadline-remaining-seconds", str(max(round(seconds), 0))],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RaylmError(f"Ray does not drain {node_ip}: {done.stderr.strip() or done.stdout.strip()}")


# --------------------------------------------------------------------------------------------- the clouds


def _aws(place: str) -> float | None:
    token = _ask(f"{place}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    said = _ask(f"{place}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
    if said is None:
        return None
    return _left(datetime.fromisoformat(json.loads(said)["time"]))


def _google(place: str) -> float | None:
    said = _ask(f"{place}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return _GOOGLE_S if said is not None and said.strip() == "TRUE" else None


def _azure(place: str) -> float | None:
    said = _ask(f"{place}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    for event in json.loads(said or "{}").get("Events", []):
        if event["EventType"] == "Preempt":
            # Without a time it is under way.
            return _left(parsedate_to_datetime(event["NotBefore"])) if event.get("NotBefore") else 0.0
    return None


def _left(moment: datetime) -> float:
    return max((moment - datetime.now(UTC)).total_seconds(), 0.0)


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """What a metadata service says; None for what it does not have."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with _OPENER.open(request, timeout=_TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
