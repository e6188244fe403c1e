"""Jobs on a running cluster: submitted once, followed without gap or repeat, tried again where they may be."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from raylm.auth import not_let_in
from raylm.errors import RaylmError, first_line
from raylm.progress import hushed
from raylm.settings import JobSettings

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_RETRY_S = 2.0
"""Between two questions that were not answered."""
_ANSWER_S = 120.0
"""How long a cluster may not answer: a head that has just started has no agent yet, and a line may be down."""
_SILENT_S = 30.0
"""A job may print nothing for so long before its status is asked for."""
_FAILED, _STOPPED = 1, 130
"""Exit codes of a job that says none, and of one that somebody stopped."""

DASHBOARD_PORT = 8_265
"""Where Ray's dashboard and its Jobs API listen, where a cluster does not say another."""

_CLIENT_LOG = "ray.dashboard.modules.job.sdk"
"""Where Ray's client tells of its own connections."""

T = TypeVar("T")


class Ended(NamedTuple):
    """:param exit_code: of the job's own process, where that is known."""

    submission_id: str
    exit_code: int


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the Jobs API, once it answers.

    :param address: of the dashboard; None for `$RAY_API_SERVER_ADDRESS`, or this machine's.
    :raises RaylmError: there is no cluster, or it wants a token.
    """
    _use_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or f"http://127.0.0.1:{DASHBOARD_PORT}"
    try:
        return JobSubmissionClient(where)
    except ConnectionError as error:
        raise RaylmError(f"there is no cluster at {where}: {first_line(error)}; start one by `ray up`") from error
    except RuntimeError as error:
        raise RaylmError(f"{where}: {first_line(error)}") from error
    except AuthenticationError as error:
        raise not_let_in(where, error) from error


def _use_token() -> None:
    """Show the user's token, where there is one and nothing else is said."""
    is_named = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if "RAY_AUTH_MODE" not in os.environ and (is_named or Path("~/.ray/auth_token").expanduser().is_file()):
        os.environ["RAY_AUTH_MODE"] = "token"


def submit(
    client: JobSubmissionClient,
    script: str,
    arguments: Sequence[str],
    settings: JobSettings,
    echo: Callable[[str], None],
    note: Callable[[str], None],
    patience_s: float = _ANSWER_S,
) -> Ended:
    """Run a script on the cluster and follow it to its end.

    The same script with the same arguments has the same submission id: while it runs, a second call joins it instead of
    starting it twice. A job that fails is started again as often as `job.retries` lets it be.

    :param echo: is given the job's output, piece by piece.
    :param note: is given what happens to the job.
    :param patience_s: how long the cluster may not answer while the job is followed.
    :raises RaylmError: the cluster refuses the job, or has not answered for so long.
    """
    entrypoint = shlex.join([script if "/" in script else f"./{script}", *arguments])
    runtime_env = _runtime_env(settings)
    name = _name(script, entrypoint, runtime_env)
    attempts = 1 + settings.retries
    for attempt in range(attempts):
        submission_id = _started(client, name, entrypoint, runtime_env, settings, note)
        ended = follow(client, submission_id, echo, note, patience_s)
        if ended.exit_code == 0 or ended.exit_code == _STOPPED or attempt == attempts - 1:
            return ended
        note(f"{submission_id} failed with exit code {ended.exit_code}; attempt {attempt + 2} of {attempts}")
    return ended


def follow(
    client: JobSubmissionClient,
    submission_id: str,
    echo: Callable[[str], None],
    note: Callable[[str], None],
    patience_s: float = _ANSWER_S,
) -> Ended:
    """Give out what a job prints, from its beginning to its end, also when the line breaks in between.

    :raises RaylmError: there is no such job, or the cluster has not answered for `patience_s`.
    """
    from aiohttp import ClientError  # a line that breaks while it is made
    from ray.exceptions import AuthenticationError

    told = 0

    async def listen() -> None:
        nonlocal told
        seen = 0
        async for piece in client.tail_job_logs(submission_id):  # which begins at the beginning each time
            fresh = piece[max(told - seen, 0) :]
            seen += len(piece)
            if fresh:
                echo(fresh)
                told += len(fresh)

    async def listen_while_it_runs() -> None:
        """A line to a machine that is gone stays silent for ever: the job's status is asked for meanwhile."""
        listening, has_ended = asyncio.create_task(listen()), False
        while not (await asyncio.wait({listening}, timeout=_SILENT_S))[0] and not has_ended:
            with suppress(RuntimeError, OSError):
                has_ended = (await asyncio.to_thread(client.get_job_status, submission_id)).is_terminal()
        listening.cancel()
        await listening

    while True:
        _answered(lambda: client.get_job_status(submission_id), f"job {submission_id}", note, patience_s)
        with (
            suppress(RuntimeError, OSError, asyncio.TimeoutError, asyncio.CancelledError, ClientError),
            suppress(AuthenticationError),  # which the next question tells
            hushed(_CLIENT_LOG, logging.WARNING),
        ):
            asyncio.run(listen_while_it_runs())
        info: JobDetails = _answered(
            lambda: client.get_job_info(submission_id), f"job {submission_id}", note, patience_s
        )
        if info.status.is_terminal():
            break
        time.sleep(_RETRY_S)
    try:
        logs = _answered(lambda: client.get_job_logs(submission_id), f"job {submission_id}", note)
    except RaylmError as error:  # the machine that it ran on had it
        note(f"the rest of what it printed is lost: {error}")
        logs = ""
    if logs[told:]:
        echo(logs[told:])
    if info.status == "SUCCEEDED":
        return Ended(submission_id, 0)
    if info.status == "STOPPED":
        return Ended(submission_id, _STOPPED)
    if info.message and info.driver_exit_code is None:  # else it repeats what the job has printed
        note(f"{submission_id}: {' '.join(info.message.split())[:500]}")
    return Ended(submission_id, info.driver_exit_code or _FAILED)


def _started(
    client: JobSubmissionClient,
    name: str,
    entrypoint: str,
    runtime_env: dict[str, Any],
    settings: JobSettings,
    note: Callable[[str], None],
) -> str:
    """The id of the job, which runs now: the one that ran already, or a new one with the next number."""
    jobs: list[JobDetails] = _answered(client.list_jobs, "the cluster's jobs", note)
    ours = {str(job.submission_id): job for job in jobs if (job.submission_id or "").startswith(f"{name}-")}
    for submission_id, job in ours.items():
        if not job.status.is_terminal():
            note(f"{submission_id} runs already: following it")
            return submission_id
    numbers = [int(number) for submission_id in ours if (number := submission_id.removeprefix(f"{name}-")).isdecimal()]
    submission_id = f"{name}-{max(numbers, default=0) + 1}"

    def start() -> str:
        return str(
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env=runtime_env,
                entrypoint_resources=settings.entrypoint_resources or None,
            )
        )

    _answered(start, f"job {submission_id}", note, already="already exists")
    note(f"{submission_id} submitted: {entrypoint}")
    return submission_id


def _name(script: str, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """What names a job: its script, and a hash of all that it is given."""
    code = Path(script)
    content = code.read_bytes() if code.is_file() else b""
    digest = hashlib.sha256(repr((entrypoint, sorted(runtime_env.items()))).encode() + content).hexdigest()
    return f"raylm-{code.stem}-{digest[:10]}"


def _runtime_env(settings: JobSettings) -> dict[str, Any]:
    """What Ray sends along with the job."""
    if settings.working_dir is None:
        return {}
    return {"working_dir": settings.working_dir, "excludes": list(settings.excludes)}


def _answered(
    ask: Callable[[], T],
    what: str,
    note: Callable[[str], None],
    patience_s: float = _ANSWER_S,
    already: str | None = None,
) -> T:
    """What a question to the cluster gives, asked again for a while as long as nobody answers.

    :param already: what the cluster says of something that an earlier try has done, although its answer was lost.
    :raises RaylmError: it is refused, or nobody answers.
    """
    from ray.exceptions import AuthenticationError

    end = time.monotonic() + patience_s
    was_silent = False
    while True:
        try:
            return ask()
        except AuthenticationError as error:
            raise not_let_in(what, error) from error
        except (RuntimeError, OSError) as error:  # requests' errors are of the second kind
            text = str(error)
            if was_silent and already and already in text:
                return None  # type: ignore[return-value]
            refused = isinstance(error, RuntimeError) and "No available agent" not in text and "code 50" not in text
            if refused or time.monotonic() > end:
                raise RaylmError(f"{what}: {first_line(error)}") from error
            if not was_silent:
                note(f"{what}: no answer yet; trying for {patience_s:.0f} s")
            was_silent = True
            time.sleep(_RETRY_S)
