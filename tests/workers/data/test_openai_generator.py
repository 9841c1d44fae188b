"""An endpoint that misbehaves, over real HTTP: what is retried, kept, refused, and never told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ringworld_jobs.recipe_text import GeneratorSpec
from ringworld_workers.data.files import DataError
from ringworld_workers.data.openai_generator import OpenAiGenerator, parse_reply
from ringworld_workers.data.qa_generator import NoQuestion, QuestionAnswer

KEY = "sk-very-secret-0123456789"
Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class Endpoint:
    """Answers each request by the next of ``script``, then well; notes what it was asked."""

    def __init__(self) -> None:
        self.script: list[Reply] = []
        self.asked: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self.gate: threading.Barrier | None = None
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.asked.append(body | {"_key": self.headers["Authorization"]})
                    endpoint.asked[-1]["_path"] = self.path
                    endpoint.times.append(time.monotonic())
                    endpoint.in_flight += 1
                    endpoint.most_in_flight = max(endpoint.most_in_flight, endpoint.in_flight)
                    reply = endpoint.script.pop(0) if endpoint.script else good
                try:
                    if endpoint.gate is not None:
                        endpoint.gate.wait(10)
                    reply(self, body)
                except OSError:
                    pass  # the client has given up
                finally:
                    with endpoint._lock:
                        endpoint.in_flight -= 1

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def says(content: Any) -> Reply:
    body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
    return lambda handler, asked: send(handler, 200, body)


def good(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    chunk = asked["messages"][-1]["content"]
    says(json.dumps({"question": f"What of {chunk}?", "answer": chunk}))(handler, asked)


def status(code: int, **headers: str) -> Reply:
    return lambda handler, asked: send(handler, code, f"no: {KEY}".encode(), **headers)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TEST_KEY", KEY)
    served = Endpoint()
    yield served
    served.server.shutdown()
    served.server.server_close()


def generator(endpoint: Endpoint, cache: Path, **changes: Any) -> OpenAiGenerator:
    spec = {"url": endpoint.url, "model": "m", "api_key_variable": "TEST_KEY", "timeout": "5s"}
    spec |= {"retries": 3} | changes
    return OpenAiGenerator(GeneratorSpec.model_validate(spec), cache, first_pause_seconds=0.01)


def answers(*chunks: str) -> list[QuestionAnswer]:
    return [QuestionAnswer(f"What of {chunk}?", chunk) for chunk in chunks]


def test_asked_once_kept_and_never_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    assert generator(endpoint, tmp_path).ask(["a", "b"], "a b") == answers("a", "b")
    assert len(endpoint.asked) == 2
    sent = endpoint.asked[0]
    assert sent["model"] == "m" and sent["temperature"] == 0.0
    assert sent["_path"] == "/v1/chat/completions" and sent["_key"] == f"Bearer {KEY}"
    assert generator(endpoint, tmp_path).ask(["b", "c"], "") == answers("b", "c")
    assert len(endpoint.asked) == 3
    generator(endpoint, tmp_path, model="other").ask(["a"], "")
    assert len(endpoint.asked) == 4
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 4 and all(KEY not in path.read_text() for path in kept)
    # A torn file is asked for again.
    kept[0].write_text('{"question": "What')
    generator(endpoint, tmp_path).ask(["a", "b", "c"], "")
    generator(endpoint, tmp_path, model="other").ask(["a"], "")
    assert len(endpoint.asked) == 5


def test_errors_that_pass_are_waited_out(endpoint: Endpoint, tmp_path: Path) -> None:
    def hang_up(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        handler.connection.close()

    endpoint.script = [status(500), hang_up, status(429, Retry_After="0.3")]
    assert generator(endpoint, tmp_path).ask(["a"], "") == answers("a")
    assert len(endpoint.asked) == 4
    assert endpoint.times[3] - endpoint.times[2] >= 0.3


def test_an_endpoint_that_stays_ill_stops_the_build_and_loses_nothing(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.script = [good, *[status(503)] * 3]
    one_at_a_time = generator(endpoint, tmp_path, retries=2, concurrency=1)
    with pytest.raises(DataError, match="failed 3 times, the last time with: HTTP 503") as error:
        one_at_a_time.ask(["a", "b", "c"], "")
    assert KEY not in str(error.value) and error.value.__cause__ is None
    assert len(endpoint.asked) == 4  # c was not asked any more
    assert one_at_a_time.ask(["a", "b", "c"], "") == answers("a", "b", "c")
    assert len(endpoint.asked) == 6


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (status(401), "HTTP 401.*replace the key in the environment variable TEST_KEY"),
        (status(404), "HTTP 404.*correct generator.url or generator.model"),
        (status(302, Location="http://127.0.0.1:1/steal"), "HTTP 302.*address that it redirects"),
        (status(429, Retry_After="86400"), "HTTP 429 .*left alone for 86,400 s"),
    ],
)
def test_what_no_retry_can_mend_is_told_at_once_without_the_key(
    endpoint: Endpoint, tmp_path: Path, reply: Reply, message: str
) -> None:
    endpoint.script = [reply]
    with pytest.raises(DataError, match=message) as error:
        generator(endpoint, tmp_path).ask(["a"], "")
    assert len(endpoint.asked) == 1 and KEY not in str(error.value)


def test_replies_that_drip_or_never_come_meet_the_deadline(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    over = threading.Event()

    def drip(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not over.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    def silent(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        over.wait(10)

    endpoint.script = [drip, silent]
    started = time.monotonic()
    patient = generator(endpoint, tmp_path, retries=1, timeout="0.3s")
    try:
        with pytest.raises(DataError, match="failed 2 times.*no answer within timeout, 0.3 s"):
            patient.ask(["a"], "")
    finally:
        over.set()
    assert time.monotonic() - started < 5


def test_malformed_replies_are_asked_for_again_then_refused_by_name(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    fenced = '```json\n{"question": "Q?", "answer": "A"}\n```'
    endpoint.script = [
        says("Sure! Here is a question."),
        says(None),
        lambda handler, asked: send(handler, 200, b"<html>"),
        says(fenced),
    ]
    assert generator(endpoint, tmp_path).ask(["a"], "") == [QuestionAnswer("Q?", "A")]
    endpoint.script = [says('{"question": "Q?"}')] * 2
    (refused,) = generator(endpoint, tmp_path, retries=1).ask(["b"], "")
    assert isinstance(refused, NoQuestion) and refused.unusable
    assert "m are malformed, 2 of them: 'answer' is no text" in refused.reason
    assert generator(endpoint, tmp_path, retries=1).ask(["b"], "") == answers("b")


def test_so_many_requests_are_in_flight_and_no_more(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.gate = threading.Barrier(3)  # none is answered before three are there
    chunks = [f"chunk {n}" for n in range(6)]
    assert generator(endpoint, tmp_path, concurrency=3).ask(chunks, "") == answers(*chunks)
    assert endpoint.most_in_flight == 3


def test_a_key_with_a_line_break_is_not_repeated(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", f"{KEY}\nX-Header: 1")
    with pytest.raises(DataError, match="TEST_KEY holds no key") as error:
        generator(endpoint, tmp_path).ask(["a"], "")
    assert KEY not in str(error.value) and not endpoint.asked
    monkeypatch.delenv("TEST_KEY")
    generator(endpoint, tmp_path).ask(["a"], "")
    assert endpoint.asked[0]["_key"] is None


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("[1]", "not a JSON object"),
        ('{"question": "Q?", "answer": 3}', "'answer' is no text"),
        ('{"question": " ", "answer": "A"}', "'question' is no text"),
        ('{"question": "Q?", "answer": "A"} and more', "not one JSON object"),
        (json.dumps({"question": "Q?", "answer": "x" * 3000}), "3,000 characters"),
        ('{"question": "Q?", "answer": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "not one JSON object"),
    ],
)
def test_replies_are_parsed_strictly(reply: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_reply(reply)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "localhost:8000", "http://user:key@host/v1", "http://h/v1?key=1"]
)
def test_urls_that_are_none_or_hold_a_secret_are_refused_unseen(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        GeneratorSpec(url=url, model="m")
