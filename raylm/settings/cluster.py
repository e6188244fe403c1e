"""Sections that say how work gets onto a cluster."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raylm.settings.section import Section


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
