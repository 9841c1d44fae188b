"""What only S3 has: parts, uploads that were left, credentials, buckets, pages."""

from __future__ import annotations

import os
import tracemalloc
import uuid
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from ringworld_workers.store.base import NotFound, StoreError
from ringworld_workers.store.opening import open_store
from ringworld_workers.store.retry import HASTE
from ringworld_workers.store.s3_body import part_size
from ringworld_workers.store.s3_store import PART_BYTES, S3Store

PART = 5 << 20


def split(data: bytes, *lengths: int) -> Iterator[memoryview]:
    view = memoryview(data)
    for length in lengths:
        yield view[:length]
        view = view[length:]
    yield view


@pytest.fixture
def client(s3_url: str) -> Any:
    return boto3.client("s3")


def test_parts_come_together_at_every_size(s3_url: str, client: Any) -> None:
    store = S3Store(s3_url, part_bytes=PART)
    data = os.urandom(2 * PART + 7)
    for size in (0, 1, PART - 1, PART, PART + 1, 2 * PART, len(data)):
        chunks = split(data[:size], 3, PART // 2, 0, PART // 3, 1)
        store.put("x", chunks)
        found = bytearray(size)
        store.read_into("x", 0, [memoryview(found)[: size // 3], memoryview(found)[size // 3 :]])
        assert found == data[:size], size
        head = client.head_object(Bucket="runs", Key=f"{store.prefix}/x", ChecksumMode="ENABLED")
        assert head["ContentLength"] == size
        assert head.get("ChecksumCRC32C"), "the server knows the checksum"
        assert ("-" in head["ETag"]) == (size > PART)
    assert store.unfinished() == []


def test_the_largest_object_has_fewer_than_ten_thousand_parts() -> None:
    sizes = [part_size(number, PART_BYTES) for number in range(10_000)]
    assert sum(sizes) >= 5 << 40
    assert max(sizes) <= 5 << 30
    assert set(sizes[:1000]) == {PART_BYTES}, "checkpoints of up to 62 GiB a rank"


def test_a_source_that_breaks_leaves_no_parts(s3_url: str) -> None:
    store = S3Store(s3_url, part_bytes=PART)
    store.put("k", [b"old"])

    def chunks() -> Iterator[bytes]:
        for _ in range(3):
            yield bytes(PART)
        raise ValueError("the source broke")

    with pytest.raises(ValueError, match="the source broke"):
        store.put("k", chunks())
    assert store.get("k") == b"old"
    assert store.unfinished() == []


def test_uploads_that_were_left_are_listed_and_aborted(s3_url: str, client: Any) -> None:
    store = S3Store(s3_url)
    for key in ("run/a", "run/a", "run/deep/b", "running"):
        place = {"Bucket": "runs", "Key": f"{store.prefix}/{key}"}
        upload = client.create_multipart_upload(**place)["UploadId"]
        client.upload_part(**place, UploadId=upload, PartNumber=1, Body=b"part")
    assert store.list() == []
    assert sorted(left.key for left in store.unfinished("run")) == ["run/a", "run/a", "run/deep/b"]
    assert len(store.unfinished()) == 4
    assert store.remove_unfinished("run") == 0, "they may belong to a writer that is alive"
    assert store.remove_unfinished("run/deep", older_than_seconds=-1) == 1
    assert store.remove_unfinished("run", older_than_seconds=-1) == 2
    store.delete_prefix("running")
    assert len(store.unfinished()) == 1, "a prefix is a folder"
    assert store.remove_unfinished(older_than_seconds=-1) == 1


def test_more_than_a_page_holds(s3_url: str, client: Any) -> None:
    store = S3Store(s3_url, page_keys=3)
    names = [f"many/{number}/x" for number in range(10)]
    for name in names:
        store.put(name, [b""])
        client.create_multipart_upload(Bucket="runs", Key=f"{store.prefix}/{name}")
    assert [info.key for info in store.list("many")] == names
    assert list(store.folders("many")) == [str(number) for number in range(10)]
    assert sorted(left.key for left in store.unfinished("many")) == names
    store.delete_prefix("many")
    assert store.list() == [] == store.unfinished()


def test_large_objects_are_not_copied(s3_url: str) -> None:
    store = S3Store(s3_url, part_bytes=32 << 20)
    data = bytearray(66 << 20)
    data[:: 1 << 20] = bytes(range(66))
    view = memoryview(data)
    back = bytearray(len(data))
    chunks = [view[first : first + (8 << 20)] for first in range(0, len(data), 8 << 20)]
    store.list()  # boto3's own models
    tracemalloc.start()
    try:
        store.put("x", chunks)
        store.read_into("x", 0, [memoryview(back)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert back == data
    assert peak < 8 << 20


def said_by(store: S3Store) -> str:
    with pytest.raises(StoreError) as caught:
        store.check_writable()
    for secret in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        assert os.environ.get(secret, "none is set") not in str(caught.value)
    return str(caught.value)


def test_check_writable_says_what_is_missing(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    store = S3Store(s3_url)
    store.check_writable()
    assert store.list() == []
    said = said_by(S3Store("s3://no-such-bucket/x"))
    assert "there is no bucket no-such-bucket at http://127.0.0.1:" in said
    assert "aws s3 mb s3://no-such-bucket" in said

    with monkeypatch.context() as changed:
        changed.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert "does not accept the credentials (SignatureDoesNotMatch)" in said_by(S3Store(s3_url))
        changed.setenv("AWS_ACCESS_KEY_ID", "NOBODYKNOWSME")
        assert "does not accept the credentials (InvalidAccessKeyId)" in said_by(S3Store(s3_url))
    with monkeypatch.context() as changed:
        changed.delenv("AWS_ACCESS_KEY_ID")
        changed.delenv("AWS_SECRET_ACCESS_KEY")
        changed.setenv("AWS_EC2_METADATA_DISABLED", "true")
        changed.setenv("HOME", str(tmp_path))
        assert "no complete credentials were found; set AWS_PROFILE" in said_by(S3Store(s3_url))
    with monkeypatch.context() as changed:
        changed.setenv("AWS_PROFILE", "nobody")
        assert "nobody) could not be found; correct AWS_PROFILE" in said_by(S3Store(s3_url))
    with monkeypatch.context() as changed:
        changed.setenv("AWS_ENDPOINT_URL_S3", "127.0.0.1:9")
        assert "the endpoint is no url; write https://HOST:PORT" in said_by(S3Store(s3_url))
        changed.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        said = said_by(S3Store(s3_url))
        assert "nothing answers there" in said
        assert "http://127.0.0.1:9; the endpoint comes from AWS_ENDPOINT_URL_S3" in said
        assert "trying again may help" in said


def test_an_absent_bucket_is_no_absent_object(s3_url: str) -> None:
    store = S3Store("s3://no-such-bucket")
    for action in (
        lambda: store.get("a"),
        lambda: store.read_into("a", 0, [memoryview(bytearray(1))]),
        lambda: store.list(),
        lambda: store.put("a", [b"x"]),
        lambda: store.unfinished(),
    ):
        with pytest.raises(StoreError, match="there is no bucket no-such-bucket") as caught:
            action()
        assert not isinstance(caught.value, NotFound)
        assert not caught.value.transient


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://", "no bucket is named; write s3://BUCKET/PREFIX"),
        ("s3:///run", "no bucket is named"),
        ("s3://Runs/x", "'Runs' is no bucket's name"),
        ("s3://ab", "'ab' is no bucket's name"),
        ("s3://localhost:8333/runs", "is no bucket's name.*AWS_ENDPOINT_URL_S3"),
        ("s3://runs/x?endpoint=http://h", "has no [?].*endpoint comes from AWS_ENDPOINT_URL_S3"),
        ("s3://runs/../x", "not a key"),
        ("s3://runs/a//b", "not a key"),
        ("s3://runs/%2e%2e/b", "not a key"),
    ],
)
def test_odd_urls_are_refused(url: str, reason: str) -> None:
    with pytest.raises(StoreError, match=reason):
        open_store(url)


def test_a_password_in_a_url_is_not_repeated() -> None:
    with pytest.raises(StoreError, match="credentials do not belong into a url") as caught:
        open_store("s3://key:pass@word@runs/x")
    assert "pass" not in str(caught.value).replace("password", "")


def test_a_whole_bucket_is_a_store(s3_url: str) -> None:
    name = uuid.uuid4().hex
    store = S3Store("s3://runs", patience=HASTE)
    store.put(f"{name}/a", [b"1"])
    assert [info.key for info in store.list(name)] == [f"{name}/a"]
    assert name in store.folders()
    store.delete_prefix(name)
    assert store.list(name) == []
