"""The service: a model's engine behind HTTP on Ray Serve, for people online and for batch jobs that share it.

`POST /v1/translate {"text": "…" or ["…"], "to": "de"}`, `/v1/summarize {"text": …}`, `/v1/generate {"text": …}`,
`/v1/classify {"text": …}`, `/v1/answer {"question": …, "context": …}`; `GET /healthz`, `GET /readyz`. Texts of requests
that arrive together are decoded together.
"""

# No postponed annotations here: FastAPI reads the routes' types again in the replica, which lacks their names.

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import ray
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from raylm import tasks  # the module: a replica gets copies of this module's globals, not the same objects
from raylm.errors import RaylmError
from raylm.inference.address import forget_service, note_service
from raylm.inference.answers import Answer as AnswerRows
from raylm.inference.answers import Output, Row, answer_rows
from raylm.inference.engines import check_engine, load_engine
from raylm.inference.model import ModelInfo, absolute
from raylm.inference.prompts import Prompt, prompt_for
from raylm.settings import DecodeSettings, ServeSettings, Settings
from raylm.tasks import Task

APPLICATION = "raylm"
_RETRY_AFTER_S = "1"
_REQUEST_TIMEOUT_S = 3_600.0  # of a batch job's chunk, which may wait behind others


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextRequest(Asked):
    text: str | list[str]


class TranslateRequest(TextRequest):
    to: str | None = None
    """The target language; may be left out where the model has one."""
    source_language: str | None = Field(default=None, alias="from")
    """For models that know several."""


class AnswerRequest(Asked):
    question: str | list[str]
    context: str | list[str]
    """As many as there are questions, or one for all."""


class Answer(BaseModel):
    text: str | None
    truncated: bool
    error: str | None


class Label(BaseModel):
    label: str | None
    score: float | None
    truncated: bool
    error: str | None


class TranslateResponse(BaseModel):
    model: str
    translations: list[Answer]


class SummarizeResponse(BaseModel):
    model: str
    summaries: list[Answer]


class GenerateResponse(BaseModel):
    model: str
    generated: list[Answer]


class ClassifyResponse(BaseModel):
    model: str
    labels: list[Label]


class AnswerResponse(BaseModel):
    model: str
    answers: list[Answer]


api = FastAPI(title="raylm", docs_url="/docs", redoc_url=None)


@api.exception_handler(RequestValidationError)  # type: ignore[untyped-decorator]
async def _explain(_: Request, error: RequestValidationError) -> JSONResponse:
    """422 with one readable sentence for each fault, in place of pydantic's records."""
    faults = [f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
    return JSONResponse({"detail": "; ".join(faults)}, status_code=422)


def _row_count(requests: Sequence[tuple[list[Row], Prompt]]) -> int:
    return sum(max(len(rows), 1) for rows, _ in requests)


def _listed(text: str | list[str]) -> list[str]:
    return [text] if isinstance(text, str) else text


def _answer(output: Output) -> Answer:
    return Answer(text=output.text, truncated=output.truncated, error=output.error)


@serve.deployment  # which pickles the class here: what it calls stands above
@serve.ingress(api)
class Service:
    """One replica: an engine, HTTP routes over it, and two methods for callers with a deployment handle."""

    def __init__(self, settings: ServeSettings, model: str, device: Literal["cpu", "cuda"]) -> None:
        self._settings = settings
        self._model = ModelInfo.load(model)
        self._engine = load_engine(self._model, settings.decode, device)
        self._open_requests = 0
        # Threads apart: chunks of batch jobs never keep an online request waiting for a thread. The engine takes
        # the batches of all threads in turn.
        self._online, self._bulk = ThreadPoolExecutor(1), ThreadPoolExecutor(2)
        self._decode_together.set_max_batch_size(settings.max_batch_texts)
        self._decode_together.set_batch_wait_timeout_s(settings.batch_wait_s)

    # --------------------------------------------------------------------------------------- HTTP

    @api.post("/v1/translate")  # type: ignore[untyped-decorator]
    async def translate(self, request: TranslateRequest) -> TranslateResponse:
        prompt = self._prompt(tasks.TRANSLATE, request.to, request.source_language)
        outputs = await self._answer([(text,) for text in _listed(request.text)], prompt)
        return TranslateResponse(model=self._model.name, translations=[_answer(output) for output in outputs])

    @api.post("/v1/summarize")  # type: ignore[untyped-decorator]
    async def summarize(self, request: TextRequest) -> SummarizeResponse:
        outputs = await self._answer([(text,) for text in _listed(request.text)], self._prompt(tasks.SUMMARIZE))
        return SummarizeResponse(model=self._model.name, summaries=[_answer(output) for output in outputs])

    @api.post("/v1/generate")  # type: ignore[untyped-decorator]
    async def generate(self, request: TextRequest) -> GenerateResponse:
        outputs = await self._answer([(text,) for text in _listed(request.text)], self._prompt(tasks.GENERATE))
        return GenerateResponse(model=self._model.name, generated=[_answer(output) for output in outputs])

    @api.post("/v1/classify")  # type: ignore[untyped-decorator]
    async def classify(self, request: TextRequest) -> ClassifyResponse:
        outputs = await self._answer([(text,) for text in _listed(request.text)], self._prompt(tasks.CLASSIFY))
        labels = [Label(label=o.text, score=o.score, truncated=o.truncated, error=o.error) for o in outputs]
        return ClassifyResponse(model=self._model.name, labels=labels)

    @api.post("/v1/answer")  # type: ignore[untyped-decorator]
    async def answer_questions(self, request: AnswerRequest) -> AnswerResponse:
        questions, contexts = _listed(request.question), _listed(request.context)
        if isinstance(request.context, str):
            contexts *= len(questions)
        if len(questions) != len(contexts):
            raise HTTPException(422, f"{len(questions)} questions and {len(contexts)} contexts; give as many, or one")
        rows: list[Row] = list(zip(questions, contexts, strict=True))
        outputs = await self._answer(rows, self._prompt(tasks.ANSWER))
        return AnswerResponse(model=self._model.name, answers=[_answer(output) for output in outputs])

    @api.get("/healthz")  # type: ignore[untyped-decorator]
    async def health(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/readyz")  # type: ignore[untyped-decorator]
    async def ready(self) -> dict[str, Any]:
        """The engine is loaded: a replica takes no request before."""
        return {"status": "ready", "model": self._model.name, "fingerprint": self._model.fingerprint}

    def _prompt(self, task: Task, to: str | None = None, source_language: str | None = None) -> Prompt:
        try:
            return prompt_for(self._model, task, to, source_language)
        except RaylmError as error:
            raise HTTPException(400, str(error)) from error

    async def _answer(self, rows: list[Row], prompt: Prompt) -> list[Output]:
        most = self._settings.max_request_texts
        if len(rows) > most:
            raise HTTPException(413, f"{len(rows)} texts in a request; {most} are allowed, send several requests")
        if self._open_requests >= self._settings.max_queued_requests:
            raise HTTPException(429, "too many requests are waiting", headers={"Retry-After": _RETRY_AFTER_S})
        self._open_requests += 1
        try:
            outputs: list[Output] = await self._decode_together((rows, prompt))
        finally:
            self._open_requests -= 1
        return outputs

    @serve.batch(batch_size_fn=_row_count)  # type: ignore[untyped-decorator]
    async def _decode_together(self, requests: list[tuple[list[Row], Prompt]]) -> list[list[Output]]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._online, self._decode_requests, requests)

    def _decode_requests(self, requests: Sequence[tuple[list[Row], Prompt]]) -> list[list[Output]]:
        """The outputs of each request; requests that ask for the same go into the same engine batches."""
        outputs: list[list[Output]] = [[] for _ in requests]
        for prompt in dict.fromkeys(prompt for _, prompt in requests):
            numbers = [number for number, (_, asked) in enumerate(requests) if asked == prompt]
            rows = [row for number in numbers for row in requests[number][0]]
            answers = iter(answer_rows(self._engine, rows, prompt))
            for number in numbers:
                outputs[number] = [next(answers) for _ in requests[number][0]]
        return outputs

    # ------------------------------------------------------------------------------------- handle

    async def answer(self, rows: Sequence[Row], prompt: Prompt) -> list[Output]:
        """`answer_rows` for a batch job. Its engine batches and those of online requests take turns."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._bulk, answer_rows, self._engine, rows, prompt)

    async def describe(self) -> dict[str, Any]:
        """The model and the decode settings of this service."""
        model = asdict(self._model) | {"directory": str(self._model.directory)}
        return {"model": model, "decode": self._settings.decode.model_dump()}


def build_app(settings: Settings, model: str) -> serve.Application:
    """The application that hosts a model, on GPUs where the connected cluster has any.

    :raises ArtifactError: the model is none that can be served.
    """
    model = absolute(model)
    has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    check_engine(ModelInfo.load(model), settings.serve.decode, "cuda" if has_gpus else "cpu")
    service: Any = Service
    deployment = service.options(
        num_replicas=settings.serve.replicas,
        # Requests wait inside the replica, which decodes them together and refuses with Retry-After.
        max_ongoing_requests=2 * settings.serve.max_queued_requests + settings.serve.max_batch_texts,
        max_queued_requests=-1,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if has_gpus else 0},
    )
    return deployment.bind(settings.serve, model, "cuda" if has_gpus else "cpu")


# ---------------------------------------------------------------------------------- start and stop


def start_service(settings: Settings, model: str) -> str:
    """The URL of the service, up and ready on the connected cluster. The caller waits, and stops it.

    :raises RaylmError: the port is taken, or no replica comes up.
    :raises ArtifactError: the model is none that can be served.
    """
    host, port = settings.serve.host, settings.serve.port
    application = build_app(settings, model)
    with _quiet_serve():
        running = _running_port()
        if running is None:
            port = _free_port(host, port)
            serve.start(http_options=serve.HTTPOptions(host=host, port=port))
        elif port not in (0, running):
            raise RaylmError(f"this cluster's Ray Serve listens on port {running} already; set serve.port={running}")
        else:
            port = running
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            serve.delete(APPLICATION)
            raise RaylmError(f"the service did not come up: {reason[-400:]}") from error
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    url = f"http://{shown}:{port}"
    note_service(ray.get_runtime_context().gcs_address, url)
    return url


def stop_service() -> None:
    """Take the service down, and Ray Serve with it where nothing else runs on it."""
    forget_service()
    with _quiet_serve():
        serve.delete(APPLICATION)
        if not serve.status().applications:
            serve.shutdown()


def wait_for_signal() -> None:
    """Comes back at SIGINT or SIGTERM; only for the main thread."""
    stopped = threading.Event()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda *_: stopped.set())
    try:
        stopped.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _running_port() -> int | None:
    """The HTTP port of the Ray Serve that runs on this cluster; None where none does."""
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None
    return int(ray.get(controller.get_http_config.remote()).port)


def _free_port(host: str, port: int) -> int:
    """The port itself, or any free one for 0.

    :raises RaylmError: it cannot be listened on.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise RaylmError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with serve.port"
            ) from error
        return int(listener.getsockname()[1])


@contextmanager
def _quiet_serve() -> Iterator[None]:
    """Ray Serve's notices of what it deploys, not shown for what is done inside."""
    logger = logging.getLogger("ray.serve")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------------------------------- batch jobs


def connect_to_service(
    model: str | None,
) -> tuple[ModelInfo, DecodeSettings, AnswerRows]:
    """What the running service hosts, how it decodes, and a function that has rows answered by it.

    :param model: the model that the caller expects there, if any.
    :raises RaylmError: no service runs, or it hosts another model.
    """
    from ray.serve.exceptions import RayServeException

    absent = f"no raylm service runs on this cluster; start it with `raylm serve --model {model or 'DIR'}`"
    if not ray.is_initialized():
        raise RaylmError(absent)
    try:
        handle = serve.get_app_handle(APPLICATION)
        described = handle.describe.remote().result(timeout_s=60)
    except (RayServeException, TimeoutError) as error:
        raise RaylmError(absent) from error
    facts = described["model"]
    served = ModelInfo(
        **{
            **facts,
            "directory": Path(facts["directory"]),
            "tasks": tuple(facts["tasks"]),
            "languages": tuple(facts["languages"]),
        }
    )
    if model is not None:
        wanted = ModelInfo.load(model)
        if wanted.fingerprint != served.fingerprint:
            raise RaylmError(
                f"the service hosts {served.where} ({served.fingerprint}), not {model} ({wanted.fingerprint});"
                " leave --model out, or serve that one"
            )
        served = replace(served, uri=model)

    def answer(rows: Sequence[Row], prompt: Prompt) -> list[Output]:
        outputs: list[Output] = _with_retries(lambda: handle.answer.remote(list(rows), prompt))
        return outputs

    return served, DecodeSettings.model_validate(described["decode"]), answer


def _with_retries(send: Callable[[], Any], tries: int = 4) -> Any:
    """A reply, asked for again while replicas are replaced or full."""
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import BackPressureError

    for attempt in range(tries):
        try:
            return send().result(timeout_s=_REQUEST_TIMEOUT_S)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, RaylmError) else error from None
        except (RayActorError, BackPressureError) as error:
            if attempt == tries - 1:
                reason = " ".join(str(error).split())
                raise RaylmError(f"the service stopped answering: {reason[:300]}") from error
            time.sleep(2.0**attempt)
    raise AssertionError("unreachable")
