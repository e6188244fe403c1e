"""Answers that are given again: in user interfaces, catalogs and logs, segments come back all over a job."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from raylm.inference.answers import Decoder, Output
from raylm.inference.prompts import Fields, Prompt

_MOST_BYTES = 8_000_000
"""Of all rows and answers that are remembered."""
_ENTRY_BYTES = 600
"""Of the objects around a row and its answer."""
_LONGEST = 1_000
"""Characters of a row and its answer together; longer ones hardly come again."""


class RememberingEngine:
    """An engine that answers equal rows once, as long as its memory reaches. For one thread."""

    def __init__(self, engine: Decoder, most_bytes: int = _MOST_BYTES) -> None:
        self._engine, self._left = engine, most_bytes
        self._outputs: OrderedDict[tuple[Prompt, Fields], Output] = OrderedDict()

    def decode(self, rows: Sequence[Fields], prompt: Prompt) -> list[Output]:
        """As the engine's own."""
        found: dict[Fields, Output] = {}
        for row in rows:
            output = self._outputs.get((prompt, row))
            if output is not None:
                self._outputs.move_to_end((prompt, row))
                found[row] = output
        new = [row for row in dict.fromkeys(rows) if row not in found]
        for row, output in zip(new, self._engine.decode(new, prompt) if new else [], strict=True):
            found[row] = output
            self._remember((prompt, row), output)
        return [found[row] for row in rows]

    def count_tokens(self, text: str) -> int:
        """As the engine's own."""
        return self._engine.count_tokens(text)

    def room(self, prompt: Prompt) -> int:
        """As the engine's own."""
        return self._engine.room(prompt)

    def _remember(self, key: tuple[Prompt, Fields], output: Output) -> None:
        characters = _characters(key, output)
        if output.error is not None or characters > _LONGEST:
            return
        self._outputs[key] = output
        self._left -= characters + _ENTRY_BYTES
        while self._left < 0:
            oldest, dropped = self._outputs.popitem(last=False)
            self._left += _characters(oldest, dropped) + _ENTRY_BYTES


def _characters(key: tuple[Prompt, Fields], output: Output) -> int:
    return sum(map(len, key[1])) + len(output.text or "")
