"""Notices of the clouds, from a service of this machine that answers as theirs do; Ray is told of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from raylm.cluster import notices
from raylm.errors import RaylmError


class Metadata(BaseHTTPRequestHandler):
    """What a machine's own metadata service says; `gone_at` is when it will be taken away."""

    gone_at: datetime | None = None

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200, "a-token")

    def do_GET(self) -> None:
        at = self.gone_at
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "a-token":
                self._answer(401, "")
            elif at is None:
                self._answer(404, "")
            else:
                self._answer(200, json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}))
        elif self.path == "/computeMetadata/v1/instance/preempted":
            assert self.headers["Metadata-Flavor"] == "Google"
            self._answer(200, "TRUE" if at else "FALSE")
        elif self.path == "/metadata/scheduledevents?api-version=2020-07-01":
            assert self.headers["Metadata"] == "true"
            events = [{"EventType": "Freeze", "NotBefore": ""}]
            if at:
                events.append({"EventType": "Preempt", "NotBefore": format_datetime(at, usegmt=True)})
            self._answer(200, json.dumps({"DocumentIncarnation": 1, "Events": events}))
        else:
            self._answer(500, "")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    Metadata.gone_at = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("cloud", notices.PLACES)
def test_a_notice_is_seen_when_it_comes(cloud: str, service: str) -> None:
    assert notices.notice_of(cloud, service) is None
    Metadata.gone_at = datetime.now(UTC) + timedelta(seconds=90)
    found = notices.notice_of(cloud, service)
    assert found is not None
    assert 85 <= found <= 90 if cloud != "gcp" else found == 30
    Metadata.gone_at = datetime.now(UTC) - timedelta(seconds=90)
    assert notices.notice_of(cloud, service) == (30 if cloud == "gcp" else 0)


def test_a_watch_goes_on_through_silence_and_drains_once(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = 0

    def pass_time(_: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 3:
            notices_place[0] = service
        if waits == 5:
            Metadata.gone_at = datetime.now(UTC) + timedelta(seconds=60)

    notices_place = ["http://127.0.0.1:9"]  # nobody listens
    monkeypatch.setattr(notices.time, "sleep", pass_time)
    known = notices.notice_of
    monkeypatch.setattr(notices, "notice_of", lambda cloud, _: known(cloud, notices_place[0]))
    drained: list[float] = []
    said: list[str] = []
    notices.watch("aws", service, drained.append, said.append)
    assert len(drained) == 1 and 55 <= drained[0] <= 60
    assert sum("trying on" in line for line in said) == 1
    assert said[-1].startswith("this machine will be taken away in")


@pytest.mark.usefixtures("ray_cluster")
def test_a_machine_that_ray_does_not_know_is_named() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    with pytest.raises(RaylmError, match=r"has no machine 127\.9\.9\.9 that is alive"):
        notices.drain(address, "127.9.9.9", 60)
