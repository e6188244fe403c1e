"""Where the service of this machine is: a Ray that lives inside one process is found in no other way."""

from __future__ import annotations

import os

from raylm.inference.model import cache_directory
from raylm.storage import StoragePath

_AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")


def note_service(address: str, url: str) -> None:
    """Leave the Ray address of a started service, with the way its cluster wants to be spoken to."""
    environment = {name: os.environ[name] for name in _AUTHENTICATION if name in os.environ}
    _note().write_json({"ray": address, "url": url, "environment": environment})


def forget_service() -> None:
    _note().delete()


def noted_service() -> str | None:
    """The Ray address of the service that was started last, or None where it was stopped.

    To be called before Ray is imported: the environment is set as that cluster's authentication wants it.
    """
    note = _note()
    if not note.is_file():
        return None
    said = note.read_json()
    for name, value in said["environment"].items():
        os.environ.setdefault(name, value)
    return str(said["ray"])


def _note() -> StoragePath:
    return StoragePath(str(cache_directory() / "service.json"))
