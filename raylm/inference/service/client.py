"""The service as a batch job sees it: rows answered by the replicas of the model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from raylm.errors import RaylmError
from raylm.inference.answers import Output, Row
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Prompt
from raylm.inference.quarantine import STOPPED_WORKER
from raylm.inference.service.replicas import APPLICATION, MODEL
from raylm.settings import DecodeSettings
from raylm.tasks import Task

T = TypeVar("T")

_TIMEOUT_S = 3_600.0
"""For rows of a batch job, which may wait behind others."""
_PATIENCE_S = 300.0
"""How long a batch job waits for a service that has no place or no replica."""


@dataclass(frozen=True)
class ServiceClient:
    """The running service, for a batch job."""

    model: ModelInfo
    decode: DecodeSettings
    fingerprint: str
    """Of the model and how it decodes."""
    _handle: DeploymentHandle
    _suspects: threading.Lock = field(default_factory=threading.Lock)
    """Held while rows are asked about that may have stopped a replica: what dies then dies of them."""

    @classmethod
    def connect(cls, model: str | None) -> ServiceClient:
        """The service of the connected cluster.

        :param model: the model that the caller expects there, if any.
        :raises RaylmError: no service runs, or it hosts another model.
        """
        absent = f"no raylm service runs on this cluster; start it with `raylm serve --model {model or 'DIR'}`"
        if not ray.is_initialized():
            raise RaylmError(absent)
        try:
            handle = serve.get_deployment_handle(MODEL, APPLICATION)
            described = _again(lambda: handle.describe.remote().result(timeout_s=_PATIENCE_S))
        except (RayServeException, RayActorError, TimeoutError, KeyError) as error:
            raise RaylmError(absent) from error
        facts = described["model"]
        paths = {"directory": Path(facts["directory"])}
        lists = {"tasks": tuple(facts["tasks"]), "languages": tuple(facts["languages"])}
        served = ModelInfo(**facts | paths | lists)
        if model is not None:
            wanted = ModelInfo.load(model)
            if wanted.fingerprint != served.fingerprint:
                raise RaylmError(
                    f"the service hosts {served.where} ({served.fingerprint}), not {wanted.where}"
                    f" ({wanted.fingerprint}); leave --model out, or serve that one"
                )
            served = replace(served, uri=model)
        return cls(served, DecodeSettings.model_validate(described["decode"]), described["fingerprint"], handle)

    def prompt_for(self, task: Task, *asked: str | None) -> Prompt:
        """`prompt_for` with the service's model."""
        prompt: Prompt = _again(lambda: _patiently(lambda: self._handle.prompt.remote(task.name, *asked)))
        return prompt

    def answer(self, rows: Sequence[Row], prompt: Prompt) -> list[Output]:
        """The outputs of rows; a row that stops replicas has an error.

        :raises RaylmError: the service stays away, or was given another model or other decode settings.
        """
        try:
            return self._ask(rows, prompt)
        except RayActorError:  # these rows were there; so may others, an update, or a lost machine have been
            with self._suspects:
                return self._ask_alone(rows, prompt)

    def _ask_alone(self, rows: Sequence[Row], prompt: Prompt) -> list[Output]:
        with suppress(RayActorError):
            return _again(lambda: self._ask(rows, prompt))
        if len(rows) == 1:
            return [Output(None, STOPPED_WORKER)]
        middle = len(rows) // 2
        return self._ask_alone(rows[:middle], prompt) + self._ask_alone(rows[middle:], prompt)

    def _ask(self, rows: Sequence[Row], prompt: Prompt) -> list[Output]:
        outputs: list[Output] = _patiently(lambda: self._handle.answer.remote(list(rows), prompt, self.fingerprint))
        return outputs


def _again(ask: Callable[[], T]) -> T:
    """An answer, asked for once more where the replica ends before it replies.

    :raises RayActorError: so did the second one.
    """
    try:
        return ask()
    except RayActorError:
        return ask()


def _patiently(send: Callable[[], Any]) -> Any:
    """A reply, asked for again while the service is full or has no replica.

    :raises RayActorError: the replica ended before it replied.
    """
    end, pause_s = time.monotonic() + _PATIENCE_S, 1.0
    while True:
        try:
            return send().result(timeout_s=_TIMEOUT_S)
        except RayActorError:
            raise
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, RaylmError) else error from None
        except TimeoutError as error:
            raise RaylmError(f"the service has not answered for {_TIMEOUT_S:g} s; what is done is kept") from error
        except (BackPressureError, RayServeException) as error:
            if time.monotonic() > end:
                reason = " ".join(str(error).split())
                raise RaylmError(f"the service stopped answering: {reason[:300]}") from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 30.0)
