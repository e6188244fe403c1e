"""Tokens by which a cluster knows its owner."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from raylm.errors import RaylmError, first_line


def ensure_token(path: Path) -> None:
    """Make a token that only this user can read, where there is none; of two that are made at once, one stays."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-") as file:  # only this user's
        file.write(secrets.token_hex(32))
        file.flush()
        with suppress(FileExistsError):
            os.link(file.name, path)


def not_let_in(where: str, error: Exception) -> RaylmError:
    """The error of a cluster that was shown no token, or not its own."""
    said = first_line(error).rstrip(".")
    return RaylmError(
        f"{where}: {said}; the cluster's token is looked for in $RAY_AUTH_TOKEN, in the file $RAY_AUTH_TOKEN_PATH and"
        " in ~/.ray/auth_token"
    )
