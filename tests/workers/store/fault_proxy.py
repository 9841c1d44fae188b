"""A TCP proxy that understands HTTP, and breaks what it is told to, before a real S3 server.

A client talks to the proxy's address, and its requests go on as they came, ``Host`` and all, so
their signatures stay good. Which request breaks, and how, is told by ``inject``:

    proxy.inject("status", operation="PutObject", times=3)
    proxy.inject("lost_reply", operation="CompleteMultipartUpload", key="rank-00000")

========================= ============================================================
fault                     what happens
========================= ============================================================
``status``                an error of S3 in place of the reply; nothing gets through
``reset_before_body``     the connection is reset when the headers have come
``reset_in_body``         the connections are reset in the middle of the request's body
``flip_in_body``          the server gets the request's body with one bit changed
``slow_body``             the request's body is taken in at so many bytes a second
``black_hole``            the request is read, and never answered
``delay``                 the request is passed on so many seconds late
``lost_reply``            the server does it all and answers; the client gets a reset
``reset_in_reply``        the connection is reset in the middle of the reply's body
``truncate_reply``        the reply's body ends in the middle, by an orderly close
``flip_in_reply``         the client gets the reply's body with one bit changed
``slow_reply``            the reply's body comes at so many bytes a second
========================= ============================================================

``refuse`` closes the listener as well: connections are refused, as by a server that is down.
"""

from __future__ import annotations

import re
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import unquote

FAULTS = (
    "status reset_before_body reset_in_body flip_in_body slow_body black_hole delay lost_reply "
    "reset_in_reply truncate_reply flip_in_reply slow_reply"
).split()
_CODES = {500: "InternalError", 503: "SlowDown", 429: "SlowDown", 403: "ExpiredToken"}
_STEP = 0.05


@dataclass(frozen=True)
class Request:
    """One that came."""

    method: str
    operation: str
    """As S3 calls it: PutObject, UploadPart, ..."""
    key: str
    """Of the object, without the bucket; empty for requests to the bucket."""
    fault: str | None


@dataclass
class Rule:
    """Which requests break, and how."""

    fault: str
    operation: re.Pattern[str]
    key: re.Pattern[str]
    skip: int
    left: float
    status: int
    at: int | None
    rate: float
    seconds: float
    then: Callable[[], None] | None

    def end(self) -> Broken:
        """What to raise when the connection is to be reset."""
        if self.then is not None:
            self.then()
        return Broken()


class Broken(Exception):
    """The connection was ended on purpose."""


class FaultProxy:
    """The proxy and its threads; a context manager."""

    def __init__(self, server: tuple[str, int]) -> None:
        """Name the server's address; connections to it are made as requests come."""
        self._server = server
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._open: set[socket.socket] = set()
        self._ended = threading.Event()
        self.requests: list[Request] = []
        self.faults: Counter[str] = Counter()
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    @property
    def endpoint(self) -> str:
        """What the client takes for the server."""
        return f"http://127.0.0.1:{self.port}"

    def inject(
        self,
        fault: str,
        *,
        operation: str = "",
        key: str = "",
        skip: int = 0,
        times: float = 1,
        status: int = 503,
        at: int | None = None,
        rate: float = 10.0,
        seconds: float = 1.0,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Break requests; of several rules for a request the first that is left counts.

        Args:
            fault: see above.
            operation: S3's name of it, as a regular expression that must match whole; any if empty.
            key: regular expression to be found in the object's key.
            skip: so many matching requests pass before.
            times: how many break; ``math.inf`` for all.
            status: of ``status``.
            at: byte of the body where it happens; its middle where None.
            rate: bytes a second of the slow faults.
            seconds: of ``delay``.
            then: called when a connection is about to be reset, as by a process that dies.
        """
        if fault not in FAULTS:
            raise ValueError(f"{fault}: not a fault; there are {', '.join(FAULTS)}")
        wanted = re.compile(operation or ".*")
        rule = Rule(fault, wanted, re.compile(key), skip, times, status, at, rate, seconds, then)
        with self._lock:
            self._rules.append(rule)

    def heal(self) -> None:
        """Break nothing more, and cut what hangs; the counts stay."""
        with self._lock:
            self._rules.clear()
        self._cut()

    @contextmanager
    def refuse(self) -> Iterator[None]:
        """Refuse connections, and cut those that are open."""
        self._close_listener()
        self._cut()
        try:
            yield
        finally:
            self._listener = self._listen(self.port)

    def close(self) -> None:
        """End all connections and threads."""
        self._ended.set()
        self._close_listener()
        self._cut()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_listener(self) -> None:
        # A listener is shut down when nobody waits in it any more.
        self._closing.set()
        self._acceptor.join()
        self._listener.close()

    def _cut(self) -> None:
        with self._lock:
            hanging = list(self._open)
        for connection in hanging:
            _reset(connection)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self._closing = threading.Event()
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        self._acceptor.start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            # Closing a socket does not wake who waits in it.
            if not select.select([listener], [], [], _STEP)[0]:
                continue
            connection, _ = listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        upstream = None
        try:
            with self._lock:
                self._open.add(connection)
            upstream = socket.create_connection(self._server, timeout=60)
            client, server = Wire(connection), Wire(upstream)
            while self._wait_for_request(client, upstream) and self._one(client, server):
                pass
        except (OSError, ValueError, Broken):
            # What one side does to its connection, the other side sees done to its own.
            _reset(connection)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
            if upstream is not None:
                upstream.close()

    def _wait_for_request(self, client: Wire, upstream: socket.socket) -> bool:
        while not client.buffer:
            ready = select.select([client.socket, upstream], [], [], 60)[0]
            if client.socket in ready:
                return client.fill()
            if upstream in ready:
                return False
        return True

    def _one(self, client: Wire, server: Wire) -> bool:
        """Pass one request and its reply; returns whether the connection stays open."""
        head, headers = client.head()
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        operation, key = _operation(method, target, headers)
        rule = self._judge(method, operation, key)
        fault = rule.fault if rule else None
        expects = headers.get("expect", "").lower() == "100-continue"
        if rule and fault == "status":
            if not expects:
                client.skip_body(headers)
            client.send(_error(rule.status, key))
            return not expects
        if rule and fault == "reset_before_body":
            raise rule.end()
        if rule and fault == "delay":
            self._ended.wait(rule.seconds)
        if fault == "black_hole":
            while client.fill():  # until the client gives up
                client.buffer.clear()
            raise Broken
        server.send(head)
        if expects and not self._interim(client, server):
            return False
        body = client.body(headers, method)
        with suppress(BrokenPipeError, ConnectionResetError):  # it may have answered already
            for piece in self._bent(body, rule, "body", headers, client):
                server.send(piece)
        return self._reply(client, server, method, rule)

    def _interim(self, client: Wire, server: Wire) -> bool:
        """Pass the server's leave to send the body; False if it answered for good."""
        head, headers = server.head()
        client.send(head)
        if head.split(b" ", 2)[1] == b"100":
            return True
        for piece in server.body(headers, "PUT", reply=True):
            client.send(piece)
        return False

    def _reply(self, client: Wire, server: Wire, method: str, rule: Rule | None) -> bool:
        head, headers = server.head()
        while head.split(b" ", 2)[1] == b"100":
            head, headers = server.head()
        empty = method == "HEAD" or head.split(b" ", 2)[1] in (b"204", b"304")
        body = iter(()) if empty else server.body(headers, method, reply=True)
        if rule and rule.fault == "lost_reply":
            for _ in body:
                pass
            raise rule.end()
        client.send(head)
        for piece in self._bent(body, rule, "reply", headers, client):
            client.send(piece)
        return "close" not in headers.get("connection", "").lower() and not (
            rule and rule.fault == "truncate_reply"
        )

    def _bent(
        self,
        body: Iterator[bytes],
        rule: Rule | None,
        side: str,
        headers: dict[str, str],
        client: Wire,
    ) -> Iterator[bytes]:
        """The body's bytes, with the fault in them if it is one of this side."""
        kind = rule.fault if rule else ""
        if rule is None or not kind.endswith(side):
            yield from body
            return
        if kind.startswith("slow"):
            count = max(1, int(rule.rate * _STEP))
            for piece in body:
                for first in range(0, len(piece), count):
                    yield piece[first : first + count]
                    if self._ended.wait(count / rule.rate) or client.is_gone():
                        raise Broken
            return
        middle = int(headers.get("content-length", 0)) // 2
        left = middle if rule.at is None else rule.at
        for piece in body:
            if left >= len(piece):
                left -= len(piece)
                yield piece
                continue
            if kind.startswith("flip"):
                yield piece[:left] + bytes([piece[left] ^ 4]) + piece[left + 1 :]
                yield from body
                return
            yield piece[:left]
            if kind == "truncate_reply":
                return
            # The bytes before must not be thrown away together with the connection.
            time.sleep(_STEP)
            raise rule.end()

    def _judge(self, method: str, operation: str, key: str) -> Rule | None:
        with self._lock:
            for rule in self._rules:
                if rule.left <= 0 or not rule.operation.fullmatch(operation):
                    continue
                if not rule.key.search(key):
                    continue
                if rule.skip:
                    rule.skip -= 1
                    continue
                rule.left -= 1
                self.faults[rule.fault] += 1
                self.requests.append(Request(method, operation, key, rule.fault))
                return rule
            self.requests.append(Request(method, operation, key, None))
            return None


class Wire:
    """One end of a connection, read by lines and bodies."""

    def __init__(self, connection: socket.socket) -> None:
        """Read from an open connection."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.buffer = bytearray()

    def send(self, data: bytes) -> None:
        """All of it."""
        self.socket.sendall(data)

    def fill(self) -> bool:
        """Wait for some more bytes; False at the connection's end."""
        data = self.socket.recv(1 << 18)
        self.buffer += data
        return bool(data)

    def is_gone(self) -> bool:
        """Whether the other end waits no longer; what it sends meanwhile may lie there."""
        if self.socket.fileno() < 0:
            return True
        readable = select.select([self.socket], [], [], 0)[0]
        return bool(readable) and not self.socket.recv(1, socket.MSG_PEEK)

    def head(self) -> tuple[bytes, dict[str, str]]:
        """The first line and the headers: as they came, and by their names in lower case."""
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            if not self.fill():
                raise Broken
        head = self._take(end + 4)
        lines = head.decode("latin-1").split("\r\n")[1:]
        pairs = (line.partition(":") for line in lines if line)
        return head, {name.strip().lower(): value.strip() for name, _, value in pairs}

    def body(self, headers: dict[str, str], method: str, *, reply: bool = False) -> Iterator[bytes]:
        """The body's bytes as they came, in pieces."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            yield from self._chunks()
        elif "content-length" in headers:
            yield from self._some(int(headers["content-length"]))
        elif reply:
            while self.buffer or self.fill():
                yield self._take(len(self.buffer))

    def skip_body(self, headers: dict[str, str]) -> None:
        """Read the body and forget it."""
        for _ in self.body(headers, ""):
            pass

    def _some(self, length: int) -> Iterator[bytes]:
        while length:
            if not self.buffer and not self.fill():
                raise Broken
            piece = self._take(min(length, len(self.buffer)))
            length -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        length = -1
        while length:
            line = self._line()
            length = int(line.split(b";")[0], 16)
            yield line
            if length:
                yield from self._some(length + 2)
        while True:  # trailing headers, up to an empty line
            line = self._line()
            yield line
            if line == b"\r\n":
                return

    def _line(self) -> bytes:
        while (end := self.buffer.find(b"\r\n")) < 0:
            if not self.fill():
                raise Broken
        return self._take(end + 2)

    def _take(self, length: int) -> bytes:
        data = bytes(self.buffer[:length])
        del self.buffer[:length]
        return data


def _reset(connection: socket.socket) -> None:
    """End a connection with a reset instead of an orderly close."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    with suppress(OSError):
        connection.close()


def _error(status: int, key: str) -> bytes:
    code = _CODES.get(status, "InternalError")
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>'
        f"<Message>injected</Message><Key>{key}</Key></Error>"
    ).encode()
    head = (
        f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


_OPERATIONS: dict[str, Callable[[str, bool], str]] = {
    "GET": lambda query, key: (
        ("ListParts" if "uploadId=" in query else "GetObject")
        if key
        else "ListMultipartUploads"
        if "uploads" in query
        else "ListObjects"
        if "list-type" in query
        else "GetBucket"
    ),
    "HEAD": lambda query, key: "HeadObject" if key else "HeadBucket",
    "PUT": lambda query, key: "UploadPart" if "uploadId=" in query else "PutObject",
    "POST": lambda query, key: (
        "CompleteMultipartUpload"
        if "uploadId=" in query
        else "CreateMultipartUpload"
        if "uploads" in query
        else "DeleteObjects"
    ),
    "DELETE": lambda query, key: "AbortMultipartUpload" if "uploadId=" in query else "DeleteObject",
}


def _operation(method: str, target: str, headers: dict[str, str]) -> tuple[str, str]:
    """What S3 calls a request, and the key that it is about."""
    path, _, query = target.partition("?")
    key = unquote(path).lstrip("/").partition("/")[2]
    name = _OPERATIONS.get(method, lambda query, key: method)(query, bool(key))
    return ("CopyObject" if "x-amz-copy-source" in headers else name), key
