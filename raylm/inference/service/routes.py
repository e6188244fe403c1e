"""The HTTP API: routes that make a question of a request and a response of the reply."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from raylm import __version__
from raylm.inference.answers import Output, Row
from raylm.inference.service.bodies import (
    Answer,
    AnswerRequest,
    AnswerResponse,
    ClassifyResponse,
    GenerateRequest,
    GenerateResponse,
    Label,
    SummarizeResponse,
    TextRequest,
    TranslateRequest,
    TranslateResponse,
    listed,
)
from raylm.inference.service.door import Door, Limits, Turned, refusal
from raylm.inference.service.keys import KeyFile
from raylm.inference.service.openai import Completion, CompletionRequest
from raylm.inference.service.questions import Question, Reply
from raylm.settings import ServeSettings
from raylm.tasks import ANSWER, CLASSIFY, GENERATE, SUMMARIZE, TRANSLATE

_PAGE = Path(__file__).parent / "page.html"


@dataclass(frozen=True)
class Card:
    """What people are told of the model."""

    name: str
    fingerprint: str
    tasks: tuple[str, ...]
    languages: tuple[str, ...]
    made: int
    """When the service was started with it, in seconds since 1970."""

    def as_listed(self) -> dict[str, Any]:
        """As OpenAI lists models, with what is ours beside."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.made,
            "owned_by": "raylm",
            "fingerprint": self.fingerprint,
            "tasks": list(self.tasks),
            "languages": list(self.languages),
        }


class Model(Protocol):
    """Whom the routes ask."""

    card: Card

    async def ask(self, question: Question) -> Reply:
        """The reply, or `Turned` with the reason why there is none."""
        ...

    def stream(self, question: Question) -> AsyncIterator[str | Output]:
        """The pieces of an answer, and then the whole."""
        ...

    async def is_ready(self) -> bool:
        """Whether a request would be answered."""
        ...


def build_api(model: Model, settings: ServeSettings, keys: KeyFile | None) -> FastAPI:
    """The application, with the door in front of it."""
    api = FastAPI(title="raylm", version=__version__, docs_url="/docs", redoc_url=None)
    limits, html = Limits(settings), _PAGE.read_text(encoding="utf-8")
    api.add_middleware(Door, settings=settings, keys=keys, limits=limits)

    @api.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        """422 with one readable sentence for each fault, in place of pydantic's records."""
        faults = [f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        return refusal(request.url.path, 422, "; ".join(faults))

    @api.exception_handler(Turned)
    async def turn(request: Request, turned: Turned) -> JSONResponse:
        return refusal(request.url.path, turned.status, turned.reason, turned.headers)

    def count(request: Request, question: Question) -> None:
        most, rows = settings.max_request_texts, len(question.rows)
        if rows > most:
            raise Turned(413, f"{rows} texts in a request; {most} are allowed, send several requests")
        limits.take(request.state.caller, request.state.key, "texts", rows)

    async def ask(request: Request, question: Question) -> Reply:
        count(request, question)
        return await model.ask(question)

    # ------------------------------------------------------------------------------------ tasks

    @api.post("/v1/translate")
    async def translate(body: TranslateRequest, request: Request) -> TranslateResponse:
        reply = await ask(request, Question(TRANSLATE.name, _rows(body.text), body.to, body.source_language))
        return TranslateResponse(model=reply.model, translations=list(map(Answer.of, reply.outputs)))

    @api.post("/v1/summarize")
    async def summarize(body: TextRequest, request: Request) -> SummarizeResponse:
        reply = await ask(request, Question(SUMMARIZE.name, _rows(body.text)))
        return SummarizeResponse(model=reply.model, summaries=list(map(Answer.of, reply.outputs)))

    @api.post("/v1/generate", response_model=GenerateResponse)
    async def generate(body: GenerateRequest, request: Request) -> GenerateResponse | StreamingResponse:
        question = Question(
            GENERATE.name,
            _rows(body.text),
            decode=body.decode(body.max_output_tokens),
            stop=tuple(listed(body.stop)),
        )
        if not body.stream:
            reply = await ask(request, question)
            return GenerateResponse(model=reply.model, generated=list(map(Answer.of, reply.outputs)))
        if len(question.rows) != 1:
            raise Turned(400, f"stream: {len(question.rows)} texts; one at a time can be streamed")
        count(request, question)
        return _events(await _begun(model.stream(question)), _generate_events)

    @api.post("/v1/classify")
    async def classify(body: TextRequest, request: Request) -> ClassifyResponse:
        reply = await ask(request, Question(CLASSIFY.name, _rows(body.text)))
        return ClassifyResponse(model=reply.model, labels=list(map(Label.of, reply.outputs)))

    @api.post("/v1/answer")
    async def answer(body: AnswerRequest, request: Request) -> AnswerResponse:
        questions, contexts = listed(body.question), listed(body.context)
        if isinstance(body.context, str):
            contexts *= len(questions)
        if len(questions) != len(contexts):
            raise Turned(422, f"{len(questions)} questions and {len(contexts)} contexts; give as many, or one")
        reply = await ask(request, Question(ANSWER.name, tuple(zip(questions, contexts, strict=True))))
        return AnswerResponse(model=reply.model, answers=list(map(Answer.of, reply.outputs)))

    # ----------------------------------------------------------------------------------- OpenAI

    @api.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> dict[str, Any] | StreamingResponse:
        if body.model != model.card.name:
            raise Turned(404, f"model {body.model!r} is not here; {model.card.name!r} is")
        question = body.question()
        if not body.stream:
            reply = await ask(request, question)
            return Completion(reply.model).whole(reply.outputs)
        count(request, question)
        completion = Completion(body.model)
        with_usage = bool((body.stream_options or {}).get("include_usage"))
        return _events(
            await _begun(model.stream(question)), lambda answer: _completion_events(answer, completion, with_usage)
        )

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model.card.as_listed()]}

    @api.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model.card.name:
            raise Turned(404, f"model {name!r} is not here; {model.card.name!r} is")
        return model.card.as_listed()

    # -------------------------------------------------------------------------------- the rest

    @api.get("/healthz")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def ready() -> JSONResponse:
        """The model is loaded, or would be for a request."""
        is_ready = await model.is_ready()
        told = {"status": "ready" if is_ready else "loading", "model": model.card.name}
        return JSONResponse(told | {"fingerprint": model.card.fingerprint}, 200 if is_ready else 503)

    @api.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """A page to try it."""
        return HTMLResponse(html)

    return api


def _rows(text: str | list[str]) -> tuple[Row, ...]:
    return tuple((one,) for one in listed(text))


# ------------------------------------------------------------------------------------- streamed answers


async def _begun(answer: AsyncIterator[str | Output]) -> AsyncIterator[str | Output]:
    """The same answer, once there is something of it: what fails before can still be told by a status."""
    first = await anext(answer)

    async def whole() -> AsyncIterator[str | Output]:
        yield first
        async for piece in answer:
            yield piece

    return whole()


def _events(answer: AsyncIterator[str | Output], events: Any) -> StreamingResponse:
    """A response of server-sent events, each the JSON of what `events` makes of the answer."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events(answer):
                yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
        except Turned as turned:  # the status has been sent
            yield f"data: {json.dumps({'error': {'message': turned.reason}})}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _generate_events(answer: AsyncIterator[str | Output]) -> AsyncIterator[dict[str, Any]]:
    async for piece in answer:
        if isinstance(piece, str):
            yield {"text": piece}
        else:
            yield {"done": True, "truncated": piece.truncated, "error": piece.error}


async def _completion_events(
    answer: AsyncIterator[str | Output], completion: Completion, with_usage: bool
) -> AsyncIterator[dict[str, Any] | str]:
    async for piece in answer:
        if isinstance(piece, str):
            yield completion.piece(piece)
        elif piece.error is not None:
            raise Turned(400, piece.error)
        else:
            yield completion.end(piece)
            if with_usage:
                yield completion.usage(piece)
    yield "[DONE]"
