"""Chunks that workers die over: after two deaths their rows go one by one; a row that kills twice is an error.

Ray replaces a dead worker and hands it the same chunk for ever. What a worker was about to do is therefore
noted beside the chunk's part before it is done. A worker that hangs is ended by its watchdog, which says so: its chunk
goes row by row at once, and the row that it hung over is an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from raylm.errors import RaylmError
from raylm.inference import watchdog
from raylm.inference.answers import Answer, Output, Row
from raylm.inference.prompts import Prompt
from raylm.storage import StoragePath

STOPPED_WORKER = "the row stopped its worker twice"
HUNG = "the row took longer than {limit_s:g} s"
_WHOLE_TRIES = 2
_ROW_TRIES = 2
_MOST_TRIES = 6


@dataclass
class Tries:
    """How often a chunk was begun, and which of its rows was being answered when a worker died."""

    begun: int = 0
    row: int | None = None
    deaths: dict[int, int] = field(default_factory=dict)
    """Of workers, by the rows that they died over."""
    hung: list[int] = field(default_factory=list)
    """The rows that a worker hung over."""

    @classmethod
    def note_one(cls, place: StoragePath) -> Tries:
        """The tries so far with this one, noted at their place.

        :raises RaylmError: workers die before they come to any row: the model cannot be loaded.
        """
        tries = cls()
        if place.is_file():
            noted = json.loads(place.read_bytes())
            deaths = {int(row): number for row, number in noted["deaths"].items()}
            tries = cls(noted["begun"], noted["row"], deaths, noted["hung"])
        has_hung = watchdog.take_mark(watchdog.mark_of(place))
        if tries.row is not None:
            tries.deaths[tries.row] = tries.deaths.get(tries.row, 0) + 1
            if has_hung:
                tries.hung.append(tries.row)
            tries.row, tries.begun = None, _WHOLE_TRIES
        elif tries.begun >= _MOST_TRIES:
            raise RaylmError(
                f"{tries.begun} workers died before they came to a row of {place.name}: is there memory enough"
                " for the model? What is done is kept, the same command goes on from there"
            )
        elif has_hung:
            tries.begun = max(tries.begun, _WHOLE_TRIES)
        tries.begun += 1
        tries.write(place)
        return tries

    def write(self, place: StoragePath) -> None:
        place.write_bytes(json.dumps(asdict(self)).encode())

    @property
    def is_careful(self) -> bool:
        """Whether the chunk's rows should be answered one by one."""
        return self.begun > _WHOLE_TRIES


def answer_one_by_one(
    answer: Answer, rows: Sequence[Row], prompt: Prompt, tries: Tries, place: StoragePath, limit_s: float
) -> list[Output]:
    """The outputs of a chunk's rows, each noted before it is begun; those that workers do not survive are left out.

    :param limit_s: how long the watchdog waits for a row.
    """
    outputs = []
    for number, row in enumerate(rows):
        if number in tries.hung:
            outputs.append(Output(None, HUNG.format(limit_s=limit_s)))
        elif tries.deaths.get(number, 0) >= _ROW_TRIES:
            outputs.append(Output(None, STOPPED_WORKER))
        else:
            tries.row = number
            tries.write(place)
            watchdog.beat()
            outputs += answer([row], prompt)
    tries.row = None  # what comes now is none of the last row's fault
    tries.write(place)
    return outputs
