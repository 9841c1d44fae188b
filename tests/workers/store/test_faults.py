"""An S3 store whose requests break on the way: exact bytes, or an error that says it all, in time.

The server is real, and so are the resets, silences and flipped bits: ``fault_proxy`` makes them.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

from ringworld_workers.store.base import Conflict, NotFound, StoreError
from ringworld_workers.store.retry import Patience
from ringworld_workers.store.s3_store import S3Store

PART = 5 << 20
SMALL = bytes(range(256)) * 200
LARGE = [SMALL * 50, SMALL * 60]
PARTS = 2
"""Of that; S3 takes no smaller ones."""
PATIENT = Patience(
    outage_seconds=20.0,
    reply_seconds=1.0,
    completion_seconds=1.0,
    window_seconds=0.5,
    first_pause_seconds=0.01,
    longest_pause_seconds=0.05,
)
# By attempts, not by time: on a busy machine one attempt may take as long as many do elsewhere.
HASTY = replace(PATIENT, outage_seconds=20.0, attempts=3, reply_seconds=0.3, completion_seconds=0.3)
SLACK_SECONDS = 15.0
"""Of a machine that has other things to do, on top of what a call is given."""


@dataclass(frozen=True)
class Stores:
    """One place on the server, by several ways."""

    proxy: Any
    patient: S3Store
    """Through the proxy, as ``hasty``."""
    hasty: S3Store
    direct: S3Store


@pytest.fixture(scope="module")
def ways(proxy_module: Any, s3_server: Any) -> Iterator[Stores]:
    url = f"s3://runs/{uuid.uuid4().hex[:12]}"
    with (
        pytest.MonkeyPatch.context() as patch,
        proxy_module.FaultProxy(("127.0.0.1", s3_server.port)) as proxy,
    ):
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        stores = [S3Store(url, part_bytes=PART, patience=p) for p in (PATIENT, HASTY, Patience())]
        for store in stores:
            if store is stores[2]:
                patch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint)
            connected = False
            while not connected:  # which takes longer than one of them waits
                with suppress(StoreError):
                    store.list()
                    connected = True
        yield Stores(proxy, *stores)


@pytest.fixture
def stores(ways: Stores) -> Iterator[Stores]:
    """The same, with nothing in it and nothing broken."""
    yield ways
    ways.proxy.heal()
    ways.proxy.faults.clear()
    ways.proxy.requests.clear()
    ways.direct.remove_unfinished(older_than_seconds=-60)
    ways.direct.delete_prefix("")


@dataclass(frozen=True)
class Call:
    """One of the store's operations, and how to see that it did its work."""

    operation: str
    """As StoreError names it."""
    requests: str
    """What S3 calls the requests that it makes, as a regular expression."""
    run: Callable[[S3Store, str], object]
    """Given a key of its own, at which ``SMALL`` lies, or nothing for ``fresh`` calls."""
    done: object
    """What it returns."""
    after: bytes | None
    """What the object holds once it has worked."""
    fresh: bool = False
    named: bool = True
    """Whether it is about an object, so that errors name it."""


def fill(store: S3Store, key: str) -> bytes:
    first, second = bytearray(1000), bytearray(len(SMALL) - 1100)
    store.read_into(key, 100, [memoryview(first), memoryview(second)])
    return bytes(first + second)


NEW = SMALL[::-1]
PUT = {"after": NEW, "fresh": True}
CALLS = {
    "put": Call("put", "PutObject", lambda s, k: s.put(k, [NEW]), None, **PUT),
    "replace": Call("put", "PutObject", lambda s, k: s.put(k, [NEW]), None, NEW),
    "begin_parts": Call(
        "put", "CreateMultipartUpload", lambda s, k: s.put(k, LARGE), None, b"".join(LARGE), True
    ),
    "put_parts": Call(
        "put", "UploadPart", lambda s, k: s.put(k, LARGE), None, b"".join(LARGE), True
    ),
    "join_parts": Call(
        "put", "CompleteMultipartUpload", lambda s, k: s.put(k, LARGE), None, b"".join(LARGE), True
    ),
    "put_if_absent": Call(
        "put_if_absent", "PutObject", lambda s, k: s.put_if_absent(k, NEW), True, **PUT
    ),
    "put_if_match": Call(
        "put_if_match",
        "PutObject",
        lambda s, k: s.get_with_etag(k)[1] == s.put_if_match(k, NEW, s.get_with_etag(k)[1]),
        False,
        NEW,
    ),
    "get": Call("get", "GetObject", lambda s, k: s.get(k), SMALL, SMALL),
    "read_into": Call("read", "GetObject", fill, SMALL[100:], SMALL),
    "list": Call(
        "list", "ListObjects", lambda s, k: [i.size for i in s.list("list")], [len(SMALL)], SMALL
    ),
    "delete": Call("delete", "DeleteObject", lambda s, k: s.delete(k), None, None),
    "unfinished": Call(
        "unfinished", "ListMultipartUploads", lambda s, k: s.unfinished("unfinished"), [], SMALL
    ),
}
WITH_BODY = {"put", "replace", "put_parts", "join_parts", "put_if_absent", "put_if_match"}
WITH_REPLY = {"begin_parts", "join_parts", "get", "read_into", "list", "unfinished"}
"""Calls whose broken request has a body, and whose reply has one."""


def together(actions: dict[str, Callable[[], None]]) -> None:
    """Run all at the same time, and raise what the first one raised."""
    problems: dict[str, BaseException] = {}

    def run(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            error.add_note(f"in {name}")
            problems[name] = error

    threads = [
        threading.Thread(target=run, args=item, name=item[0], daemon=True)
        for item in actions.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), f"{thread.name} does not end"
    for error in problems.values():
        raise error


def prepare(direct: S3Store, names: set[str]) -> None:
    for name in names:
        if not CALLS[name].fresh:
            direct.put(f"{name}/x", [SMALL])


def place(call: str) -> str:
    """Expression for the keys of a call's requests; those to the bucket name none."""
    return "" if call in ("list", "unfinished") else f"/{call}/"


def holds(store: S3Store, key: str) -> bytes | None:
    return (
        store.get(key) if any(info.key == key for info in store.list(key.split("/")[0])) else None
    )


ONCE: dict[str, tuple[set[str], dict[str, Any]]] = {
    "slow_down": (set(CALLS), {"fault": "status", "times": 3}),
    "internal_error": (set(CALLS), {"fault": "status", "status": 500, "times": 2}),
    "too_many_requests": (set(CALLS), {"fault": "status", "status": 429}),
    "reset_before_body": (set(CALLS), {"fault": "reset_before_body", "times": 2}),
    "reset_in_body": (WITH_BODY, {"fault": "reset_in_body"}),
    "lost_reply": (set(CALLS), {"fault": "lost_reply"}),
    "reset_in_reply": (WITH_REPLY, {"fault": "reset_in_reply"}),
    "truncate_reply": (WITH_REPLY, {"fault": "truncate_reply"}),
    "reset_at_the_replys_end": (WITH_REPLY, {"fault": "reset_in_reply", "at": 60}),
    "black_hole": (set(CALLS), {"fault": "black_hole"}),
    "slow_body": (WITH_BODY - {"join_parts"}, {"fault": "slow_body", "rate": 2000}),
    "slow_reply": ({"get", "read_into"}, {"fault": "slow_reply", "rate": 200}),
    "delay": (set(CALLS), {"fault": "delay", "seconds": 0.1}),
    "flip_in_body": (WITH_BODY - {"join_parts"}, {"fault": "flip_in_body"}),
}


@pytest.mark.parametrize("name", ONCE)
def test_what_passes_is_not_noticed(stores: Stores, name: str) -> None:
    store, direct, fault_proxy = stores.patient, stores.direct, stores.proxy
    calls, settings = ONCE[name]
    fault = settings["fault"]
    prepare(direct, calls)
    for call in calls:
        fault_proxy.inject(operation=CALLS[call].requests, key=place(call), **settings)

    def action(call: str) -> None:
        wanted, key = CALLS[call], f"{call}/x"
        assert wanted.run(store, key) == wanted.done
        assert holds(direct, key) == wanted.after

    together({call: partial(action, call) for call in calls})
    times = settings.get("times", 1)
    assert fault_proxy.faults == {fault: times * len(calls)}, "each fault was met"
    lost = {"begin_parts"} & calls if fault in ("lost_reply", *_CUT_REPLIES) else set()
    left = {left.key for left in direct.unfinished()}
    # Where the machine stood still for longer than a reply is waited for, so may other ones be.
    slow = {f"{call}/x" for call in calls if asked_twice(fault_proxy, f"{call}/x")}
    assert left - slow == {f"{call}/x" for call in lost} - slow, (
        "an upload that was begun without the client's knowing is listed, and nothing else"
    )


def asked_twice(proxy: Any, key: str) -> bool:
    """Whether a request of an upload in parts came again although nothing broke it."""
    most = {"CreateMultipartUpload": 1, "CompleteMultipartUpload": 1, "UploadPart": PARTS}
    whole = [r.operation for r in proxy.requests if r.key.endswith(f"/{key}") and r.fault is None]
    return any(whole.count(operation) > count for operation, count in most.items())


_CUT_REPLIES = ("reset_in_reply", "truncate_reply")

FOREVER: dict[str, dict[str, Any]] = {
    "slow_down": {"fault": "status"},
    "reset_before_body": {"fault": "reset_before_body"},
    "reset_in_body": {"fault": "reset_in_body"},
    "lost_reply": {"fault": "lost_reply"},
    "truncate_reply": {"fault": "truncate_reply"},
    "black_hole": {"fault": "black_hole"},
    "slow_body": {"fault": "slow_body", "rate": 2000},
    "slow_reply": {"fault": "slow_reply", "rate": 200},
    "flip_in_body": {"fault": "flip_in_body"},
    "refused": {},
}


BROKEN_FOREVER: dict[str, set[str]] = {
    **dict.fromkeys(("reset_in_body", "slow_body", "flip_in_body"), WITH_BODY - {"join_parts"}),
    "slow_reply": {"get", "read_into"},
    "truncate_reply": WITH_REPLY,
    # These understand what has happened without a reply: see below.
    "lost_reply": set(CALLS) - {"join_parts", "put_if_absent", "put_if_match"},
}


@pytest.mark.parametrize("name", FOREVER)
def test_what_does_not_pass_is_said_in_time(stores: Stores, name: str) -> None:
    calls = BROKEN_FOREVER.get(name, set(CALLS))
    # What is refused for good ends by itself.
    store = stores.patient if name == "flip_in_body" else stores.hasty
    prepare(stores.direct, calls)
    if FOREVER[name]:
        for call in calls:
            wanted = CALLS[call]
            stores.proxy.inject(
                operation=wanted.requests, key=place(call), times=math.inf, **FOREVER[name]
            )

    def action(call: str) -> None:
        wanted = CALLS[call]
        started = time.monotonic()
        with pytest.raises(StoreError) as caught:
            wanted.run(store, f"{call}/x")
        assert time.monotonic() - started < HASTY.outage_seconds + SLACK_SECONDS
        error, said = caught.value, str(caught.value)
        if name != "refused" or call != "put_if_match":  # which reads first, in this test
            assert error.operation == wanted.operation
        assert said.startswith(f"{error.operation} {store.url}/{call}")
        assert error.attempts > 1 and f"tried {error.attempts} times" in said
        if name == "flip_in_body":  # again and again: a machine is broken, not a connection
            assert not error.transient and "did not arrive as they were sent" in said
        else:
            assert error.transient and "trying again may help" in said

    with stores.proxy.refuse() if name == "refused" else nullcontext():
        together({call: partial(action, call) for call in calls})
    stores.proxy.heal()
    for call in calls:
        wanted = CALLS[call]
        unchanged = None if wanted.fresh else SMALL
        done = [wanted.after] if name in ("lost_reply", "truncate_reply") else []
        assert holds(stores.direct, f"{call}/x") in [unchanged, *done]
    left = {left.key for left in stores.direct.unfinished()}
    assert left <= {f"{call}/x" for call in calls if call.endswith("parts")}
    stores.direct.remove_unfinished(older_than_seconds=-60)
    assert not stores.direct.unfinished(), "all that is left is listed"


# A condition whose reply is lost.


def test_a_conditional_write_knows_its_own_success(stores: Stores) -> None:
    fault = "lost_reply"
    store, direct = stores.patient, stores.direct
    stores.proxy.inject(fault, operation="PutObject", times=2)
    assert store.put_if_absent("a", b"mine")
    stores.proxy.inject(fault, operation="PutObject", times=2)
    assert not store.put_if_absent("a", b"other") and direct.get("a") == b"mine"
    etag = direct.get_with_etag("a")[1]
    stores.proxy.inject(fault, operation="PutObject", times=2)
    new = store.put_if_match("a", b"next", etag)
    assert direct.get_with_etag("a") == (b"next", new)
    stores.proxy.inject(fault, operation="PutObject")
    with pytest.raises(Conflict, match=f"put_if_match {store.url}/a"):
        store.put_if_match("a", b"other", etag)
    assert direct.get_with_etag("a") == (b"next", new)
    assert stores.proxy.faults == {fault: 7}


def test_a_conditional_write_that_was_overtaken_says_so(stores: Stores) -> None:
    """Its reply is lost, and before it can ask again another writer has come."""
    store, direct = stores.patient, stores.direct
    direct.put("a", [b"first"])
    etag = direct.get_with_etag("a")[1]
    stores.proxy.inject(
        "lost_reply", operation="PutObject", then=lambda: direct.put("a", [b"theirs"])
    )
    with pytest.raises(Conflict):
        store.put_if_match("a", b"mine", etag)
    assert direct.get("a") == b"theirs"


def test_a_lost_reply_forever_is_no_guess(stores: Stores) -> None:
    """The write has happened, its replies never come: true, or an error, but never false."""
    stores.proxy.inject("lost_reply", operation="PutObject", times=math.inf)
    stores.proxy.inject("lost_reply", operation="CompleteMultipartUpload", times=math.inf)
    for action in (
        lambda: stores.hasty.put_if_absent("a", b"mine"),
        lambda: stores.hasty.put_if_match("b", b"mine", None) != "",
        lambda: stores.hasty.put("c", LARGE) is None,
    ):
        with suppress(StoreError):
            assert action()
    assert stores.direct.get("a") == stores.direct.get("b") == b"mine"
    assert stores.direct.get("c") == b"".join(LARGE)


# What no patience helps against.


def test_expired_credentials_are_said_to_be_expired(stores: Stores) -> None:
    stores.proxy.inject("status", status=403, times=math.inf)
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"put .*/a: .*(expired|ExpiredToken)") as caught:
        stores.patient.put("a", [b"x"])
    assert time.monotonic() - started < SLACK_SECONDS
    assert "AKIA" not in str(caught.value)
    stores.proxy.heal()
    stores.patient.put("a", [b"x"])


def test_an_abort_that_fails_leaves_an_upload_that_is_listed(stores: Stores) -> None:
    stores.proxy.inject("status", operation="UploadPart", skip=1, times=math.inf)
    stores.proxy.inject("black_hole", operation="AbortMultipartUpload", times=math.inf)
    with pytest.raises(StoreError, match=r"put .*/a: .*trying again may help"):
        stores.hasty.put("a", LARGE)
    with pytest.raises(NotFound):
        stores.direct.get("a")
    assert [left.key for left in stores.direct.unfinished()] == ["a"]
