"""Who may ask the service, and how much: a file of hashed API keys, and the limits of each.

The file is YAML, a key an entry, on any storage:

    nightly: {sha256: 9f86d0…, requests_per_minute: 600, texts_per_minute: 20000}

Keys are 256 random bits, so that a plain SHA-256 of one tells nothing of it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from typing import Annotated

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from raylm.errors import SettingsError
from raylm.lease import held
from raylm.settings import Section
from raylm.storage import StoragePath

_PREFIX = "raylm-"
_LOOK_S = 2.0
"""How often the file is looked at for changes."""
_NAME = re.compile(r"[\w.@-]+")


class Key(Section):
    """An entry of the file."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    requests_per_minute: int | None = Field(default=None, ge=1)
    texts_per_minute: int | None = Field(default=None, ge=1)


_FILE: TypeAdapter[dict[str, Key]] = TypeAdapter(dict[str, Key])


def read_keys(place: StoragePath) -> dict[str, Key]:
    """The keys of a file, by their names.

    :raises SettingsError: there is none, or something else in it.
    """
    try:
        said = yaml.safe_load(place.read_bytes())
    except FileNotFoundError as error:
        raise SettingsError(f"serve.keys: there is no file {place}; `raylm serve-key NAME` makes one") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"serve.keys: {place} is not readable as YAML: {' '.join(str(error).split())}") from error
    try:
        return _FILE.validate_python(said or {})
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "all of it"
        raise SettingsError(
            f"serve.keys: {place}: {where}: {fault['msg']}; an entry is"
            " `name: {sha256: 64 hex digits, requests_per_minute: 600, texts_per_minute: 20000}`"
        ) from error


def add_key(place: StoragePath, name: str, requests_per_minute: int | None, texts_per_minute: int | None) -> str:
    """A new key, which is written nowhere: the file, made where it is missing, gets its hash.

    :raises SettingsError: the name is taken or no name, or the file holds something else.
    :raises Taken: another process adds one at this moment.
    """
    if not _NAME.fullmatch(name):
        raise SettingsError(f"key {name!r}: a name has letters, digits and _ . @ - only")
    with held(place.parent.mkdir() / f"{place.name}.lock", f"key {name}: {{who}} adds one to {place} now; try again"):
        return _added(place, name, requests_per_minute, texts_per_minute)


def _added(place: StoragePath, name: str, requests_per_minute: int | None, texts_per_minute: int | None) -> str:
    keys = read_keys(place) if place.is_file() else {}
    if name in keys:
        raise SettingsError(f"key {name}: {place} has one already; take its entry out there to make it anew")
    secret = _PREFIX + secrets.token_urlsafe(32)
    limits = {"requests_per_minute": requests_per_minute, "texts_per_minute": texts_per_minute}
    entry = {"sha256": _digest(secret)} | {limit: value for limit, value in limits.items() if value is not None}
    entries = {known: key.model_dump(exclude_none=True) for known, key in keys.items()} | {name: entry}
    before = place.read_bytes().decode() if place.is_file() else "# API keys of the service, hashed: SHA-256."
    text = f"{before.rstrip()}\n{yaml.safe_dump({name: entry}, sort_keys=False)}"
    place.write_bytes((text if _says(text, entries) else yaml.safe_dump(entries, sort_keys=False)).encode())
    return secret


def _says(text: str, entries: dict[str, dict[str, object]]) -> bool:
    """Whether a file with an entry put behind it is YAML still; in braces it is not."""
    try:
        return bool(yaml.safe_load(text) == entries)
    except yaml.YAMLError:
        return False


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class KeyFile:
    """The keys of a file as it is now.

    :raises SettingsError: there is no such file; one that breaks later is not read, the keys before stay.
    """

    def __init__(self, uri: str) -> None:
        self._place = StoragePath(uri)
        self._looked = time.monotonic()
        self._state = self._look()
        self._keys = read_keys(self._place)

    def find(self, secret: str) -> tuple[str, Key] | None:
        """The name and the entry of a key, compared with all there are in the same time."""
        digest, found = _digest(secret), None
        for name, key in self._keys.items():
            if hmac.compare_digest(key.sha256, digest):
                found = name, key
        return found

    @property
    def is_due(self) -> bool:
        """Whether it is time to look at the file again."""
        return time.monotonic() - self._looked >= _LOOK_S

    def refresh(self) -> None:
        """Read the file again where it has changed; may take as long as its storage does."""
        self._looked = time.monotonic()
        try:
            state = self._look()
            if state != self._state:
                self._keys, self._state = read_keys(self._place), state
        except (SettingsError, OSError) as error:
            print(f"raylm: {error}; the keys before stay", flush=True)  # noqa: T201 - the replica's log

    def _look(self) -> tuple[object, object]:
        info = self._place.info()
        return info.mtime_ns, info.size


@dataclass
class Allowance:
    """So many units a minute, a minute's worth of which may be used at once (a token bucket)."""

    per_minute: int
    left: float
    filled: float
    """The time up to which it was filled, s."""

    @classmethod
    def full(cls, per_minute: int, now: float) -> Allowance:
        """One of which nothing has been used."""
        return cls(per_minute, per_minute, now)

    def take(self, units: int, now: float) -> float:
        """Use units, or the seconds to wait until there are enough. More than a minute's worth wait for a full one."""
        self.left = min(self.left + (now - self.filled) * self.per_minute / 60, self.per_minute)
        self.filled = now
        missing = min(units, self.per_minute) - self.left
        if missing > 0:
            return missing * 60 / self.per_minute
        self.left -= units
        return 0.0
