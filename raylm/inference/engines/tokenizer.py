"""What a row becomes for a model: the ids of its text, with all that a prompt puts around them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from raylm.errors import ArtifactError, first_line
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Fields, Prompt

INVALID_UNICODE = "text is not valid Unicode"
_MARK = "\ue000"
"""Stands for the user's message while a chat's frame is made; of Unicode's private use."""


class Tokenizer:
    """A model's tokenizer, fast where it has a `tokenizer.json`; special tokens in a text are plain text."""

    def __init__(self, model: ModelInfo) -> None:
        self._model = model
        directory = model.directory
        self._fast: Any = None
        self._slow: Any = None
        if (directory / "tokenizer.json").is_file():
            import tokenizers

            self._fast = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
            self._fast.no_truncation()
            self._fast.no_padding()
            around = self._fast.encode("", add_special_tokens=True).ids
            self._fast.encode_special_tokens = True
            vocabulary = self._fast.get_vocab(with_added_tokens=True)
            self._special = [token.content for token in self._fast.get_added_tokens_decoder().values() if token.special]
        else:
            self._slow = self._of_transformers()
            around = self._slow("").input_ids
            vocabulary = self._slow.get_vocab()
            self._special = list(self._slow.all_special_tokens)
        self._ids: dict[str, int] = vocabulary
        self._tokens = {number: token for token, number in vocabulary.items()}
        self.ends = _end_ids(directory, self._tokens)
        """The ids that end an answer, the usual one first."""
        self._before = [number for number in around if number not in self.ends]
        self._has_end = self.ends[0] in around
        self._frames: dict[Prompt, tuple[list[int], list[int]]] = {}
        self._chats: dict[str | None, tuple[str, str]] = {}
        """By the system message."""

    def encode(self, prompt: Prompt, fields: Fields, room: int) -> tuple[list[int], bool] | None:
        """The ids of a row and whether some of its text was cut away to fit; None where that is no valid Unicode.

        :param room: the most ids; those of words and tokens around the text are never cut.
        :raises ArtifactError: the vocabulary lacks a token of the prompt, or the prompt alone is too long.
        """
        before, after = self.frame(prompt)
        room -= len(before) + len(after)
        if prompt.template is None and not prompt.is_chat:
            ids = self._plain_ids(fields[0])
            return None if ids is None else (before + ids[: max(room, 1)] + after, len(ids) > max(room, 1))
        was_cut = False
        while (ids := self._worded_ids(prompt, fields)) is not None and len(ids) > room:
            was_cut, longest = True, max(range(len(fields)), key=lambda number: len(fields[number]))
            kept = int(len(fields[longest]) * room / len(ids)) - 1
            if kept < 1:
                raise ArtifactError(f"the prompt alone takes up the {room} tokens that model {self._model.where} reads")
            fields = (*fields[:longest], fields[longest][:kept], *fields[longest + 1 :])
        return None if ids is None else (before + ids + after, was_cut)

    def frame(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """The ids before and behind every text."""
        if prompt not in self._frames:
            self._frames[prompt] = self._frame(prompt)
        return self._frames[prompt]

    def around(self, prompt: Prompt) -> int:
        """How many tokens stand around a row's text, words of the prompt included."""
        nothing = ("",) * len(prompt.fields)
        if prompt.template is None and not prompt.is_chat:
            return sum(map(len, self.frame(prompt)))
        return len(self._worded_ids(prompt, nothing) or ()) + sum(map(len, self.frame(prompt)))

    def _frame(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        end = [self.ends[0]]
        token = [] if prompt.token is None else [self.id_of(prompt.token)]
        if prompt.is_chat:
            return [], []  # all is in the template
        if self._model.is_ours and self._model.kind != "classifier":
            return token, end if token else []  # without a task it goes on writing
        if prompt.source_code is not None:
            code = [self.id_of(prompt.source_code)]
            return ([], end + code) if self._puts_code_last else (code, end)
        return self._before + token, end if self._has_end and self._model.kind != "decoder" else []

    def id_of(self, token: str) -> int:
        """:raises ArtifactError: the vocabulary lacks it."""
        if token not in self._ids:
            raise ArtifactError(
                f"model {self._model.where}: its tokenizer has no token {token}: it was not made for this task"
            )
        return self._ids[token]

    def to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._tokens[number] for number in ids]

    def to_ids(self, tokens: Sequence[str]) -> list[int]:
        """The ids of tokens; what is not in the vocabulary (padding of a model's output layer) is left out."""
        return [self._ids[token] for token in tokens if token in self._ids]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of ids, without special tokens."""
        if self._fast is not None:
            return list(self._fast.decode_batch([list(row) for row in rows], skip_special_tokens=True))
        return list(self._slow.batch_decode(rows, skip_special_tokens=True))

    def count(self, text: str) -> int:
        """Tokens of a text alone."""
        return len(self._plain_ids(text) or ())

    # ---------------------------------------------------------------------------------------- parts

    def _plain_ids(self, text: str) -> list[int] | None:
        return self._tried(
            lambda: (
                self._fast.encode(text, add_special_tokens=False).ids
                if self._fast is not None
                else self._slow(text, add_special_tokens=False, split_special_tokens=True).input_ids
            )
        )

    def _parsed_ids(self, text: str) -> list[int] | None:
        """The ids of a text in which special tokens are meant as such."""
        if self._fast is None:
            return self._tried(lambda: self._slow(text, add_special_tokens=False).input_ids)
        return self._tried(lambda: self._parser.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _parser(self) -> Any:
        """Another fast tokenizer: threads share the one whose special tokens are plain text."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self._fast.to_str())

    @staticmethod
    def _tried(encode: Callable[[], Sequence[int]]) -> list[int] | None:
        try:
            return list(encode())
        except (UnicodeEncodeError, TypeError):  # a lone surrogate
            return None

    def _worded_ids(self, prompt: Prompt, fields: Fields) -> list[int] | None:
        text = prompt.text(fields)
        if not prompt.is_chat:
            return self._plain_ids(text)
        before, after = self._chat(prompt)
        if not any(token in text for token in self._special):
            return self._parsed_ids(before + text + after)
        ids = self._plain_ids(text)  # what a row says must not speak for the model, or end its own turn
        return None if ids is None else (self._parsed_ids(before) or []) + ids + (self._parsed_ids(after) or [])

    def _chat(self, prompt: Prompt) -> tuple[str, str]:
        """What the model's chat template puts before and behind the user's message."""
        if prompt.system not in self._chats:
            messages = [{"role": "user", "content": _MARK}]
            if prompt.system is not None:
                messages.insert(0, {"role": "system", "content": prompt.system})
            try:
                text = self._of_transformers().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template is a program of its own
                reason = first_line(error)
                raise ArtifactError(f"model {self._model.where}: its chat template fails: {reason}") from error
            before, _, after = text.partition(_MARK)
            self._chats[prompt.system] = before, after
        return self._chats[prompt.system]

    def _of_transformers(self) -> Any:
        from raylm.models import load_tokenizer

        return load_tokenizer(str(self._model.directory))

    @property
    def _puts_code_last(self) -> bool:
        """Whether the source's language stands behind the text: in mBART's first models (Liu et al. 2020)."""
        file = self._model.directory / "tokenizer_config.json"
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return self._model.model_type == "mbart" and said.get("tokenizer_class") != "MBart50Tokenizer"


def _end_ids(directory: Path, tokens: dict[int, str]) -> list[int]:
    """The ids that end an answer, as the model's generation config names them, or its config; an encoder's separator.

    :raises ArtifactError: they are none of the tokenizer's.
    """
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        said = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        if said is not None:
            ends = said if isinstance(said, list) else [said]
            if any(number not in tokens for number in ends):
                raise ArtifactError(f"{file}: eos_token_id is {said!r}, not an id of the tokenizer")
            return ends
    from raylm.models import load_tokenizer

    end = load_tokenizer(str(directory)).eos_token_id
    if end is None:
        raise ArtifactError(f"{directory / 'config.json'}: eos_token_id is missing; an id of the tokenizer is expected")
    return [end]
