"""What engines share that make ids of rows themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from raylm.inference.answers import Output
from raylm.inference.engines.tokenizer import INVALID_UNICODE, Tokenizer
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Fields, Prompt
from raylm.settings import DecodeSettings

Device = Literal["cpu", "cuda"]


class TextEngine:
    """A model's tokenizer and the lengths that it may read and write."""

    def __init__(self, model: ModelInfo, settings: DecodeSettings) -> None:
        self.model, self.settings = model, settings
        self._tokenizer = Tokenizer(model)
        self._max_source, self._max_target = model.limits(settings)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without what a prompt puts around it."""
        return self._tokenizer.count(text)

    def room(self, prompt: Prompt) -> int:
        """The most tokens of a text that a prompt leaves room for."""
        return self._max_source - self._tokenizer.around(prompt)

    def _encoder(self, prompt: Prompt) -> Callable[[Fields], tuple[list[int], bool] | Output]:
        """What `in_batches` makes ids of a row by.

        :raises ArtifactError: the model's vocabulary lacks a token of the prompt.
        """
        self._tokenizer.frame(prompt)

        def encode(fields: Fields) -> tuple[list[int], bool] | Output:
            return self._tokenizer.encode(prompt, fields, self._max_source) or Output(None, INVALID_UNICODE)

        return encode
