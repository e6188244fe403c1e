"""Notices of the clouds are seen when they come, and Ray is told of them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from raylm.cluster import notices
from raylm.errors import RaylmError
from tests.cluster.metadata import Metadata, serving


@pytest.fixture
def service() -> Iterator[str]:
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


@pytest.mark.usefixtures("ray_cluster")
def test_a_machine_that_ray_does_not_know_is_named() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    with pytest.raises(RaylmError, match=r"has no machine 127\.9\.9\.9 that is alive"):
        notices.drain(address, "127.9.9.9", 60)
