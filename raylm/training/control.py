"""What passes between the driver and the workers of a training: progress one way, requests to pause the other.

To pause is to write a checkpoint after the step at hand and to return. A person asks for it (Ctrl-C, SIGTERM), the
driver does when there are machines for more workers, or one of the workers' is about to be taken away.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from raylm.metrics import SCORE
from raylm.progress import Progress, note

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_LISTEN_EVERY_S = 1.0


class Relay:
    """An actor on the driver's machine, between the driver and the workers."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._fatal: str | None = None
        self._trace: str | None = None
        self._request: str | None = None
        self._is_finished = False
        self._world_size = 0
        self._machines: set[str] = set()

    def push(self, row: dict[str, Any]) -> None:
        """From the first worker: something to show."""
        if "world_size" in row:
            self._world_size = row["world_size"]
        self._rows.append(row)

    def drain(self) -> list[dict[str, Any]]:
        rows, self._rows = self._rows, []
        return rows

    def fail(self, reason: str) -> None:
        """From any worker: an error that trying again would not mend."""
        self._fatal = self._fatal or reason

    def failed(self) -> str | None:
        return self._fatal

    def explain(self, trace: str) -> None:
        """From any worker: the whole trace of what ends it; of a group, the first one is told."""
        self._trace = self._trace or trace

    def trace(self) -> str | None:
        return self._trace

    def finish(self) -> None:
        """From the first worker: the last step is done."""
        self._is_finished = True

    def is_finished(self) -> bool:
        return self._is_finished

    def begin(self) -> None:
        """From the driver: a new group of workers is about to start."""
        self._request, self._world_size = None, 0
        self._machines.clear()

    def join(self, machine: str) -> None:
        """From any worker, at its start: the id of its machine. What ended an earlier group is told no more."""
        self._machines.add(machine)
        self._trace = None

    def machines(self) -> set[str]:
        """Of the group that trains."""
        return self._machines

    def request(self, reason: str) -> None:
        """From the driver: why the workers are to pause."""
        self._request = reason

    def requested(self) -> str | None:
        return self._request

    def world_size(self) -> int:
        """Of the group that trains, or trained last; 0 before the first step."""
        return self._world_size


# ----------------------------------------------------------------------------------------- in a worker


class Attention:
    """Whether to pause, agreed among the workers in the sum over all ranks that each step makes anyway.

    :param relay: of the driver, for the first worker.
    """

    def __init__(self, relay: ActorHandle | None = None) -> None:
        self._request: str | None = None
        if relay is not None:
            threading.Thread(target=self._listen, args=(relay,), daemon=True).start()

    def vote(self) -> bool:
        """Whether this rank knows of a request."""
        return self._request is not None

    def reason(self, votes: int) -> str | None:
        """Why to pause, where any rank knows of a request; which one it is, the first worker can say.

        :param votes: the sum over all ranks.
        """
        return (self._request or "requested") if votes else None

    def _listen(self, relay: ActorHandle) -> None:
        import ray

        while self._request is None:
            time.sleep(_LISTEN_EVERY_S)
            try:
                self._request = ray.get(relay.requested.remote())
            except ray.exceptions.RayError:  # the driver is gone, and so will be this worker
                return


# ----------------------------------------------------------------------------------------- in the driver


class Follower:
    """A thread that shows a relay's rows as progress for as long as its context lasts."""

    def __init__(self, relay: ActorHandle, progress: Progress) -> None:
        self._relay, self._progress = relay, progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._world_size = 0
        self._validation = ""

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        import ray

        finished = False
        while not finished:
            finished = self._stop.wait(0.5)
            try:
                rows = ray.get(self._relay.drain.remote(), timeout=30)
            except ray.exceptions.RayError:  # too busy to answer: training is followed no longer, but goes on
                return
            for row in rows:
                self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        if "note" in row:
            note(row["note"])
        elif "world_size" in row:
            self._show_start(row["step"], row["world_size"])
        elif "validation_loss" in row:
            scores = "".join(f"  {name.split('_')[1]} {row[name]:.1f}" for name in row if name.startswith(SCORE))
            self._validation = f"  validation {row['validation_loss']:.3f}{scores}"
        else:
            detail = f"{row['tokens_per_s']:,.0f} tokens/s  loss {row['loss']:.3f}{self._validation}"
            self._progress.update(row["step"], detail)

    def _show_start(self, step: int, world_size: int) -> None:
        if self._world_size:
            workers = f"{world_size} worker{'s' * (world_size > 1)}"
            note(f"training goes on with {workers} from step {step}")
        self._world_size = world_size
        self._progress.resume_at(step)


@contextmanager
def stopping(relay: ActorHandle) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, after which the workers pause; a second signal interrupts at once.

    Outside the main thread, where Python hears no signals, it stays as it is.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, _: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        relay.request.remote("stop")
        note("stopping: a checkpoint is written after this step; the same signal again stops at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
