"""A spot machine's notice: asked for as AWS wants it, and passed on with the time that is left."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ringworld_platform.spot_notice import interruption, watch

TOKEN = "a-token"


class Metadata(BaseHTTPRequestHandler):
    """Answers as the metadata service of a machine does that asks for IMDSv2's tokens."""

    def do_PUT(self) -> None:
        asked = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        known = self.path == "/latest/api/token" and 1 <= int(asked) <= 21600
        self._answer(200 if known else 400, TOKEN)

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != TOKEN:
            return self._answer(401, "")
        self.server.looks += 1  # type: ignore[attr-defined]
        notice = self.server.notices.get(self.server.looks)  # type: ignore[attr-defined]
        if self.path != "/latest/meta-data/spot/instance-action" or notice is None:
            return self._answer(404, "no such thing")
        return self._answer(200, notice)

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.looks, server.notices = 0, {}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()


def url_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def notice(at: float) -> str:
    when = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return json.dumps({"action": "terminate", "time": when})


@pytest.mark.timeout(120)
def test_a_notice_is_passed_on_once(service: ThreadingHTTPServer) -> None:
    end = int(time.time()) + 118
    service.notices = {4: notice(end)}  # type: ignore[attr-defined]
    told: list[tuple[str, float]] = []
    watch(lambda *said: told.append(said), metadata=url_of(service), look_seconds=0.01)
    [(reason, seconds)] = told
    assert "spot" in reason and 60 < seconds <= 118
    assert service.looks == 4  # type: ignore[attr-defined]


def test_no_notice_no_service_and_nonsense_are_no_interruption(
    service: ThreadingHTTPServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert interruption(url_of(service)) is None
    assert not caplog.records, "no notice is nothing to speak of"
    service.notices = {2: "[]", 3: '{"time": "soon"}'}  # type: ignore[attr-defined]
    assert interruption(url_of(service)) is None
    assert interruption(url_of(service)) is None
    assert interruption("http://127.0.0.1:9") is None
    assert len(caplog.records) == 3 and TOKEN not in caplog.text
