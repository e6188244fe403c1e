"""Notices of the clouds are seen when they come, and Ray is told of them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from raylm.cluster import notices
from raylm.errors import RaylmError
from tests.cluster.metadata import Metadata, serving


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(notices, "_TIMEOUT_S", 30.0)
    with serving() as address:
        yield address


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
    answered = notices.notice_of
    asked = 0

    def notice_of(cloud: str, place: str) -> float | None:
        nonlocal asked
        asked += 1
        if asked == 5:
            Metadata.gone_at = datetime.now(UTC) + timedelta(seconds=60)
        return answered(cloud, place if asked > 3 else "http://127.0.0.1:9")  # where nobody listens

    monkeypatch.setattr(notices, "notice_of", notice_of)
    monkeypatch.setattr(notices, "_POLL_S", 0)
    drained: list[float] = []
    said: list[str] = []
    notices.watch("aws", service, drained.append, said.append)
    assert len(drained) == 1 and 55 <= drained[0] <= 60
    assert sum("trying on" in line for line in said) == 1
    assert said[-1].startswith("this machine will be taken away in")


def test_a_machine_whose_head_is_gone_shuts_down(service: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shut = tmp_path / "shut down"
    monkeypatch.setattr(notices, "_SHUT_DOWN", ("touch", str(shut)))
    monkeypatch.setattr(notices, "_POLL_S", 0.05)
    head = socket.create_server(("127.0.0.1", 0))
    place = f"127.0.0.1:{head.getsockname()[1]}"
    said: list[str] = []
    watching = threading.Thread(
        target=notices.watch,
        args=("aws", service, lambda _: None, said.append, notices.Head(place, patience_s=0.5)),
        daemon=True,
    )
    watching.start()
    time.sleep(1.5)
    assert not shut.exists(), "the head is there"
    head.close()
    end = time.monotonic() + 60
    while not shut.exists() and time.monotonic() < end:
        time.sleep(0.05)
    Metadata.gone_at = datetime.now(UTC)  # which ends the watch
    watching.join()
    assert shut.exists() and "this machine shuts down" in " ".join(said)


@pytest.mark.slow
def test_a_head_that_is_away_is_waited_for(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_POLL_S", 0)
    Metadata.gone_at = datetime.now(UTC) + timedelta(seconds=90)
    tries = 0

    def drain(seconds: float) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            notices.drain("127.0.0.1:9", "127.0.0.1", seconds)  # where nobody listens

    said: list[str] = []
    notices.watch("aws", service, drain, said.append)
    assert tries == 2
    assert any(line.startswith("Ray at 127.0.0.1:9 does not answer: ") and "trying on" in line for line in said), said


@pytest.mark.usefixtures("ray_cluster")
def test_a_machine_that_ray_does_not_know_is_named() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    with pytest.raises(RaylmError, match=r"has no machine 127\.9\.9\.9 that is alive"):
        notices.drain(address, "127.9.9.9", 60)
