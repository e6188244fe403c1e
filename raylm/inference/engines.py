"""Text in, text out: a model run by CTranslate2, and texts answered one by one with their errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from raylm.errors import ArtifactError, first_line
from raylm.inference.convert import converted_model
from raylm.inference.model import ModelInfo
from raylm.sentences import split_text
from raylm.settings import DecodeSettings
from raylm.tasks import TRANSLATE, Task

NULL_TEXT = "null text"
EMPTY_TEXT = "empty text"
INVALID_UNICODE = "text is not valid Unicode"


@dataclass(frozen=True)
class Output:
    """The answer to one text, or why there is none."""

    text: str | None
    error: str | None = None
    truncated: bool = False
    """The input was cut to the longest the model reads, or the answer stopped at the longest it may be."""
    source_tokens: int = 0
    output_tokens: int = 0


Decode = Callable[[Sequence[str], str | None], list[Output]]
"""Texts and a prompt token to their outputs, in order: `Engine.decode`, or a service that hosts one."""


def answer_texts(decode: Decode, task: Task, texts: Sequence[str | None], prompt_token: str | None) -> list[Output]:
    """One output for each text, in order. Translation goes by sentences; null and empty texts are errors.

    A text's answer is truncated when any of its sentences is; its error is the first of theirs.
    """
    documents = [split_text(text or "") if task == TRANSLATE else None for text in texts]
    asked: list[list[str]] = []
    for text, document in zip(texts, documents, strict=True):
        if text is None or not text.strip():
            asked.append([])
        else:
            asked.append([text] if document is None else list(document.sentences))
    outputs = iter(decode(list(chain.from_iterable(asked)), prompt_token) if any(asked) else [])
    answers: list[Output] = []
    for text, document, parts in zip(texts, documents, asked, strict=True):
        if text is None or not text.strip():
            answers.append(Output(None, NULL_TEXT if text is None else EMPTY_TEXT))
            continue
        got = [next(outputs) for _ in parts]
        error = next((part.error for part in got if part.error), None)
        sentences = [(part.text or "").strip() for part in got]
        answers.append(
            Output(
                text=None if error else document.join(sentences) if document else sentences[0],
                error=error,
                truncated=any(part.truncated for part in got),
                source_tokens=sum(part.source_tokens for part in got),
                output_tokens=sum(part.output_tokens for part in got),
            )
        )
    return answers


def compute_type_for(settings: DecodeSettings, device: Literal["cpu", "cuda"]) -> str:
    """What a device computes in: what is set, or int8 on CPUs and float16 on GPUs.

    :raises ArtifactError: the device cannot.
    """
    import ctranslate2

    compute_type = settings.compute_type
    if compute_type == "auto":
        compute_type = "float16" if device == "cuda" else "int8"
    supported = ctranslate2.get_supported_compute_types(device)
    if compute_type not in supported:
        known = ", ".join(t for t in ("float32", "float16", "bfloat16", "int8") if t in supported)
        raise ArtifactError(
            f"decode.compute_type: this {device} cannot compute in '{compute_type}', but in {known}, auto"
        )
    return compute_type


class Engine:
    """A loaded encoder-decoder.

    :param device: where it computes.
    :param threads: CPU threads of one engine batch.
    :raises ArtifactError: the model cannot be converted, or the device cannot compute in the wanted type.
    """

    def __init__(
        self,
        model: ModelInfo,
        settings: DecodeSettings,
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int = 1,
    ) -> None:
        import ctranslate2

        self.model, self.settings = model, settings
        compute_type = compute_type_for(settings, device)
        self._tokenizer = _Tokenizer(model)
        self._translator = ctranslate2.Translator(
            str(converted_model(model, compute_type)),
            device=device,
            compute_type=compute_type,
            inter_threads=1,
            intra_threads=threads,
        )
        self._max_source = min(settings.max_input_tokens or model.max_source_tokens, model.max_positions)
        self._max_target = min(settings.max_output_tokens, model.max_target_tokens)

    def decode(self, texts: Sequence[str], prompt_token: str | None) -> list[Output]:
        """The output of each text, in the order of the texts; identical texts are decoded once.

        Batches hold texts of like length, up to `batch_tokens` padded source tokens. A batch that fails is
        halved until only the failing text has an error. Several threads may call: their batches interleave.

        :raises ArtifactError: the model's vocabulary lacks the prompt token.
        """
        prompt = self._tokenizer.prompt(prompt_token)
        outputs: dict[str, Output] = {}
        sources: list[_Source] = []
        for text in dict.fromkeys(texts):
            ids = self._tokenizer.encode(text)
            if ids is None:
                outputs[text] = Output(None, INVALID_UNICODE)
            else:
                sources.append(self._source(text, prompt, ids))
        sources.sort(key=lambda source: -len(source.tokens))
        for batch in _token_batches(sources, self.settings.batch_tokens):
            for source, output in zip(batch, self._run(batch), strict=True):
                outputs[source.text] = output
        return [outputs[text] for text in texts]

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without task token and end."""
        return len(self._tokenizer.encode(text) or ())

    def _source(self, text: str, prompt: list[int], ids: list[int]) -> _Source:
        before = self._tokenizer.before + prompt
        room = max(self._max_source - len(before) - len(self._tokenizer.after), 1)
        tokens = self._tokenizer.to_tokens(before + ids[:room] + self._tokenizer.after)
        return _Source(text, tokens, cut=len(ids) > room)

    def _run(self, batch: list[_Source]) -> list[Output]:
        try:
            results = self._translator.translate_batch(
                [source.tokens for source in batch],
                beam_size=self.settings.beam_size,
                length_penalty=self.settings.length_penalty,
                no_repeat_ngram_size=self.settings.no_repeat_ngram_size,
                max_input_length=0,
                max_decoding_length=self._max_target,
                return_end_token=True,
            )
        except (RuntimeError, ValueError, MemoryError) as error:
            if len(batch) == 1:
                return [Output(None, f"engine: {first_line(error)}", source_tokens=len(batch[0].tokens))]
            middle = len(batch) // 2
            return self._run(batch[:middle]) + self._run(batch[middle:])
        hypotheses = [result.hypotheses[0] for result in results]
        ended = [bool(tokens) and tokens[-1] == self._tokenizer.end for tokens in hypotheses]
        texts = self._tokenizer.decode(hypotheses)
        return [
            Output(
                text=text,
                truncated=source.cut or not has_end,
                source_tokens=len(source.tokens),
                output_tokens=len(tokens) - has_end,
            )
            for source, text, tokens, has_end in zip(batch, texts, hypotheses, ended, strict=True)
        ]


@dataclass(frozen=True)
class _Source:
    """An encoder input as CTranslate2 reads it: token texts, not ids."""

    text: str
    tokens: list[str]
    cut: bool


def _token_batches(sources: Sequence[_Source], batch_tokens: int) -> Iterator[list[_Source]]:
    """Runs of sources, longest first, whose padded size stays within the budget; never an empty one."""
    start = 0
    while start < len(sources):
        rows = max(batch_tokens // len(sources[start].tokens), 1)
        yield list(sources[start : start + rows])
        start += rows


class _Tokenizer:
    """A model's tokenizer, fast where it has a `tokenizer.json`; special tokens in a text are plain text.

    `before` and `after` are the ids around every text: for raylm's models `</s>` behind it, for others what
    their own tokenizer puts there.
    """

    def __init__(self, model: ModelInfo) -> None:
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
        else:
            from raylm.models import load_tokenizer

            try:
                self._slow = load_tokenizer(str(directory))
            except ImportError as error:
                reason = " ".join(str(error).split())
                raise ArtifactError(f"model {model.where}: its tokenizer needs a package: {reason}") from error
            around = self._slow("").input_ids
            vocabulary = self._slow.get_vocab()
        self._ids: dict[str, int] = vocabulary
        self._tokens = {number: token for token, number in vocabulary.items()}
        self.end = _end_token(directory, self._tokens)
        end_id = self._ids[self.end]
        self.before: list[int] = [] if model.is_ours else [number for number in around if number != end_id]
        self.after: list[int] = [end_id] if model.is_ours or end_id in around else []

    def prompt(self, token: str | None) -> list[int]:
        """The prompt's ids: one, or none.

        :raises ArtifactError: the vocabulary lacks the token.
        """
        if token is not None and token not in self._ids:
            raise ArtifactError(f"the model's tokenizer has no token {token}: it was not made for this task")
        return [] if token is None else [self._ids[token]]

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text alone; None where it holds lone surrogates."""
        try:
            if self._fast is not None:
                return list(self._fast.encode(text, add_special_tokens=False).ids)
            return list(self._slow(text, add_special_tokens=False, split_special_tokens=True).input_ids)
        except (UnicodeEncodeError, TypeError):
            return None

    def to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._tokens[number] for number in ids]

    def decode(self, rows: Sequence[Sequence[str]]) -> list[str]:
        ids = [[self._ids[token] for token in row if token in self._ids] for row in rows]
        if self._fast is not None:
            return list(self._fast.decode_batch(ids, skip_special_tokens=True))
        return list(self._slow.batch_decode(ids, skip_special_tokens=True))


def _end_token(directory: Path, tokens: dict[int, str]) -> str:
    """The token that ends an answer, as the config names it by id."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    end = config.get("eos_token_id")
    number = end[0] if isinstance(end, list) else end
    if number not in tokens:
        raise ArtifactError(f"{directory / 'config.json'}: eos_token_id is {end!r}, not an id of the tokenizer")
    return tokens[number]
