"""Pages as Chromium shows them; tests that need one skip where it is absent."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip

_GOES_ELSEWHERE = -32000
"""The protocol's code of what was asked of a page that was just left."""


def _browser() -> str:
    browser = shutil.which("chromium")
    if not browser:
        pytest.skip("needs chromium on PATH")
    return browser


def in_browser(address: str, profile: Path, *options: str) -> str:
    """The document that Chromium makes of a page once it is loaded, as HTML.

    :param profile: a directory for what the browser keeps.
    """
    command = [_browser(), *_QUIET, "--dump-dom", f"--user-data-dir={profile / 'profile'}", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout


class LivePage:
    """A page that is open, spoken to by the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0

    def evaluate(self, script: str) -> Any:
        """What a line of JavaScript gives in the page; None while another page comes in its place."""
        self._number += 1
        asked = {"expression": script, "returnByValue": True}
        self._socket.send(json.dumps({"id": self._number, "method": "Runtime.evaluate", "params": asked}))
        while (answer := json.loads(self._socket.recv(30))).get("id") != self._number:
            pass
        if answer.get("error", {}).get("code") == _GOES_ELSEWHERE:
            return None
        return answer["result"]["result"].get("value")

    def wait(self, condition: str, timeout_s: float = 60) -> str:
        """The document once a condition in JavaScript holds."""
        end = time.monotonic() + timeout_s
        while not self.evaluate(f"!!({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition}: {self.evaluate('document.body.innerText')}")
            time.sleep(0.1)
        return str(self.evaluate("document.documentElement.outerHTML"))


@contextmanager
def live_page(address: str, profile: Path) -> Iterator[LivePage]:
    """A page whose scripts run in real time.

    :param profile: a directory for what the browser keeps.
    """
    from websockets.sync.client import connect

    place = profile / "profile"
    options = ["--remote-debugging-port=0", f"--user-data-dir={place}"]
    process = subprocess.Popen([_browser(), *_QUIET, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file, end = place / "DevToolsActivePort", time.monotonic() + 60
        while not port_file.is_file() or "\n" not in port_file.read_text():
            assert time.monotonic() < end, "Chromium does not start"
            time.sleep(0.1)
        port = port_file.read_text().split("\n")[0]
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(asked, timeout=30) as answer:
            page = json.load(answer)["webSocketDebuggerUrl"]
        with connect(page, max_size=None, open_timeout=60, ping_interval=None) as socket:
            opened = LivePage(socket)
            opened.evaluate(f"location.href = {json.dumps(address)}")
            yield opened
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
