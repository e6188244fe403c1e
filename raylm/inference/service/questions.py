"""What passes between the gateway and the replicas of the model, and how an answer is cut and told piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raylm.errors import RaylmError, first_line
from raylm.inference.answers import Output, Row


@dataclass(frozen=True)
class Question:
    """What a request asks of the model."""

    task: str
    rows: tuple[Row, ...]
    to: str | None = None
    source_language: str | None = None
    is_plain: bool = False
    """Whether the text is to be written on as it stands, and not as a message of a chat."""
    decode: dict[str, Any] = field(default_factory=dict)
    """What it wants otherwise than the service decodes: `temperature`, `top_p`, `top_k`, `max_output_tokens`."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these."""


@dataclass(frozen=True)
class Reply:
    """What a replica says to a question."""

    model: str
    outputs: list[Output]


@dataclass(frozen=True)
class Refusal:
    """Why a replica has no reply: an HTTP status and the reason that the caller is told."""

    status: int
    reason: str

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """What a caller is told of an error: whether it is the caller's own, or the model's."""
        if isinstance(error, RaylmError):
            return cls(400, str(error))
        return cls(500, f"the model failed: {type(error).__name__}: {first_line(error)}")


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of some strings, and whether there is one."""
    ends = [place for place in (text.find(string) for string in stop) if place >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


class Pieces:
    """An answer that grows, as the pieces that have not been told yet.

    Pieces put together are the whole answer: white space around it is left out, and what may be the beginning of a
    string to stop at waits until it is known.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = stop
        self.told = ""
        self.is_over = False
        """Whether the answer has come to a string to stop at."""

    def of(self, text: str) -> str:
        """What is new and sure in all of the answer so far; may be nothing."""
        text, self.is_over = cut_at(text.lstrip(), self._stop)
        text = text.rstrip()
        if not self.is_over:
            text = text[: len(text) - max((_open_end(text, string) for string in self._stop), default=0)]
        return self.rest(text.rstrip())

    def rest(self, text: str) -> str:
        """What is new in the finished answer."""
        if not text.startswith(self.told):  # the tokenizer has read its tokens otherwise than before
            return ""
        new, self.told = text[len(self.told) :], text
        return new


def _open_end(text: str, string: str) -> int:
    """The most characters at a text's end that a string begins with."""
    return next((size for size in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:size])), 0)
