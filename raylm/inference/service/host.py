"""A replica of the model: its engine, used in turn by online requests, decoded together, and by batch jobs."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any

from pydantic import ValidationError
from ray.serve import metrics

from raylm.errors import RaylmError
from raylm.inference.answers import EMPTY_TEXT, Output, Row, answer_each, answer_rows
from raylm.inference.engines import load_engine
from raylm.inference.engines.text import Device
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Prompt, prompt_for
from raylm.inference.service.gathering import Gathering
from raylm.inference.service.questions import Pieces, Question, Refusal, Reply, cut_at
from raylm.inference.service.replicas import OPEN
from raylm.inference.service.turns import Turns
from raylm.settings import DecodeSettings, ServeSettings
from raylm.storage import fingerprint
from raylm.tasks import TASKS

_PROMPTS = 256
_CHARACTERS_A_TOKEN = 16
"""More than texts have; such a text is not counted to know that it fills a batch."""
_CHARACTERS_OF_A_PART = 3
"""For each token of a batch: about as many as texts have."""


@dataclass(frozen=True)
class _Request:
    """A question that is ready to be decoded."""

    prompt: Prompt
    decode: DecodeSettings
    rows: tuple[Row, ...]
    stop: tuple[str, ...]
    is_seeded: bool
    """Whether the caller chose the seed of what is drawn."""
    tokens: int
    """How much of a batch it is."""
    listen: Callable[[str], bool] | None = None
    """Told all of the only answer so far, from the thread that computes; True: that is enough."""


class ModelHost:
    """One replica of the deployment `model`.

    :param model: its directory, on any storage.
    """

    def __init__(self, settings: ServeSettings, model: str, device: Device) -> None:
        self._model = ModelInfo.load(model)
        self._batch_tokens = min(settings.max_batch_tokens, settings.decode.batch_tokens_on(device))
        self._decode = settings.decode.model_copy(update={"batch_tokens": self._batch_tokens})
        self._fingerprint = fingerprint([self._model.fingerprint, self._decode.model_dump(exclude={"batch_tokens"})])
        engine = load_engine(self._model, settings.decode, device, settings.threads)
        self._turns, self._turn_limit_s = Turns(settings.batch_share), settings.row_limit_s
        self._online = engine.view(self._decode, self._turns.online)
        self._bulk = engine.view(self._decode, self._turns.bulk)
        # Threads apart: chunks of batch jobs never keep an online request waiting for a thread. Of two chunks one is
        # put into batches while the other is computed.
        self._bulk_threads = ThreadPoolExecutor(2)
        self._online_thread = ThreadPoolExecutor(1)
        self._together: Gathering[_Request, list[Output]] = Gathering(
            self._decode_together, attrgetter("tokens"), self._batch_tokens, settings.batch_wait_s
        )
        self._open = 0
        self._prompt_for = lru_cache(_PROMPTS)(self._make_prompt)
        self._tokens = metrics.Counter(
            "raylm_tokens", "Tokens that the model read (source) and wrote (output).", ("kind", "caller")
        )

    # --------------------------------------------------------------------------------- online requests

    async def ask(self, questions: Sequence[Question]) -> list[Reply | Refusal]:
        """The answers to each question, or why there are none; what arrives together is decoded together."""
        with self._opened(len(questions)):
            return await asyncio.gather(*map(self._reply, questions))

    async def _reply(self, question: Question) -> Reply | Refusal:
        try:
            request, outputs = self._request(question), list[Output]()
            for part in self._parts(request):  # one after the other, so that others come in between
                outputs += await self._together.result(part)
            return Reply(self._model.name, outputs)
        except Exception as error:  # is that of this question, and not of others that came with it
            return Refusal.of(error)

    async def stream(self, question: Question) -> AsyncIterator[str | Output]:
        """The pieces of the answer to a question of one row as they are written, and then the whole answer.

        :raises RaylmError: the model cannot do what is asked.
        """
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[str | None]()
        pieces, has_gone = Pieces(question.stop), False

        def listen(text: str) -> bool:
            piece = pieces.of(text)
            if piece:
                loop.call_soon_threadsafe(heard.put_nowait, piece)
            return pieces.is_over or has_gone

        request = replace(self._request(question), listen=listen)
        with self._opened():
            answering = asyncio.ensure_future(self._together.result(request))
            answering.add_done_callback(lambda _: heard.put_nowait(None))
            try:
                while (piece := await heard.get()) is not None:
                    yield piece
                [output] = await answering
                if pieces.is_over:
                    output = replace(output, text=pieces.told, truncated=False)
                elif output.text is not None and (piece := pieces.rest(output.text)):
                    yield piece
                yield output
            finally:  # also where the caller goes away in the middle
                has_gone = True
                answering.cancel()

    def _request(self, question: Question) -> _Request:
        prompt = self._prompt_for(question.task, question.to, question.source_language, question.is_plain)
        decode, is_seeded = self._decode_for(question), "seed" in question.decode
        return _Request(prompt, decode, question.rows, question.stop, is_seeded, self._size(question.rows))

    def _parts(self, request: _Request) -> Iterator[_Request]:
        """A request in pieces of about a batch, however many rows it has."""
        if request.tokens < self._batch_tokens:
            yield request
            return
        rows: list[Row] = []
        characters = 0
        for row in request.rows:
            characters += _characters([row])
            if rows and characters > _CHARACTERS_OF_A_PART * self._batch_tokens:
                yield replace(request, rows=tuple(rows), tokens=self._size(rows))
                rows, characters = [], _characters([row])
            rows.append(row)
        yield replace(request, rows=tuple(rows), tokens=self._size(rows))

    def _make_prompt(self, task: str, to: str | None, source_language: str | None, is_plain: bool) -> Prompt:
        prompt = prompt_for(self._model, TASKS[task], to, source_language)
        return replace(prompt, is_chat=False, template=None) if is_plain else prompt

    def _decode_for(self, question: Question) -> DecodeSettings:
        wanted = dict(question.decode)
        if "max_output_tokens" in wanted:
            wanted["max_output_tokens"] = min(wanted["max_output_tokens"], self._decode.max_output_tokens)
        try:
            return DecodeSettings.model_validate(self._decode.model_dump() | wanted) if wanted else self._decode
        except ValidationError as error:
            raise RaylmError("; ".join(fault["msg"] for fault in error.errors())) from error

    def _size(self, rows: Sequence[Row]) -> int:
        if _characters(rows) > _CHARACTERS_A_TOKEN * self._batch_tokens:
            return self._batch_tokens
        texts = [text for row in rows for text in row if text]
        return min(sum(map(self._online.count_tokens, texts)) + max(len(rows), 1), self._batch_tokens)

    async def _decode_together(self, requests: list[_Request]) -> Sequence[list[Output] | Exception]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._online_thread, self._decode_requests, requests)

    def _decode_requests(self, requests: Sequence[_Request]) -> list[list[Output] | Exception]:
        """The outputs of each request, or why there are none; requests for the same go into the same engine batches."""
        found: list[list[Output] | Exception] = [[] for _ in requests]
        groups: dict[tuple[Prompt, DecodeSettings, bool, bool], list[int]] = {}
        for number, request in enumerate(requests):
            kind = request.prompt, request.decode, request.is_seeded, request.listen is not None
            groups.setdefault(kind, []).append(number)
        for (prompt, decode, is_seeded, is_heard), numbers in groups.items():
            if decode.temperature and not is_seeded:
                decode = decode.model_copy(update={"seed": secrets.randbits(32)})
            asked = [requests[number] for number in numbers]
            try:
                outputs = (self._heard if is_heard else self._whole)(asked, prompt, decode)
            except Exception as error:  # is that of these requests, and not of others that came with them
                for number in numbers:
                    found[number] = error
                continue
            self._count("online", outputs)
            answers = iter(outputs)
            for number in numbers:
                found[number] = [_cut(next(answers), requests[number].stop) for _ in requests[number].rows]
        return found

    def _whole(self, asked: Sequence[_Request], prompt: Prompt, decode: DecodeSettings) -> list[Output]:
        rows = [row for request in asked for row in request.rows]
        return answer_each(partial(answer_rows, self._online.view(decode)), rows, prompt)

    def _heard(self, asked: Sequence[_Request], prompt: Prompt, decode: DecodeSettings) -> list[Output]:
        """The outputs of requests of one row each, whose listeners hear them grow."""
        texts = [request.rows[0][0] or "" for request in asked]
        there = [number for number, text in enumerate(texts) if text.strip()]
        listeners = [asked[number].listen for number in there]
        view = self._online.view(decode, listen=lambda row, text: bool((listen := listeners[row]) and listen(text)))
        answers = iter(answer_rows(view, [(texts[number],) for number in there], prompt))
        return [next(answers) if text.strip() else Output(None, EMPTY_TEXT) for text in texts]

    # -------------------------------------------------------------------------------------- batch jobs

    async def answer(self, rows: Sequence[Row], prompt: Prompt, wanted: str) -> list[Output]:
        """`answer_rows` for a batch job, in turn with online requests.

        :param wanted: the fingerprint that the job began with, as `describe` gave it.
        :raises RaylmError: this is another model, or it decodes otherwise.
        """
        if wanted != self._fingerprint:
            raise RaylmError(
                "the service was given another model or other decode settings meanwhile: it hosts"
                f" {self._model.where} ({self._model.fingerprint}); what is done is kept for those before"
            )
        loop = asyncio.get_running_loop()
        answer = partial(answer_each, partial(answer_rows, self._bulk), rows, prompt)
        with self._opened():
            outputs = await loop.run_in_executor(self._bulk_threads, answer)
        self._count("batch", outputs)
        return outputs

    async def prompt(self, task: str, *asked: str | None) -> Prompt:
        """`prompt_for` with this model, whose files the asking process may not have."""
        return prompt_for(self._model, TASKS[task], *asked)

    async def describe(self) -> dict[str, Any]:
        """The model, how it decodes, the fingerprint of both, and the process that said so."""
        model = asdict(self._model) | {"directory": str(self._model.directory)}
        decode = self._decode.model_dump()
        return {"model": model, "decode": decode, "fingerprint": self._fingerprint, "pid": os.getpid()}

    async def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that has no answer to it.

        :raises RuntimeError: the engine hangs, which nothing interrupts.
        """
        if self._turns.held_s > self._turn_limit_s:
            raise RuntimeError(f"the engine has been at a batch for {self._turns.held_s:.0f} s")

    @contextmanager
    def _opened(self, questions: int = 1) -> Iterator[None]:
        """Counts questions as open for as long as its context lasts."""
        self._open += questions
        try:
            yield
        finally:
            self._open -= questions

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve is told, for `needed`."""
        return {OPEN: float(self._open)}

    def _count(self, caller: str, outputs: Sequence[Output]) -> None:
        for kind in ("source", "output"):
            tokens = sum(getattr(output, f"{kind}_tokens") for output in outputs)
            if tokens:
                self._tokens.inc(tokens, tags={"kind": kind, "caller": caller})


def _characters(rows: Sequence[Row]) -> int:
    return sum(len(text) for row in rows for text in row if text)


def _cut(output: Output, stop: tuple[str, ...]) -> Output:
    if output.text is None or not stop:
        return output
    text, is_over = cut_at(output.text, stop)
    return replace(output, text=text.rstrip(), truncated=False) if is_over else output
