"""A process that answers nothing for too long ends itself: what hangs in C++ cannot be interrupted in another way.

The clock is a thread of Python's faulthandler, which runs whatever the interpreter does; before the end it writes down
where each thread stood. Workers alone are watched: anywhere else `beat` does nothing.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

from raylm.storage import StoragePath, fingerprint

_BROKEN = 70
"""The exit code of a process that cannot go on."""

_watch: tuple[float, TextIO] | None = None
"""Seconds from one beat to the next, and what the traces are written to."""


@contextmanager
def watching(limit_s: float, mark: Path) -> Iterator[None]:
    """Watch this process meanwhile.

    :param limit_s: from one beat to the next.
    :param mark: is there afterwards, with the traces, where the process was ended by this.
    """
    global _watch
    with mark.open("w") as file:
        _watch = (limit_s, file)
        beat()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _watch = None
    mark.unlink(missing_ok=True)


def beat() -> None:
    """Something was answered: wait for the next for the whole time again."""
    if _watch:
        limit_s, file = _watch
        faulthandler.dump_traceback_later(limit_s, exit=True, file=file)


def end(reason: str) -> NoReturn:
    """End this process: another one is started in its place, and does what it was doing."""
    sys.stderr.write(f"raylm: {reason}\n")
    sys.stderr.flush()
    os._exit(_BROKEN)


def mark_of(place: StoragePath) -> Path:
    """Where work that is noted at a place leaves word that its process hung: beside the note where that is a disk."""
    if place.is_local:
        return place.local().with_suffix(".hung")
    return Path(tempfile.gettempdir()) / f"raylm-hung-{os.getuid()}-{fingerprint(place.uri)}"


def take_mark(mark: Path) -> bool:
    """Whether the process that worked on this before hung; the mark is gone afterwards."""
    hung = mark.is_file() and mark.stat().st_size > 0
    mark.unlink(missing_ok=True)
    return hung
