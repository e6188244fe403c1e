"""What a request has to pass before it is read: its key, its key's limits, its size, and the length of the queue."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse
from ray.serve import metrics

from raylm.inference.service.keys import Allowance, Key, KeyFile
from raylm.settings import ServeSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

NO_KEYS = "everyone"
"""Who asks where no keys are asked for."""
OPENAI_PATHS = ("/v1/completions", "/v1/models")
_GUARDED = "/v1/"
_BUSY_RETRY_S = 1
_BODY_TIMEOUT_S = 60
"""From one part of a request to the next."""
_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120]


class Turned(Exception):
    """A request that is sent away, with the status and the reason that it is told."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


def refusal(path: str, status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response that says why not, in the form that callers of a path read."""
    if not path.startswith(OPENAI_PATHS):
        return JSONResponse({"detail": reason}, status, headers)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": reason, "type": kind, "param": None, "code": None}}, status, headers)


class Limits:
    """How much each key has left."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._allowances: dict[tuple[str, str], Allowance] = {}

    def take(self, name: str, key: Key | None, what: str, units: int) -> None:
        """Count requests or texts of a key.

        :param what: `requests` or `texts`.
        :raises Turned: it has none left; 429, with the time to wait.
        """
        field = f"{what}_per_minute"
        limit = (getattr(key, field) if key else None) or getattr(self._settings, field)
        if limit is None:
            return
        now = time.monotonic()
        allowance = self._allowances.get((name, what))
        if allowance is None or allowance.per_minute != limit:
            allowance = self._allowances[name, what] = Allowance.full(limit, now)
        wait_s = allowance.take(units, now)
        if wait_s:
            retry = {"Retry-After": str(math.ceil(wait_s))}
            raise Turned(429, f"{name} may send {limit:,} {what} a minute; try again in {math.ceil(wait_s)} s", retry)


class Door:
    """ASGI middleware around the routes; everything below `/v1/` has to pass.

    What it lets in finds its caller in the request's state, as `caller` and `key`.
    """

    def __init__(self, app: Any, settings: ServeSettings, keys: KeyFile | None, limits: Limits) -> None:
        self._app, self._settings, self._keys, self._limits = app, settings, keys, limits
        self._open = 0
        self._requests = metrics.Counter(
            "raylm_requests", "Requests of the service.", tag_keys=("route", "status", "caller")
        )
        self._seconds = metrics.Histogram(
            "raylm_request_seconds", "From a request's arrival to the end of its answer.", _SECONDS, ("route",)
        )
        self._waiting = metrics.Gauge("raylm_open_requests", "Requests that are being answered.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or send it away."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or not path.startswith(_GUARDED):
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        status, caller = 500, "nobody"

        async def noting_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            caller, key = await self._caller(scope)
            self._limits.take(caller, key, "requests", 1)
            self._enter()
            try:
                body = await self._body(scope, receive)
                scope.setdefault("state", {}).update(caller=caller, key=key)
                await self._app(scope, _replaying(body, receive), noting_send)
            finally:
                self._leave()
        except Turned as turned:
            await refusal(path, turned.status, turned.reason, turned.headers)(scope, receive, noting_send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._requests.inc(tags={"route": route, "status": str(status), "caller": caller})
            self._seconds.observe(time.monotonic() - start, tags={"route": route})

    async def _caller(self, scope: Scope) -> tuple[str, Key | None]:
        if self._keys is None:
            return NO_KEYS, None
        if self._keys.is_due:
            await asyncio.to_thread(self._keys.refresh)
        headers = dict(scope["headers"])
        scheme, _, secret = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() != "bearer":
            secret = headers.get(b"x-api-key", b"").decode("latin-1")
        found = self._keys.find(secret.strip()) if secret else None
        if found is None:
            reason = "this API key is not known" if secret else "an API key is missing"
            raise Turned(401, f"{reason}; send `Authorization: Bearer KEY`", {"WWW-Authenticate": "Bearer"})
        return found

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most = self._settings.max_request_bytes
        size = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = bytearray(), True
        while more:
            if len(body) > most or (size.isdigit() and int(size) > most):
                raise Turned(413, f"a request may have {most:,} bytes; send several")
            try:
                message = await asyncio.wait_for(receive(), _BODY_TIMEOUT_S)
            except TimeoutError as error:
                raise Turned(408, "the request did not come to its end") from error
            if message["type"] == "http.disconnect":
                raise Turned(499, "the caller has gone")
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return bytes(body)

    def _enter(self) -> None:
        if self._open >= self._settings.max_queued_requests:
            raise Turned(429, "too many requests are waiting", {"Retry-After": str(_BUSY_RETRY_S)})
        self._open += 1
        self._waiting.set(self._open)

    def _leave(self) -> None:
        self._open -= 1
        self._waiting.set(self._open)


def _replaying(body: bytes, receive: Receive) -> Receive:
    """What gives a body that has been read, and then what comes after it: that the caller goes away."""
    told = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
