"""What engines share that make ids of rows themselves, and the views that several callers have of one loaded model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, Self

from raylm.inference.answers import Output
from raylm.inference.engines.batching import Source, Turn
from raylm.inference.engines.tokenizer import INVALID_UNICODE, Tokenizer
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Fields, Prompt
from raylm.settings import DecodeSettings

Device = Literal["cpu", "cuda"]

Listen = Callable[[int, str], bool]
"""Told the number of a row and all of its answer so far, whenever there is more of it; True: enough of this row."""


class TextEngine:
    """A model's tokenizer and the lengths that it may read and write."""

    def __init__(self, model: ModelInfo, settings: DecodeSettings, device: Device) -> None:
        self.model, self._device = model, device
        self._tokenizer = Tokenizer(model)
        self._turn: Turn = nullcontext
        self._listen: Listen | None = None
        self._decode_by(settings)

    def view(
        self, settings: DecodeSettings | None = None, turn: Turn | None = None, listen: Listen | None = None
    ) -> Self:
        """The same loaded model for another caller.

        :param settings: how it decodes for this caller; what decides how a model is loaded stays as it was.
        :param listen: hears the answers of each call of `decode` grow, from the thread that computes; equal rows have
            answers of their own then. Not with beams, whose answers do not grow word by word.
        """
        view = copy.copy(self)
        if settings is not None:
            view._decode_by(settings)
        view._turn = turn or self._turn
        view._listen = listen
        return view

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without what a prompt puts around it."""
        return self._tokenizer.count(text)

    def room(self, prompt: Prompt) -> int:
        """The most tokens of a text that a prompt leaves room for."""
        return self._max_source - self._tokenizer.around(prompt)

    def _decode_by(self, settings: DecodeSettings) -> None:
        self.settings = settings
        self._batch_tokens = settings.batch_tokens_on(self._device)
        self._max_source, self._max_target = self.model.limits(settings)

    @property
    def _is_distinct(self) -> bool:
        """Whether equal rows have one answer."""
        return not self.settings.temperature and self._listen is None

    def _encoder(self, prompt: Prompt) -> Callable[[Fields], tuple[list[int], bool] | Output]:
        """What `in_batches` makes ids of a row by.

        :raises ArtifactError: the model's vocabulary lacks a token of the prompt.
        """
        self._tokenizer.frame(prompt)

        def encode(fields: Fields) -> tuple[list[int], bool] | Output:
            return self._tokenizer.encode(prompt, fields, self._max_source) or Output(None, INVALID_UNICODE)

        return encode

    def _growing(self, batch: list[Source]) -> GrowingAnswers | None:
        """What tells the listener of a batch's answers, where there is one."""
        if self._listen is None or self.settings.beam_size > 1:
            return None
        return GrowingAnswers(self._tokenizer, batch, self._listen)


class GrowingAnswers:
    """The answers of a batch, token by token."""

    def __init__(self, tokenizer: Tokenizer, batch: list[Source], listen: Listen) -> None:
        self._tokenizer, self._listen = tokenizer, listen
        self._numbers = [int(source.key) for source in batch]  # type: ignore[call-overload]  # as rows are not distinct
        self._ids: list[list[int]] = [[] for _ in batch]

    def add(self, place: int, token: int) -> bool:
        """Whether the row at a place of the batch has enough with this token."""
        if token in self._tokenizer.ends:
            return False
        self._ids[place].append(token)
        [text] = self._tokenizer.decode([self._ids[place]])
        return not text.endswith("\ufffd") and self._listen(self._numbers[place], text)  # half a character waits
