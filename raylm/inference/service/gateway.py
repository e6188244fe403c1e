"""The gateway: speaks HTTP, checks keys and limits, and has the replicas of the model answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from raylm.inference.answers import Output
from raylm.inference.service.door import Turned
from raylm.inference.service.gathering import Gathering
from raylm.inference.service.keys import KeyFile
from raylm.inference.service.questions import Question, Refusal, Reply
from raylm.inference.service.replicas import APPLICATION, MODEL, fewest_and_most
from raylm.inference.service.routes import Card, build_api
from raylm.settings import ServeSettings

_QUESTIONS_A_CALL = 16
"""Short ones: all of a call are answered when the last of them is."""
_SHORT = 500
"""Characters of a short question."""
_CALLS_A_REPLICA = 2
"""One that it works on and one that waits for it."""
_RUNNING, _STOPPING = "RUNNING", "STOPPING"
_RETRY_AFTER = {"Retry-After": "5"}


class Gateway:
    """What the HTTP routes ask: replicas of the model, by their handle.

    A call of a replica costs more than a short answer: while each replica has its calls, questions gather, and go
    together in the next one. Where replicas may come, a full call is not kept back: by it they are seen to be needed.
    """

    def __init__(self, settings: ServeSettings, model: DeploymentHandle, card: Card) -> None:
        self._settings, self._model, self.card = settings, model, card
        self._keys = KeyFile(settings.keys) if settings.keys else None
        self._fewest, most = fewest_and_most(settings.replicas)
        self._most = min(_QUESTIONS_A_CALL, settings.max_batch_tokens)
        self._together: Gathering[Question, Reply] = Gathering(
            self._replies,
            _places,
            most=self._most,
            lanes=_CALLS_A_REPLICA * max(self._fewest, 1),
            is_open=self._fewest < most,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self, self._settings, self._keys)

    async def ask(self, question: Question) -> Reply:
        """The reply of a replica; of another one where the first ends before it.

        :raises Turned: the question cannot be answered, or not within `request_timeout_s`.
        """
        try:
            return await asyncio.wait_for(self._reply(question), self._settings.request_timeout_s)
        except TimeoutError as error:
            raise self._late() from error
        except RayActorError as error:
            raise Turned(500, "the replicas that were asked ended before they answered") from error

    async def _reply(self, question: Question) -> Reply:
        """:raises RayActorError: two replicas ended before they answered."""
        try:
            if _places(question) < self._most:
                return await self._together.result(question)
            # A call of its own, in no lane: the replica lets others come in between.
            return await self._alone(question)
        except RayActorError:  # it was killed, by a question of the same call or by something else
            return await self._alone(question)

    async def _alone(self, question: Question) -> Reply:
        [reply] = await self._replies([question])
        if isinstance(reply, Exception):
            raise reply from None
        return reply

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
        status = await asyncio.to_thread(serve.status)
        application: Any = status.applications.get(APPLICATION)
        found = application.deployments.get(MODEL) if application else None
        if found is None:
            return False
        states = {str(state): number for state, number in found.replica_states.items() if number}
        return _RUNNING in states or (self._fewest == 0 and not states.keys() - {_STOPPING})

    def _late(self) -> Turned:
        return Turned(504, f"no answer within {self._settings.request_timeout_s:g} s")


def _places(question: Question) -> int:
    """How many short questions one is worth."""
    return 1 + sum(len(text) for row in question.rows for text in row if text) // _SHORT


def _refused(error: Exception) -> Turned:
    """What a caller is told of an error of a call."""
    if isinstance(error, DeploymentUnavailableError):
        return Turned(503, "the model cannot be started now", _RETRY_AFTER)
    refusal = Refusal.of(error.cause if isinstance(error, RayTaskError) else error)
    return Turned(refusal.status, refusal.reason)
