"""Datasets behind s3://: fetched once a node, verified, bounded on disk, retried, named in errors.

The server speaks as much of S3 as reading takes, over real sockets, and can be told to fail.
"""

from __future__ import annotations

import http.server
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest

from ringworld_jobs.spec import DataSpec, StageSpec
from ringworld_workers.data import shard_places
from ringworld_workers.data.files import DataError
from ringworld_workers.data.loader import StageLoader
from ringworld_workers.data.shard_cache import ShardCache
from ringworld_workers.data.shard_format import ShardEntry
from ringworld_workers.data.shards import Dataset

DatasetWriter = Callable[..., Path]
Fault = Callable[[str, int], str]


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder as a bucket. ``fault(key, number)`` spoils a key's number-th GET."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.gets: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.fault: Fault = lambda key, number: ""

    def url(self, folder: str) -> str:
        host = f"127.0.0.1:{self.server_address[1]}"
        return f"s3://bucket/{folder}?endpoint_override={host}&scheme=http&region=us-east-1"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        key = self.path.partition("?")[0].removeprefix("/bucket/")
        fault = ""
        if body:
            with self.server.lock:
                self.server.gets[key] += 1
                fault = self.server.fault(key, self.server.gets[key])
        path = self.server.root / key
        if fault.isdecimal():
            self._error(int(fault), "SlowDown")
            return
        if not path.is_file():
            self._error(404, "NoSuchKey")
            return
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if "Range" in self.headers:
            begin, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end), last)
        part = bytearray(content[first : last + 1])
        if fault == "flip":
            part[len(part) // 2] ^= 1
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Last-Modified", formatdate(0, usegmt=True))
        self.send_header("ETag", '"etag"')
        self.end_headers()
        if not body:
            return
        with self.server.lock:
            self.server.bytes[key] += len(part)
        if fault == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(part)

    def _error(self, status: int, code: str) -> None:
        content = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(shard_places, "RETRY_SECONDS", 3.0)
    (tmp_path / "bucket").mkdir()
    with Server(tmp_path / "bucket") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture
def folder(server: Server, write_dataset: DatasetWriter) -> Path:
    """Twenty shards of one example each, and a held-out split."""
    lengths = np.random.default_rng(1).integers(40, 120, 20).tolist()
    splits = {"train": lengths, "held_out": [60]}
    return write_dataset(server.root / "texts", splits, batch_tokens=1, file_bytes=1)


def used_bytes(cache: ShardCache) -> int:
    """Bytes of its files, while others change them."""
    with cache._locked():
        return sum(path.stat().st_size for path in cache.folder.iterdir())


def stage() -> StageSpec:
    return StageSpec.model_validate(
        {
            "name": "short",
            "context_length": 128,
            "rope_theta": 1e4,
            "steps": 10,
            "global_batch_tokens": 512,
            "mixture": {"texts": 1.0},
            "learning_rate": {"peak": 1e-3},
        }
    )


def test_rows_are_those_of_the_folder_and_the_cache_keeps_its_bound(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    local = StageLoader({"texts": str(folder)}, stage(), 0)
    largest = sorted(entry["bytes"] for entry in Dataset(folder, "train").entries)[-8:]
    bound = sum(largest) + 1
    data = DataSpec.model_validate(
        {"shard_cache": {"folder": str(tmp_path / "cache"), "max_bytes": bound}}
    )
    remote = StageLoader({"texts": server.url("texts")}, stage(), 0, data=data)
    for step in range(15):
        expected, found = local.step_rows(step), remote.step_rows(step)
        assert [b.tokens.tolist() for b in found] == [b.tokens.tolist() for b in expected]
        assert 0 < used_bytes(ShardCache(tmp_path / "cache", bound)) <= bound
    assert remote.held_out_rows("text", 3)
    assert server.gets["texts/held_out-00000.arrow"] == 1
    assert all(server.gets[f"texts/train-{n:05d}.arrow"] for n in range(20))
    with pytest.raises(DataError, match=rf"max_bytes={bound // 2:,} is too small.*{bound - 1:,}"):
        Dataset(server.url("texts"), "train", ShardCache(tmp_path / "cache", bound // 2))


def test_a_few_failed_reads_are_tried_again(server: Server, folder: Path, tmp_path: Path) -> None:
    faults = {1: "503", 2: "cut", 3: "flip"}
    server.fault = lambda key, number: faults.get(number, "") if "train-" in key else ""
    dataset = Dataset(server.url("texts"), "train", ShardCache(tmp_path / "cache", 1 << 20))
    expected = Dataset(folder, "train")
    assert dataset.read(3).tokens.tolist() == expected.read(3).tokens.tolist()
    assert server.gets["texts/train-00003.arrow"] == 4
    assert not list((tmp_path / "cache").glob("*.part"))


def test_what_stays_broken_is_named(server: Server, folder: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    dataset = Dataset(server.url("texts"), "train", cache)
    server.fault = lambda key, number: "503" if "00001" in key else "flip"
    with pytest.raises(DataError, match=r"s3://bucket/texts/train-00001.arrow \(tried \d+ times"):
        dataset.read(1)
    with pytest.raises(DataError, match=r"s3://bucket/texts/train-00002.arrow is damaged: .*sha"):
        dataset.read(2)
    server.fault = lambda key, number: ""
    (folder / "train-00004.arrow").write_bytes(b"short")
    with pytest.raises(DataError, match=r"train-00004.arrow has 5 bytes, \d+ were written"):
        dataset.read(4)
    (folder / "train-00005.arrow").unlink()
    with pytest.raises(DataError, match=r"s3://bucket/texts/train-00005.arrow is missing"):
        dataset.read(5)
    assert not list((tmp_path / "cache").glob("*.part"))
    dataset.read(1)
    server.fault = lambda key, number: "flip" if key.endswith(".npy") else ""
    with pytest.raises(DataError, match=r"s3://bucket/texts/train.lengths.npy is damaged"):
        Dataset(server.url("texts"), "train", cache)
    with pytest.raises(DataError, match=r"s3://bucket/nothing holds no meta.json"):
        Dataset(server.url("nothing"), "train", cache)
    with pytest.raises(DataError, match=r"gs://bucket/texts cannot be read here; .* s3://"):
        Dataset("gs://bucket/texts", "train", cache)


def test_the_ranks_of_a_node_download_a_shard_once(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    # What a killed rank left behind: nobody holds its lock.
    entry = Dataset(folder, "train").entries[0]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{entry['sha256']}.part").write_bytes(b"\0" * entry["bytes"])
    begin = threading.Barrier(4)

    def read_all(_: int) -> list[int]:
        # Each has a cache object of its own: a lock belongs to the open file, as between processes.
        dataset = Dataset(server.url("texts"), "train", ShardCache(tmp_path / "cache", 1 << 20))
        begin.wait(30)
        return [len(dataset.read(index)) for index in range(len(dataset))]

    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(read_all, range(4), timeout=60))
    assert all(lengths == Dataset(folder, "train").lengths.tolist() for lengths in found)
    shards = {key: number for key, number in server.gets.items() if key.endswith(".arrow")}
    assert set(shards.values()) == {1}
    assert len(shards) == len(list((tmp_path / "cache").glob("*.arrow"))) == 20


def test_ranks_that_push_each_others_shards_out_all_get_theirs(tmp_path: Path) -> None:
    entries = [
        ShardEntry(file=f"{n}", examples=1, tokens=1, bytes=1000, sha256=f"{n}", lengths_sha256="")
        for n in range(8)
    ]

    def read_some(rank: int) -> None:
        cache = ShardCache(tmp_path / "cache", 6000)  # a shard for each rank, and two more
        for n in np.random.default_rng(rank).integers(0, 8, 60):
            content = bytes([n]) * 1000
            with cache.open(entries[n], lambda file, content=content: file.write(content)) as shard:
                assert shard.read() == content
            assert used_bytes(cache) <= 6000

    with ThreadPoolExecutor(4) as ranks:
        list(ranks.map(read_some, range(4), timeout=60))


def test_the_next_shards_are_fetched_ahead(server: Server, folder: Path, tmp_path: Path) -> None:
    fetched = threading.Event()

    def watch(key: str, number: int) -> str:
        # Sixteen are the block at hand and the next one.
        if len([k for k in server.gets if "train-" in k]) >= 16:
            fetched.set()
        return ""

    server.fault = watch
    data = DataSpec.model_validate({"shard_cache": {"folder": str(tmp_path / "cache")}})
    loader = StageLoader({"texts": server.url("texts")}, stage(), 0, data=data)
    loader.step_rows(0)  # four rows: some of the first eight shards
    assert fetched.wait(20)
