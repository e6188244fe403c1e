"""What each step has read: a line for each in the run's `data.jsonl`, to hold one start of a run against another."""

from __future__ import annotations

from typing import Any

from raylm.errors import TrainingError
from raylm.storage import StoragePath

DATA = "data.jsonl"
"""Below a run: `step`, how many `examples` it read, and their `hash`."""


class DataRecord:
    """The record of a run, kept by rank 0; what steps read that come again has to be what they read before.

    :param first_step: that the run continues from.
    """

    def __init__(self, run: StoragePath, first_step: int) -> None:
        self._file = run / DATA
        rows = self._file.read_jsonl()
        self._rows = [row for row in rows if row["step"] <= first_step]
        self._before = {row["step"]: row for row in rows if row["step"] > first_step}

    def add(self, step: int, examples: int, digest: int) -> None:
        """
        :param digest: the sum of the examples' hashes, so that their order in the step does not matter.
        :raises TrainingError: an earlier start of the run read something else in this step.
        """
        row: dict[str, Any] = {"step": step, "examples": examples, "hash": f"{digest:014x}"}
        before = self._before.get(step, row)
        if before != row:
            raise TrainingError(
                f"{self._file}: step {step} read {before['examples']} examples with the hash {before['hash']} before, "
                f"and now {examples} with {row['hash']}: the corpus is not what it was; prepare it again, or remove "
                "the run"
            )
        self._before.pop(step, None)
        self._rows.append(row)

    def publish(self) -> None:
        """Write down what is known; what has not come again is still to be compared when the run starts once more."""
        self._file.write_jsonl([*self._rows, *self._before.values()])
