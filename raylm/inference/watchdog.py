"""A process that answers nothing for too long ends itself: what hangs in C++ cannot be interrupted in another way.

The clock is a thread of Python's faulthandler, which runs whatever the interpreter does; before the end it writes down
where each thread stood. Workers alone are watched: anywhere else `beat` does nothing.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
from pathlib import Path
from typing import TextIO

_watch: tuple[float, TextIO] | None = None
"""Seconds from one beat to the next, and what the traces are written to."""


def start(limit_s: float, mark: Path) -> None:
    """Watch this process from now on, until `stop`.

    :param mark: is not empty afterwards where the process was ended by this.
    """
    global _watch
    _watch = (limit_s, mark.open("w"))
    beat()


def beat() -> None:
    """Something was answered: wait for the next for the whole time again."""
    if _watch:
        limit_s, file = _watch
        faulthandler.dump_traceback_later(limit_s, exit=True, file=file)


def stop() -> None:
    """Watch no longer."""
    global _watch
    if _watch:
        faulthandler.cancel_dump_traceback_later()
        _watch[1].close()
        Path(_watch[1].name).unlink(missing_ok=True)
        _watch = None


def mark_of(key: str) -> Path:
    """Where a piece of work leaves word on this machine that its process hung."""
    return Path(tempfile.gettempdir()) / f"raylm-hung-{os.getuid()}-{key}"


def take_mark(mark: Path) -> bool:
    """Whether the process that worked on this before hung; the mark is gone afterwards."""
    hung = mark.is_file() and mark.stat().st_size > 0
    mark.unlink(missing_ok=True)
    return hung
