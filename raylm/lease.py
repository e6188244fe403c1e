"""What one process alone may do at a time, on one machine or on many."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raylm.errors import OutputError
from raylm.storage import StoragePath

_RENEWED_EVERY_S = 10.0
_DEAD_AFTER_S = 35.0
_SETTLED_AFTER_S = 2.0


class Taken(OutputError):
    """Another process holds it."""


def held(lock: StoragePath, taken: str) -> AbstractContextManager[Callable[[], None]]:
    """Hold something for the time, by a file that says who does.

    It gives a function that raises `Taken` once another process has taken it over, as from one that slept for too long;
    the end of the context does as well.

    :param lock: the file; on a local or shared disk it is locked, which the system ends with the process; on an object
        store it is a lease that is renewed, and taken over once it has not been for 35 s.
    :param taken: what the error says where another process holds it; `{who}` is that process.
    :raises Taken: another process holds it.
    :raises OutputError: the file cannot be written.
    """
    return _locked(lock.local(), taken) if lock.is_local else _leased(lock, taken)


def _owner() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "id": uuid.uuid4().hex}


def _refusal(taken: str, owner: dict[str, Any]) -> Taken:
    who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
    return Taken(taken.replace("{who}", who))


@contextmanager
def _locked(lock: Path, taken: str) -> Iterator[Callable[[], None]]:
    while True:
        try:
            file = lock.open("a+")
        except OSError as error:
            raise OutputError(f"cannot write {lock}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            text = file.read()
            file.close()
            raise _refusal(taken, json.loads(text) if text else {}) from None
        except OSError as error:
            file.close()
            raise OutputError(f"{lock}: this filesystem has no locks ({error.strerror}); use another") from error
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                break
        file.close()  # its holder has just ended, and removed it
    try:
        file.truncate(0)
        file.write(json.dumps(_owner()))
        file.flush()
        yield lambda: None
    finally:
        lock.unlink(missing_ok=True)
        file.close()


@contextmanager
def _leased(lease: StoragePath, taken: str) -> Iterator[Callable[[], None]]:
    owner = _owner()
    deadline = time.monotonic() + _DEAD_AFTER_S
    found = _read(lease)
    while found:
        if time.monotonic() >= deadline:  # it was not renewed: its holder is dead
            break
        time.sleep(1.0)
        now = _read(lease)
        if now and now != found:
            raise _refusal(taken, now)
        found = now
    lease.write_json(owner)
    time.sleep(_SETTLED_AFTER_S)
    if (now := _read(lease)) and now["id"] != owner["id"]:  # of two that came at once, the later one
        raise _refusal(taken, now)
    ended = threading.Event()
    usurper: list[dict[str, Any]] = []

    def renew() -> None:
        number = 0
        while not ended.wait(_RENEWED_EVERY_S):
            number += 1
            with suppress(OutputError, OSError, ValueError):  # the next time, perhaps
                if (now := _read(lease)) and now["id"] != owner["id"]:  # this process slept for too long
                    usurper.append(now)
                    return
                lease.write_json({**owner, "renewed": number})

    def check() -> None:
        if usurper:
            raise _refusal(taken, usurper[0])

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield check
        check()
    finally:
        ended.set()
        thread.join()
        now = _read(lease)
        if now and now["id"] == owner["id"]:
            lease.delete()


def _read(lease: StoragePath) -> dict[str, Any] | None:
    try:
        return dict(lease.read_json()) if lease.is_file() else None
    except FileNotFoundError:  # it has just been removed
        return None
