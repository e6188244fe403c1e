"""Chunks that workers die over: after two deaths their rows go one by one; a row that kills twice is an error.

Ray replaces a dead worker and hands it the same chunk for ever. What a worker was about to do is therefore
noted beside the chunk's part before it is done.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from raylm.errors import RaylmError
from raylm.inference.engines import Decode, Output, answer_texts
from raylm.storage import StoragePath
from raylm.tasks import Task

STOPPED_WORKER = "the row stopped its worker twice"
_WHOLE_TRIES = 2
_MOST_TRIES = 6


@dataclass
class Tries:
    """How often a chunk was begun, and which of its rows was being answered when a worker died."""

    begun: int = 0
    row: int | None = None
    deaths: dict[int, int] = field(default_factory=dict)

    @classmethod
    def note_one(cls, place: StoragePath) -> Tries:
        """The tries so far with this one, noted at their place.

        :raises RaylmError: workers die before they come to any row: the model cannot be loaded.
        """
        tries = cls()
        if place.is_file():
            noted = json.loads(place.read_bytes())
            tries = cls(noted["begun"], noted["row"], {int(row): n for row, n in noted["deaths"].items()})
        if tries.row is not None:
            tries.deaths[tries.row] = tries.deaths.get(tries.row, 0) + 1
            tries.row, tries.begun = None, _WHOLE_TRIES
        elif tries.begun >= _MOST_TRIES:
            raise RaylmError(
                f"{tries.begun} workers died before they came to a row of {place.name}: is there memory enough"
                " for the model? What is done is kept, the same command goes on from there"
            )
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
    decode: Decode,
    task: Task,
    texts: Sequence[str | None],
    prompt_token: str | None,
    tries: Tries,
    place: StoragePath,
) -> list[Output]:
    """The outputs of a chunk's texts, each noted before it is begun; those that killed twice are left out."""
    outputs = []
    for row, text in enumerate(texts):
        if tries.deaths.get(row, 0) >= 2:
            outputs.append(Output(None, STOPPED_WORKER))
            continue
        tries.row = row
        tries.write(place)
        outputs += answer_texts(decode, task, [text], prompt_token)
    return outputs
