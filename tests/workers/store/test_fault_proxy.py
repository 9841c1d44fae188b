"""The proxy breaks exactly what it is told to, and passes all else on as it came."""

from __future__ import annotations

import http.client
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

BODY = bytes(range(256)) * 40


class Echo(BaseHTTPRequestHandler):
    """Answers with what it got; notes what it has read."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, self.headers["Host"], body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.got = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(server: Any, proxy_module: Any) -> Iterator[Any]:
    with proxy_module.FaultProxy(server.server_address) as proxy:
        yield proxy


@pytest.fixture
def put(proxy: Any) -> Iterator[Callable[..., tuple[int, bytes]]]:
    made = []

    def put(key: str, timeout: float = 10.0) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=timeout)
        made.append(connection)
        connection.request("PUT", f"/bucket/{key}", body=BODY)
        reply = connection.getresponse()
        return reply.status, reply.read()

    yield put
    for connection in made:
        connection.close()


def test_what_is_not_broken_passes_as_it_came(server: Any, proxy: Any, put: Any) -> None:
    proxy.inject("status", key="^other", times=math.inf)
    assert put("a%20b") == (200, BODY)
    assert server.got == [("/bucket/a%20b", f"127.0.0.1:{proxy.port}", BODY)]
    assert [(r.operation, r.key, r.fault) for r in proxy.requests] == [("PutObject", "a b", None)]
    assert not proxy.faults


def test_only_the_named_requests_break(proxy: Any, put: Any) -> None:
    proxy.inject("status", operation="PutObject", key="^k", skip=1, times=2)
    proxy.inject("status", operation="GetObject", times=math.inf, status=500)
    assert [put(key)[0] for key in ("k", "x", "k", "k", "k")] == [200, 200, 503, 503, 200]
    assert proxy.faults == {"status": 2} and len(proxy.requests) == 5
    with pytest.raises(ValueError, match="no_such: not a fault; there are status"):
        proxy.inject("no_such")


@pytest.mark.parametrize("fault", ["reset_before_body", "reset_in_body", "lost_reply"])
def test_resets_before_the_reply(server: Any, proxy: Any, put: Any, fault: str) -> None:
    proxy.inject(fault)
    with pytest.raises(ConnectionResetError):
        put("k")
    assert [body for _, _, body in server.got if len(body) == len(BODY)] == (
        [BODY] if fault == "lost_reply" else []
    ), "only a lost reply follows work that was done"
    assert put("k") == (200, BODY)


def test_a_reset_within_the_reply(proxy: Any, put: Any) -> None:
    proxy.inject("reset_in_reply", at=100)
    with pytest.raises(ConnectionResetError):
        put("k")


def test_a_reply_that_ends_early(proxy: Any, put: Any) -> None:
    proxy.inject("truncate_reply", at=100)
    with pytest.raises(http.client.IncompleteRead) as caught:
        put("k")
    assert caught.value.partial == BODY[:100]


@pytest.mark.parametrize("fault", ["flip_in_body", "flip_in_reply"])
def test_one_bit_is_changed(server: Any, proxy: Any, put: Any, fault: str) -> None:
    proxy.inject(fault, at=7)
    status, body = put("k")
    (got,) = [body for _, _, body in server.got]
    assert status == 200
    assert [i for i in range(len(BODY)) if body[i] != BODY[i]] == [7]
    assert [i for i in range(len(BODY)) if got[i] != BODY[i]] == [7] * (fault == "flip_in_body")


@pytest.mark.parametrize("fault", ["black_hole", "slow_body", "slow_reply"])
def test_some_requests_never_end(proxy: Any, put: Any, fault: str) -> None:
    proxy.inject(fault, rate=20)
    started = time.monotonic()
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(put("k", timeout=0.3 if fault == "black_hole" else 5))
        except OSError as error:
            outcome.append(type(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(0.6)
    assert thread.is_alive() == (fault != "black_hole")
    proxy.heal()
    thread.join(5)
    assert outcome in ([TimeoutError], [ConnectionResetError], [BrokenPipeError])
    assert time.monotonic() - started < 4
    assert put("k") == (200, BODY)


def test_delay_and_refusal(proxy: Any, put: Any) -> None:
    proxy.inject("delay", seconds=0.2)
    started = time.monotonic()
    assert put("k") == (200, BODY)
    assert time.monotonic() - started >= 0.2
    with proxy.refuse(), pytest.raises(ConnectionRefusedError):
        put("k")
    assert put("k") == (200, BODY)


def test_a_real_server_and_a_real_client(fault_proxy: Any) -> None:
    """Signatures, checksums in trailers, and the server's leave to send a body."""
    import boto3

    client = boto3.client("s3", endpoint_url=fault_proxy.endpoint)
    client.put_object(Bucket="runs", Key="proxy/a", Body=BODY)
    fault_proxy.inject("status", operation="PutObject")
    client.put_object(Bucket="runs", Key="proxy/b", Body=BODY)
    assert client.get_object(Bucket="runs", Key="proxy/b")["Body"].read() == BODY
    upload = client.create_multipart_upload(Bucket="runs", Key="proxy/c")["UploadId"]
    client.abort_multipart_upload(Bucket="runs", Key="proxy/c", UploadId=upload)
    assert client.list_objects_v2(Bucket="runs", Prefix="proxy/")["KeyCount"] == 2
    seen = [(request.operation, request.fault) for request in fault_proxy.requests]
    assert seen == [
        ("PutObject", None),
        ("PutObject", "status"),
        ("PutObject", None),
        ("GetObject", None),
        ("CreateMultipartUpload", None),
        ("AbortMultipartUpload", None),
        ("ListObjects", None),
    ]
    with pytest.raises(client.exceptions.ClientError, match="Checksum|BadDigest|did not match"):
        fault_proxy.inject("flip_in_body", operation="PutObject", times=math.inf)
        client.put_object(Bucket="runs", Key="proxy/d", Body=BODY)
    assert client.list_objects_v2(Bucket="runs", Prefix="proxy/")["KeyCount"] == 2
