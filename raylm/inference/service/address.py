"""Where the service of this machine is: a Ray that lives inside one process is found in no other way."""

from __future__ import annotations

import os
import socket

from raylm.storage import StoragePath, cache_directory

_CONNECT_TIMEOUT_S = 5.0
_AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")


def note_service(address: str) -> None:
    """Leave the Ray address of a started service, with the way its cluster wants to be spoken to."""
    environment = {name: os.environ[name] for name in _AUTHENTICATION if name in os.environ}
    _note().write_json({"ray": address, "environment": environment})


def forget_service(address: str) -> None:
    """Remove the note of the service at an address; that of another stays."""
    note = _note()
    if note.is_file() and note.read_json()["ray"] == address:
        note.delete()


def noted_service() -> str | None:
    """The Ray address of the service that was started last, or None where it runs no longer.

    To be called before Ray is imported: the environment is set as that cluster's authentication wants it.
    """
    note = _note()
    if not note.is_file():
        return None
    said = note.read_json()
    if not listens(said["ray"]):  # the process ended without a word
        return None
    for name, value in said["environment"].items():
        os.environ.setdefault(name, value)
    return str(said["ray"])


def listens(address: str) -> bool:
    """Whether anybody listens at an address, given as host:port; nobody does at what is none."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _note() -> StoragePath:
    return StoragePath(str(cache_directory() / "service.json"))
