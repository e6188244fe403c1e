"""Sections that say how work gets onto a cluster, and when."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, StringConstraints

from raylm.settings.section import Section, ShareOrNumber


class JobSettings(Section):
    """`raylm submit`."""

    working_dir: str | None = None
    """A directory that is sent along with a job, such as `.`; without one it runs in the checkout of the cluster."""
    excludes: tuple[str, ...] = (".git", ".venv", "**/__pycache__")
    """What of it is not sent, in the words of a .gitignore."""
    retries: int = Field(default=0, ge=0)
    """How often a job that fails is started again; each continues where the one before stopped."""
    entrypoint_resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """What the machine of the job's own process has to have, such as `{driver: 1}`, which keeps it off the head."""


def _of_a_night(pattern: str) -> str:
    if "{date}" not in pattern:
        raise ValueError("a place with {date} in it, such as s3://in/{date}/*.parquet")
    return pattern


def _known_timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ValueError("a time zone such as Europe/Berlin") from error
    return name


_FIELD = r"(\*|\d+(-\d+)?)(/\d+)?"
_CRON = re.compile(rf"{_FIELD}(,{_FIELD})*(\s+{_FIELD}(,{_FIELD})*){{4}}")


def _cron(text: str) -> str:
    if not _CRON.fullmatch(text.strip()):
        raise ValueError("minute, hour, day of the month, month and day of the week, as cron has them: 30 2 * * *")
    return text.strip()


OfANight = Annotated[str, AfterValidator(_of_a_night)]
"""A place that is another one for each night."""


class NightlyJob(Section):
    """A batch job that runs once for each date."""

    name: Annotated[str, StringConstraints(pattern=r"^[\w-]+$")]
    """What it is called in records and summaries."""
    task: Literal["translate", "summarize", "generate", "classify", "answer"]
    input: OfANight
    """A file, a directory or a glob, with `{date}` where the date stands, as 2026-11-27."""
    output: OfANight
    model: str | None = None
    """A directory; by default the model that `raylm export` wrote, or that is served."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column each field of the task is, such as `{text: body}`."""
    source_language: str | None = None
    to: str | None = None
    prompt: str | None = None
    """As `batch.prompt`."""
    max_errors: ShareOrNumber | None = None
    """As `batch.max_errors`."""


class NightlySettings(Section):
    """`raylm nightly`."""

    jobs: tuple[NightlyJob, ...] = ()
    schedule: Annotated[str, AfterValidator(_cron)] = "30 2 * * *"
    """When, in the words of cron; `raylm render` writes it for what starts it."""
    timezone: Annotated[str, AfterValidator(_known_timezone)] = "UTC"
    """Of the schedule, and by which a day ends."""
    lag_days: int = Field(default=1, ge=0)
    """The date of a night is that of so many days before: 1 is the day that has ended."""
    catch_up: int = Field(default=7, ge=0)
    """How many dates before that one are made up for, where their jobs have not been done."""
    since: date | None = None
    """The first date; by default that of the first night that ran."""
    through: Literal["actors", "serve"] = "actors"
    """`serve`: the replicas of a service, which is started for the night where none runs."""
    webhook: str | None = None
    """A URL that is sent the summary of each night, as JSON."""


class SpotSettings(Section):
    """What follows when a cloud has no spot machines left; of the clouds' providers below `raylm.cluster.providers`."""

    fallback: dict[str, str] = Field(default_factory=dict)
    """Which on-demand node type stands in for which spot one: `{gpu-spot: gpu-on-demand}`. No more machines do than
    its `max_workers` allows."""
    after: int = Field(default=3, ge=1)
    """How many attempts in a row have to fail before; at most three are made in a minute."""
    retry_minutes: float = Field(default=15, gt=0)
    """After so long without an attempt, spot machines are asked for again."""
