from __future__ import annotations

import os
import socket

import pytest

from raylm.inference.service.address import forget_service, note_service, noted_service


def test_a_service_is_found_while_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        note_service(address)
        monkeypatch.delenv("RAY_AUTH_MODE")
        assert noted_service() == address
        assert os.environ["RAY_AUTH_MODE"] == "token"
        forget_service("127.0.0.1:9")
        assert noted_service() == address, "the note is that of another service"
    assert noted_service() is None
    forget_service(address)
    assert noted_service() is None
