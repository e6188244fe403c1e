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

from raylm.errors import RaylmError, first_line
from raylm.inference.answers import Output
from raylm.inference.service.door import Turned
from raylm.inference.service.keys import KeyFile
from raylm.inference.service.questions import Question, Reply
from raylm.inference.service.routes import Card, build_api
from raylm.settings import ServeSettings

APPLICATION = "raylm"
MODEL = "model"
"""The deployment of the model's replicas."""
_TRIES = 2
_RUNNING, _STOPPING = "RUNNING", "STOPPING"
_RETRY_AFTER = {"Retry-After": "5"}


class Gateway:
    """What the HTTP routes ask: replicas of the model, by their handle."""

    def __init__(self, settings: ServeSettings, model: DeploymentHandle, card: Card) -> None:
        self._settings, self._model, self.card = settings, model, card
        self._keys = KeyFile(settings.keys) if settings.keys else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self, self._settings, self._keys)

    async def ask(self, question: Question) -> Reply:
        """The reply of a replica; of another one where the first ends before it.

        :raises Turned: the question cannot be answered, or not within `request_timeout_s`.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.request_timeout_s
        for attempt in range(_TRIES):
            response = self._model.ask.remote(question)
            try:
                reply: Reply = await asyncio.wait_for(response, end - loop.time())
                return reply
            except TimeoutError as error:
                response.cancel()
                raise self._late() from error
            except RayActorError as error:  # it was killed, by the question or by something else
                if attempt == _TRIES - 1:
                    raise Turned(500, "the replicas that were asked ended before they answered") from error
            except (RayTaskError, RayServeException) as error:
                raise _refused(error) from error
        raise AssertionError("unreachable")

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
        may_sleep = isinstance(self._settings.replicas, tuple) and self._settings.replicas[0] == 0
        return _RUNNING in states or (may_sleep and not states.keys() - {_STOPPING})

    def _late(self) -> Turned:
        return Turned(504, f"no answer within {self._settings.request_timeout_s:g} s")


def _refused(error: Exception) -> Turned:
    """What a caller is told of an error that a replica raised."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RaylmError):
        return Turned(400, str(cause))
    if isinstance(cause, DeploymentUnavailableError):
        return Turned(503, "the model cannot be started now", _RETRY_AFTER)
    return Turned(500, f"the model failed: {type(cause).__name__}: {first_line(cause)}")
