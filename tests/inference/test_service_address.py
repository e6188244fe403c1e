from __future__ import annotations

import os
import socket

import pytest

from raylm.inference.service.address import forget_service, note_service, noted_service


def test_a_service_is_found_while_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        note_service(address, "http://127.0.0.1:8000")
        monkeypatch.delenv("RAY_AUTH_MODE")
        assert noted_service() == address
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert noted_service() is None
    forget_service()
    assert noted_service() is None
