"""A metadata service of this machine that answers as those of the clouds do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Metadata(BaseHTTPRequestHandler):
    """What a machine's own metadata service says; `gone_at` is when it will be taken away."""

    gone_at: datetime | None = None

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200, "a-token")

    def do_GET(self) -> None:
        at = self.gone_at
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "a-token":
                self._answer(401, "")
            elif at is None:
                self._answer(404, "")
            else:
                self._answer(200, json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}))
        elif self.path == "/computeMetadata/v1/instance/preempted":
            assert self.headers["Metadata-Flavor"] == "Google"
            self._answer(200, "TRUE" if at else "FALSE")
        elif self.path == "/metadata/scheduledevents?api-version=2020-07-01":
            assert self.headers["Metadata"] == "true"
            events = [{"EventType": "Freeze", "NotBefore": ""}]
            if at:
                events.append({"EventType": "Preempt", "NotBefore": format_datetime(at, usegmt=True)})
            self._answer(200, json.dumps({"DocumentIncarnation": 1, "Events": events}))
        else:
            self._answer(500, "")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[str]:
    """The address of the service, which says nothing at first."""
    Metadata.gone_at = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
