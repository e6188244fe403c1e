"""Tokens by which a cluster knows its owner."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def ensure_token(path: Path) -> None:
    """Make a token that only this user can read, where there is none."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", opener=lambda place, flags: os.open(place, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))
