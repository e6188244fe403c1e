"""The errors a user can cause. Each says which file, key or row, what was found, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RaylmError(Exception):
    """A failure the user can mend. The command line prints its text alone and exits with 1."""


class SettingsError(RaylmError):
    """A cluster file, an overlay or `--set` says something that raylm does not understand."""


class InputError(RaylmError):
    """A file or row to read is missing, malformed or not of the expected kind."""


class NothingThereError(InputError):
    """What was to be read is not there; it may come yet."""


class ArtifactError(RaylmError):
    """An artifact on storage (tokens, run, model) is absent, unfinished or not what it claims to be."""


class OutputError(RaylmError):
    """A place to write to is read-only, full or already taken."""


class StoreError(RaylmError, OSError):
    """A storage does not answer, or not this user. It may the next time: what tries again on an OSError does so."""


class TrainingError(RaylmError):
    """Training cannot start or go on: too few workers, a diverged loss, a failed worker group."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one is likely to mean."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def remedy_for(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to say of a name that is not known: the one that is near, or what else would be right."""
    near = nearest(name, known)
    return f"did you mean '{near}'?" if near else otherwise


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: empty where none is near."""
    remedy = remedy_for(name, known, "")
    return f"; {remedy}" if remedy else ""


def first_line(error: Exception) -> str:
    """What an error of a library says, for a message of ours; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def to_plain(error: RaylmError) -> dict[str, str]:
    """An error as plain data: what Ray carries between processes wraps errors beyond recognition."""
    return {"failure": type(error).__name__, "reason": str(error)}


def from_plain(row: dict[str, str]) -> RaylmError:
    """The error that `to_plain` made data of."""
    kinds: list[type[RaylmError]] = [RaylmError]
    for kind in kinds:  # which grows meanwhile
        kinds += kind.__subclasses__()
    return next((kind for kind in kinds if kind.__name__ == row["failure"]), RaylmError)(row["reason"])
