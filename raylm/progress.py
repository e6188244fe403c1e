"""What stage a command is in, how far it has come, how fast, and how long it will take."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console

_PLAIN_EVERY_S = 10.0
_REDRAW_EVERY_S = 0.2

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress goes to standard error: standard output belongs to results."""


class Progress:
    """One line for a piece of work: redrawn in place on a terminal, repeated now and then in a log.

    :param stage: its name, such as `pretrain`.
    :param total: units of the whole work; 0 where nobody knows.
    :param unit: what is counted, such as `rows` or `steps`.
    """

    def __init__(self, stage: str, total: float, unit: str) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._done = 0.0
        self._skipped = 0.0
        self._detail = ""
        self._start = time.monotonic()
        self._printed = self._start

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._print(final=True)
        elif console.is_terminal:
            console.file.write("\n")

    def update(self, done: float, detail: str = "", total: float | None = None) -> None:
        """Note how far the work is, in units, and what else is worth saying, such as `loss 3.21`."""
        if total is not None:
            self._total = total
        self._done, self._detail = done, detail
        now = time.monotonic()
        if now - self._printed >= (_REDRAW_EVERY_S if console.is_terminal else _PLAIN_EVERY_S):
            self._printed = now
            self._print()

    def resume_at(self, done: float) -> None:
        """Begin at `done` units that an earlier run finished; they do not count into the speed."""
        self._done = self._skipped = done
        self._start = time.monotonic()

    def predicted_s(self, done: float) -> float | None:
        """How long this run will have taken at its end, told when `done` units are; None where nobody knows."""
        seconds = time.monotonic() - self._start
        speed = (done - self._skipped) / max(seconds, 1e-6)
        return seconds + (self._total - done) / speed if speed > 0 and self._total else None

    def line(self, final: bool = False) -> str:
        """The progress as one line of text."""
        seconds = max(time.monotonic() - self._start, 1e-6)
        speed = (self._done - self._skipped) / seconds
        parts = [f"{self._stage:<16}"]
        if final:
            parts.append(f"done  {self._done:,.0f} {self._unit} in {duration(seconds)}")
        elif self._total:
            share = min(self._done / self._total, 1.0)
            bar = "━" * round(20 * share)
            parts.append(f"{bar:<20} {share:4.0%}  {self._done:,.0f}/{self._total:,.0f} {self._unit}")
        else:
            parts.append(f"{self._done:,.0f} {self._unit}")
        if speed > 0:
            parts.append(f"{speed:,.1f} {self._unit}/s" if speed < 100 else f"{speed:,.0f} {self._unit}/s")
            if self._total and not final:
                parts.append(f"{duration((self._total - self._done) / speed)} left")
        if self._detail:
            parts.append(self._detail)
        return "  ".join(parts)

    def _print(self, final: bool = False) -> None:
        text = self.line(final)
        if console.is_terminal:
            width = console.width - 1
            console.file.write(f"\r\x1b[2K{text[:width]}" + ("\n" if final else ""))
            console.file.flush()
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201


def note(text: str) -> None:
    """Say one line to the person who watches."""
    console.print(text, markup=False)


@contextmanager
def hushed(logger: str, level: int) -> Iterator[None]:
    """What a library says below a level, not shown for what is done inside."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(level)
    try:
        yield
    finally:
        found.setLevel(before)


def duration(seconds: float) -> str:
    """Seconds as a person says them: `8 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
