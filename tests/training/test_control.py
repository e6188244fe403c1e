"""Pauses: who asks for one, and that all workers agree."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import ray

from raylm.training.control import Attention, Relay, stopping

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def relay() -> ray.actor.ActorHandle:
    return ray.remote(num_cpus=0)(Relay).remote()


def test_the_first_worker_hears_a_request_and_votes_for_it(relay: ray.actor.ActorHandle) -> None:
    first, second = Attention(relay), Attention()
    assert not first.vote() and not second.vote()
    assert first.reason(0) is None
    ray.get(relay.request.remote("stop"))
    deadline = time.monotonic() + 20
    while not first.vote():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not second.vote()
    assert (first.reason(1), second.reason(1)) == ("stop", "requested")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_pause_and_a_second_one_interrupts(relay: ray.actor.ActorHandle, number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stopping(relay) as stopped:
        assert not stopped.is_set()
        os.kill(os.getpid(), number)
        assert stopped.wait(5)
        assert ray.get(relay.requested.remote()) == "stop"
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_signals_stay_as_they_are(relay: ray.actor.ActorHandle) -> None:
    seen = []

    def work() -> None:
        with stopping(relay) as stopped:
            seen.append(stopped.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_relay_keeps_the_first_fatal_error(relay: ray.actor.ActorHandle) -> None:
    for reason in ("disk full", "connection closed"):
        ray.get(relay.fail.remote(reason))
    assert ray.get(relay.failed.remote()) == "disk full"


def test_a_relay_keeps_the_first_trace_of_a_group(relay: ray.actor.ActorHandle) -> None:
    for trace in ("no memory", "connection closed"):
        ray.get(relay.explain.remote(trace))
    assert ray.get(relay.trace.remote()) == "no memory"
    ray.get(relay.join.remote("machine"))  # of the group that takes its place
    assert ray.get(relay.trace.remote()) is None
