"""The gateway: speaks HTTP, checks keys and limits, and has the replicas of the model answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from fastapi import FastAPI
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from raylm.inference.answers import Output
from raylm.inference.service.door import Turned
from raylm.inference.service.gathering import Gathering
from raylm.inference.service.keys import KeyFile
from raylm.inference.service.questions import Question, Refusal, Reply
from raylm.inference.service.replicas import CALLS_A_REPLICA, Replicas
from raylm.inference.service.routes import Card, build_api
from raylm.settings import ServeSettings

_QUESTIONS_A_CALL = 16
_RETRY_AFTER = {"Retry-After": "5"}


class Gateway:
    """What the HTTP routes ask: replicas of the model, by their handle.

    A call of a replica costs more than a short answer. While each replica has its calls, questions gather, and go
    together in the next one; with `_QUESTIONS_A_CALL` of them another call is made, by which Ray Serve sees that the
    replicas are busy.
    """

    def __init__(self, settings: ServeSettings, model: DeploymentHandle, card: Card) -> None:
        self._settings, self._model, self.card = settings, model, card
        self._keys = KeyFile(settings.keys) if settings.keys else None
        self._replicas = Replicas(settings.replicas)
        self._together: Gathering[Question, Reply] = Gathering(
            self._ask_together,
            size=lambda _: 1,
            most=min(_QUESTIONS_A_CALL, settings.max_batch_tokens),
            lanes=lambda: CALLS_A_REPLICA * self._replicas.running,
            is_open=True,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self, self._settings, self._keys)

    async def ask(self, question: Question) -> Reply:
        """The reply of a replica; of another one where the first ends before it.

        :raises Turned: the question cannot be answered, or not within `request_timeout_s`.
        """
        self._replicas.look()
        try:
            return await asyncio.wait_for(self._together.result(question), self._settings.request_timeout_s)
        except TimeoutError as error:
            raise self._late() from error

    async def _ask_together(self, questions: list[Question]) -> list[Reply | Exception]:
        """The replies to questions, in order; where their replica ends, each is asked once more by itself."""
        try:
            return await self._replies(questions)
        except RayActorError:  # it was killed, by one of the questions or by something else
            return await asyncio.gather(*map(self._ask_again, questions))

    async def _ask_again(self, question: Question) -> Reply | Exception:
        try:
            [reply] = await self._replies([question])
            return reply
        except RayActorError:
            return Turned(500, "the replicas that were asked ended before they answered")

    async def _replies(self, questions: list[Question]) -> list[Reply | Exception]:
        """:raises RayActorError: the replica ended before it answered."""
        response = self._model.ask.remote(questions)
        try:
            replies: list[Reply | Refusal] = await response
        except asyncio.CancelledError:  # nobody waits any more
            response.cancel()
            raise
        except (RayTaskError, RayServeException) as error:
            return [_refused(error)] * len(questions)
        return [Turned(one.status, one.reason) if isinstance(one, Refusal) else one for one in replies]

    async def stream(self, question: Question) -> AsyncIterator[str | Output]:
        """The pieces of an answer as they are written, and then the whole.

        :raises Turned: as `ask`; also where the answer ends in the middle.
        """
        pieces = self._model.options(stream=True).stream.remote(question)
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.request_timeout_s
        try:
            while True:
                yield await asyncio.wait_for(anext(pieces), end - loop.time())
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise self._late() from error
        except RayActorError as error:
            raise Turned(500, "the replica that was asked ended before it had answered") from error
        except (RayTaskError, RayServeException) as error:
            raise _refused(error) from error
        finally:
            with suppress(RayServeException):  # there was no replica
                pieces.cancel()

    async def is_ready(self) -> bool:
        """Whether the model has been loaded, or is to be loaded for a request that comes."""
        return await self._replicas.are_ready()

    def _late(self) -> Turned:
        return Turned(504, f"no answer within {self._settings.request_timeout_s:g} s")


def _refused(error: Exception) -> Turned:
    """What a caller is told of an error of a call."""
    if isinstance(error, DeploymentUnavailableError):
        return Turned(503, "the model cannot be started now", _RETRY_AFTER)
    refusal = Refusal.of(error.cause if isinstance(error, RayTaskError) else error)
    return Turned(refusal.status, refusal.reason)
