"""Batch jobs of a date, once for each: what has not been done is done, and what failed is tried again the next night.

Each job of each date has a record, `<storage>/nightly/<date>/<job>.json`, written when it has ended; a date is done
when all its jobs have one that says so. So a night that crashed, was missed, or runs twice at once does nothing twice.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from typing import Any, Literal
from zoneinfo import ZoneInfo

from raylm.errors import NothingThereError, RaylmError, SettingsError, first_line
from raylm.inference.io import list_inputs
from raylm.lease import held
from raylm.progress import note
from raylm.settings import NightlyJob, NightlySettings, Settings, model_directory, with_options
from raylm.storage import Stopwatch, StoragePath
from raylm.tasks import TASKS

Status = Literal["done", "failed", "missing"]
_WEBHOOK_S = 30.0


@dataclass(frozen=True)
class Record:
    """A job of a date that has ended.

    :param status: `missing` where there is no input yet.
    :param reason: why it failed.
    :param errors: rows that have one.
    """

    date: str
    job: str
    status: Status
    reason: str | None = None
    rows: int = 0
    errors: int = 0
    outputs: tuple[str, ...] = ()
    seconds: float = 0.0
    ended_at: str = ""


@dataclass(frozen=True)
class Summary:
    """A night: what it did, in the order of doing."""

    records: tuple[Record, ...]

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.status == "failed"]

    def to_json(self) -> str:
        counts = {status: sum(r.status == status for r in self.records) for status in ("done", "failed", "missing")}
        return json.dumps({**counts, "jobs": [asdict(record) for record in self.records]}, indent=2, ensure_ascii=False)


def run_night(settings: Settings, now: datetime, connect: Callable[[], object] = lambda: None) -> Summary:
    """Do the jobs of the last date, and then those of earlier dates that have not been done, the last ones first.

    A job that fails does not keep others from running.

    :param connect: called before Ray is first needed, so that a night without work costs none.
    :raises Taken: another night is at work.
    :raises SettingsError: there are no jobs.
    """
    nightly = settings.nightly
    if not nightly.jobs:
        raise SettingsError("nightly.jobs is empty: there is nothing to do at night")
    records = StoragePath(settings.storage) / "nightly"
    records.mkdir()
    with held(records / "lock.json", "another `raylm nightly` is at work ({who}); wait for its end") as check_held:
        left = [
            (day, job) for day in due(nightly, now, records) for job in nightly.jobs if not _is_done(records, day, job)
        ]
        done = []
        with ExitStack() as service:

            @cache
            def refusal() -> str | None:
                """Why there is no service for the night, which is started when it is first asked for."""
                try:
                    service.enter_context(_service(settings, connect))
                except RaylmError as error:
                    return str(error)
                return None

            for day, job in left:
                check_held()
                record = _run(settings, day, job, connect, refusal if nightly.through == "serve" else lambda: None)
                (records / day.isoformat() / f"{job.name}.json").write_json(asdict(record))
                done.append(record)
    summary = Summary(tuple(done))
    if nightly.webhook and done:
        _tell(nightly.webhook, summary)
    return summary


def due(nightly: NightlySettings, now: datetime, records: StoragePath) -> list[date]:
    """The dates that a night is to see to, the last one first."""
    last = now.astimezone(ZoneInfo(nightly.timezone)).date() - timedelta(days=nightly.lag_days)
    first = nightly.since or min([*_recorded(records), last])
    first = max(first, last - timedelta(days=nightly.catch_up))
    return [last - timedelta(days=number) for number in range((last - first).days + 1)]


def _recorded(records: StoragePath) -> Iterator[date]:
    for place, _ in records.list():
        try:
            yield date.fromisoformat(place.name)
        except ValueError:
            continue  # the lock


def _is_done(records: StoragePath, day: date, job: NightlyJob) -> bool:
    record = records / day.isoformat() / f"{job.name}.json"
    return record.is_file() and record.read_json()["status"] == "done"


def _run(
    settings: Settings,
    day: date,
    job: NightlyJob,
    connect: Callable[[], object],
    refusal: Callable[[], str | None],
) -> Record:
    """A job of a date, whatever becomes of it.

    :param refusal: why nobody can answer it, if so; asked only where there is input.
    """
    from raylm.inference.batch import run_batch

    watch = Stopwatch()

    def record(status: Status, reason: str | None = None, **counts: Any) -> Record:
        ended_at = datetime.now(UTC).isoformat(timespec="seconds")
        seconds = round(watch.elapsed_s, 1)
        return Record(day.isoformat(), job.name, status, reason, **counts, seconds=seconds, ended_at=ended_at)

    source, target = (pattern.replace("{date}", day.isoformat()) for pattern in (job.input, job.output))
    try:
        list_inputs(source)
    except NothingThereError as error:
        return record("missing", first_line(error))
    except (RaylmError, OSError) as error:
        return record("failed", str(error))
    if refused := refusal():
        return record("failed", refused)
    try:
        options = {"prompt": job.prompt, "max_errors": job.max_errors}
        manifest = run_batch(
            with_options(settings, "batch", {key: value for key, value in options.items() if value is not None}),
            TASKS[job.task],
            source,
            model=job.model,
            columns=job.columns,
            source_language=job.source_language,
            to=job.to,
            output=target,
            through=settings.nightly.through,
            connect=connect,
        )
    except RaylmError as error:
        return record("failed", str(error))
    except Exception as error:  # one job's defect is not to cost the others their night
        return record("failed", f"{type(error).__name__}: {first_line(error)}")
    places = tuple(output["path"] for output in manifest.outputs)
    return record("done", rows=manifest.counts["rows"], errors=manifest.counts["errors"], outputs=places)


# ------------------------------------------------------------------------------------------- the service


@contextmanager
def _service(settings: Settings, connect: Callable[[], object]) -> Iterator[None]:
    """A service for the night: the one that runs, or one of its own, which ends with the night."""
    connect()
    from raylm.inference.service.start import is_running, start_service, stop_service

    if is_running():
        yield
        return
    models = {job.model or model_directory(settings) for job in settings.nightly.jobs}
    if len(models) > 1:
        raise SettingsError(
            f"nightly.through is serve, and nightly.jobs are of {len(models)} models: a service hosts one; use actors"
        )
    start_service(settings.serve, models.pop(), topology=settings.topology)
    try:
        yield
    finally:
        stop_service()


def _tell(webhook: str, summary: Summary) -> None:
    """Send a summary to a URL; a night does not fail because nobody listens."""
    request = urllib.request.Request(
        webhook, summary.to_json().encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        urllib.request.urlopen(request, timeout=_WEBHOOK_S).close()
    except (OSError, ValueError) as error:
        note(f"nightly.webhook: the summary was not taken: {first_line(error)}")
