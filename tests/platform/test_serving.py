"""The endpoint as a client sees it: OpenAI's own, on a real server over a real (tiny) model."""

from __future__ import annotations

import base64
import http.server
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import uvicorn
from PIL import Image
from pydantic import ValidationError
from served_model import CONTEXT_LENGTH, write_folder
from typer.testing import CliRunner

from ringworld_platform.cli import app as command_line
from ringworld_platform.model_places import find_model
from ringworld_platform.serving.api_errors import ApiError
from ringworld_platform.serving.api_types import ChatRequest
from ringworld_platform.serving.app import create_app
from ringworld_platform.serving.asking import Asking
from ringworld_platform.serving.media import Media
from ringworld_platform.serving.ray_ring import Rank, RingShape
from ringworld_platform.serving.service import Service
from ringworld_platform.serving.settings import ServeSettings, digest_of
from ringworld_workers.generation.local_ring import LocalRing

SECONDS = 100.0
NAME = "tiny"
HELLO = [{"role": "user", "content": "the king"}]
LONG = {"messages": HELLO, "temperature": 0, "max_tokens": 1500}
"""Greedy, this model goes round in circles, and meets no eos."""


@contextmanager
def served(make_ring: Callable[[], Any] | None, **settings: Any) -> Iterator[tuple[str, Service]]:
    """A service on a port of its own; without ``make_ring`` it is loading for ever."""
    service = Service(ServeSettings(name=NAME, **settings))
    if make_ring is not None:
        service.load(make_ring)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(service), log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            until(lambda: server.started)
            if make_ring is not None:
                until(lambda: service.state != "loading")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
        finally:
            server.should_exit = True
            service.close()
            thread.join(SECONDS)


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], LocalRing]:
    folder = write_folder(tmp_path_factory.mktemp("served") / "weights")
    source = find_model(str(folder), Path("runs"))
    return lambda: LocalRing(source, device="cpu", chunk=64).__enter__()


@pytest.fixture(scope="module")
def endpoint(ring: Callable[[], LocalRing]) -> Iterator[tuple[str, Service]]:
    limits = {"max_body_bytes": 100_000, "max_answer_tokens": 1500, "max_prompt_tokens": 400}
    with served(ring, max_concurrent=16, max_queue=128, **limits) as found:
        yield found


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=SECONDS)


@pytest.fixture
def client(endpoint: tuple[str, Service]) -> openai.OpenAI:
    return client_of(endpoint[0])


def post(url: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    """Status, headers and body of a chat completion."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            return reply.status, reply.headers, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


def ask(**changes: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": HELLO, "max_tokens": 4} | changes


def test_whole_and_streamed_answers_are_the_same(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    asked: dict[str, Any] = ask(seed=7, max_tokens=20, temperature=0.7, top_p=0.9)
    whole = client.chat.completions.create(**asked)
    assert whole.usage is not None and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 20
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    *pieces, last = list(stream)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices[0].finish_reason == "length"
    assert last.usage == whole.usage and last.choices == []
    assert all("usage" in piece.model_fields_set and piece.usage is None for piece in pieces)
    completion = client.completions.create(model=NAME, prompt="the king", max_tokens=3)
    assert completion.usage is not None and completion.usage.completion_tokens == 3


def test_an_answer_is_sent_back_as_it_came(client: openai.OpenAI) -> None:
    messages: list[Any] = list(HELLO)
    for _ in range(2):
        answer = client.chat.completions.create(**ask(messages=messages)).choices[0].message
        messages += [answer, {"role": "user", "content": "And then?"}]
    assert len(messages) == 5


def test_a_stop_text_ends_the_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = ask(seed=1, max_tokens=30)
    whole = client.chat.completions.create(**asked).choices[0].message.content or ""
    stop = whole[3:5]
    answer = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content == whole[: whole.find(stop)]


def test_a_hundred_at_once_get_what_each_gets_alone(
    client: openai.OpenAI, endpoint: tuple[str, Service]
) -> None:
    def answer(number: int) -> str | None:
        messages: Any = [{"role": "user", "content": "king " * (1 + number % 5)}]
        made = client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=6, seed=number
        )
        return made.choices[0].message.content

    with ThreadPoolExecutor(100) as pool:
        together = list(pool.map(answer, range(100)))
    assert [answer(number) for number in range(0, 100, 20)] == together[::20]
    _, service = endpoint
    until(lambda: figures(endpoint[0])["inside"] == 0)
    engine, _ = service.ready()
    assert (engine.running, engine.waiting, engine.held_bytes, engine.held_tokens) == (0, 0, 0, 0)


def figures(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=SECONDS) as reply:
        lines = reply.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name.removeprefix("ringworld_serve_"): float(value) for name, value in pairs}


def test_a_client_that_goes_away_frees_its_row(
    client: openai.OpenAI, endpoint: tuple[str, Service]
) -> None:
    url = endpoint[0]
    gone = figures(url).get('requests_total{status="499"}', 0)
    with client.chat.completions.create(model=NAME, **LONG, stream=True) as stream:
        next(iter(stream))
        until(lambda: figures(url)["cache_bytes"] > 0)
    until(lambda: figures(url)["inside"] == figures(url)["cache_bytes"] == 0)
    body = json.dumps({"model": NAME, **LONG}).encode()
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as raw:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        )
        raw.sendall(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + body)
        until(lambda: figures(url)["cache_bytes"] > 0)
    until(lambda: figures(url)["inside"] == figures(url)["cache_bytes"] == 0)
    assert figures(url)['requests_total{status="499"}'] == gone + 2


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "no JSON"),
        (b"[" * 50_000, 400, "no JSON"),
        (ask(model="other"), 404, "'tiny' is"),
        (ask(temprature=1), 400, "did you mean 'temperature'"),
        (ask(temperature=-1), 400, "temperature"),
        (ask(n=2), 400, "n: Input should be 1"),
        (ask(tools=[{"type": "function"}]), 400, "tools"),
        (ask(messages=[]), 400, "messages"),
        (ask(messages=[*HELLO, *HELLO]), 400, "message"),
        (ask(max_tokens=2000), 400, f"trained for {CONTEXT_LENGTH:,}"),
        (ask(max_tokens=1501), 400, "writes 1,500 at most"),
        (ask(messages=[{"role": "user", "content": "a b" * 300}]), 400, "this server takes 400"),
        (ask(messages=[{"role": "user", "content": "x" * 100_000}]), 413, "100,000 bytes"),
        (ask(stop=[""]), 400, "stop"),
        (ask(seed="x"), 400, "seed"),
        (ask(seed=True), 400, "seed: Input should be a valid integer"),
        (ask(max_tokens="4"), 400, "max_tokens: Input should be a valid integer"),
        (ask(stream="no"), 400, "stream: Input should be a valid boolean"),
        (ask(messages=[{"role": "user", "content": []}]), 400, "empty"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    body: Any, status: int, words: str, endpoint: tuple[str, Service]
) -> None:
    found, _, reply = post(endpoint[0], body)
    assert (found, set(reply["error"])) == (status, {"message", "type", "param", "code"})
    assert words in reply["error"]["message"]


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [0] * 9},
        {"messages": [{"role": "user", "content": [0] * 9}]},
        {"stop": [""] * 9},
        {"modalities": ["audio"] * 9},
    ],
)
def test_of_a_long_list_the_first_fault_is_enough(changes: dict[str, Any]) -> None:
    """A body holds millions, and each would take a thousand bytes."""
    with pytest.raises(ValidationError) as found:
        ChatRequest.model_validate(ask(**changes))
    names = {next((key for key in each["loc"] if key == 0), None) for each in found.value.errors()}
    assert found.value.error_count() <= 2 and 0 in names


def test_many_fields_that_are_not_known_are_counted(endpoint: tuple[str, Service]) -> None:
    status, _, reply = post(endpoint[0], ask(**{f"x{n}": n for n in range(2000)}))
    assert status == 400 and "2,000 fields that are not served here" in reply["error"]["message"]


def test_other_kinds_of_requests_are_refused(endpoint: tuple[str, Service]) -> None:
    url = endpoint[0]
    assert post(url, ask(), **{"Content-Type": "text/plain"})[0] == 415
    assert post(url, ask(), Host="evil.example")[0] == 421
    status, _, reply = post(f"{url}/nowhere", ask())
    assert status == 404 and "nowhere" in reply["error"]["message"]


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 12), (200, 100, 0)).save(file, "PNG")
    return file.getvalue()


def clip() -> bytes:
    """Six frames."""
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (40 * n, 0, 0)) for n in range(6)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def with_part(part: dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "text", "text": "What is it?"}, part]
    return ask(messages=[{"role": "user", "content": content}])


def test_who_writes_of_vision_is_answered(endpoint: tuple[str, Service]) -> None:
    told = "the <vision> of the king <vision>"
    assert post(endpoint[0], ask(messages=[{"role": "user", "content": told}]))[0] == 200


def test_images_and_videos_are_part_of_the_prompt(endpoint: tuple[str, Service]) -> None:
    url, frame = endpoint[0], 5
    image = {"type": "image_url", "image_url": {"url": data_url("image/png", picture())}}
    video = {"url": data_url("image/gif", clip()), "num_frames": 3}
    lengths = []
    for part in (
        image,
        {"type": "video_url", "video_url": video},
        {"type": "input_video", "input_video": video | {"num_frames": 2}},
    ):
        status, _, reply = post(url, with_part(part))
        assert status == 200, reply
        lengths.append(reply["usage"]["prompt_tokens"])
    assert [lengths[1] - lengths[0], lengths[2] - lengths[0]] == [2 * frame, frame]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"image_url": {"url": "http://127.0.0.1/x.png"}}, "fetches nothing from 127.0.0.1"),
        ({"image_url": {"url": "file:///etc/passwd"}}, "give the bytes themselves"),
        ({"image_url": {"url": "http://[x"}}, "no URL"),
        ({"image_url": {"url": "data:image/png;base64,@@"}}, "base64 is broken"),
        ({"image_url": {"url": data_url("image/png", b"no picture")}}, "image"),
        ({"video_url": {"url": "data:,", "fps": -1}}, "fps"),
        ({"audio": {}}, "audio"),
    ],
)
def test_media_that_cannot_be_used_are_named(
    part: dict[str, Any], words: str, endpoint: tuple[str, Service]
) -> None:
    kind = next(iter(part))
    status, _, reply = post(endpoint[0], with_part({"type": kind, **part}))
    assert status == 400 and words in reply["error"]["message"]


def test_media_are_encoded_until_they_are_too_many(endpoint: tuple[str, Service]) -> None:
    _, asking = endpoint[1].ready()
    encoded: list[int] = []
    codebook = asking._coder.need_codebook("x")
    image = {"type": "image_url", "image_url": {"url": data_url("image/png", picture())}}
    video = {"url": data_url("image/gif", clip()), "num_frames": 6}
    film = {"type": "video_url", "video_url": video}

    class Counting:
        frame_size = codebook.frame_size

        def encode(self, frames: Any) -> Any:
            encoded.append(len(frames))
            return codebook.encode(frames)

    counted = Asking(replace(asking._coder, codebook=cast(Any, Counting())), endpoint[1].settings)
    # A prompt may have 400 tokens here, which are 80 frames.
    for parts, most in (([image] * 200, 81), ([film] * 20, 81), ([image] * 79 + [film] * 9, 81)):
        asked = ask(messages=[{"role": "user", "content": parts}])
        with pytest.raises(ApiError, match="more than 80 frames") as refused:
            counted.ask(ChatRequest.model_validate(asked))
        assert refused.value.body["error"]["code"] == "context_length_exceeded"
        assert sum(encoded) == most
        encoded.clear()


def test_a_text_far_too_long_is_not_encoded_as_a_whole(endpoint: tuple[str, Service]) -> None:
    _, asking = endpoint[1].ready()
    tokenizer, encoded = asking._coder.tokenizer, []

    class Counting:
        def encode(self, text: str) -> list[int]:
            encoded.append(len(text))
            return tokenizer.encode(text)

    coder = replace(asking._coder, tokenizer=cast(Any, Counting()))
    asked = ask(messages=[{"role": "user", "content": "king " * 200_000}])
    with pytest.raises(ApiError, match="more than 800 tokens, and may have 400") as refused:
        Asking(coder, endpoint[1].settings).ask(ChatRequest.model_validate(asked))
    assert refused.value.body["error"]["code"] == "context_length_exceeded"
    assert encoded == [1 << 18]


def test_media_come_only_from_hosts_that_were_named(ring: Callable[[], LocalRing]) -> None:
    class Files(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            moved = self.path == "/moved"
            self.send_response(302 if moved else 200)
            self.send_header("Location", "/picture.png")
            self.end_headers()
            self.wfile.write(b"" if moved else picture())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{files.server_port}"
        with served(ring, allowed_urls=(host,)) as (url, _):
            for path, status in (("picture.png", 200), ("moved", 400), ("no url", 400)):
                part = {"type": "image_url", "image_url": {"url": f"http://{host}/{path}"}}
                assert post(url, with_part(part))[0] == status
            part = {"type": "image_url", "image_url": {"url": f"http://{host}@localhost/x"}}
            assert post(url, with_part(part))[0] == 400
        files.shutdown()


def test_no_text_waits_for_media(ring: Callable[[], LocalRing]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        image = {"type": "image_url", "image_url": {"url": f"http://{host}/x.png"}}
        with served(ring, allowed_urls=(host,)) as (url, _), ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(post, url, with_part(image)) for _ in range(6)]
            held = [silent.accept()[0] for _ in range(2)]
            until(lambda: figures(url)["inside"] == 6)
            assert post(url, ask())[0] == 200 and not any(each.done() for each in asked)
            silent.close()
            for each in held:
                each.close()
            assert {each.result(SECONDS)[0] for each in asked} == {400}


def test_media_have_their_time(endpoint: tuple[str, Service]) -> None:
    _, asking = endpoint[1].ready()
    film = {"type": "video_url", "video_url": {"url": data_url("image/gif", clip())}}
    asked = ChatRequest.model_validate(with_part(film))
    hurried = Asking(asking._coder, replace(endpoint[1].settings, media_seconds=0.0))
    with pytest.raises(ApiError, match=r"not decoded within 0 s.*--media-timeout") as refused:
        hurried.ask(asked)
    assert refused.value.body["error"]["code"] == "media_timeout"
    seen: list[bool] = []
    with pytest.raises(ApiError):
        asking.ask(asked, lambda: seen.append(len(seen) == 3) or seen[-1])
    assert len(seen) == 4  # of which three were within the film


def test_a_host_that_sends_a_byte_now_and_then_is_left() -> None:
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer, suppress(OSError):
            peer.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            while not ended.wait(0.05):
                peer.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,), daemon=True)
        thread.start()
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        with ThreadPoolExecutor(1) as pool:
            media = Media((host,), 1 << 20, seconds=0.5)
            found = pool.submit(media.read, f"http://{host}/x", "here")
            try:
                with pytest.raises(ApiError, match="cannot be fetched"):
                    found.result(20.0)
            finally:
                ended.set()
        thread.join(SECONDS)


def test_what_is_too_much_is_told_to_come_back(ring: Callable[[], LocalRing]) -> None:
    with served(ring, max_concurrent=1, max_queue=1) as (url, service):
        with client_of(url).chat.completions.create(model=NAME, **LONG, stream=True) as stream:
            next(iter(stream))
            with client_of(url).chat.completions.create(model=NAME, **LONG, stream=True):
                until(lambda: service.ready()[0].waiting == 1)
                status, headers, reply = post(url, ask())
                assert status == 429 and int(headers["Retry-After"]) >= 1
                assert reply["error"]["type"] == "rate_limit_error"
        until(lambda: figures(url)["inside"] == 0)
        assert post(url, ask())[0] == 200


def test_a_cache_of_few_tokens_is_shared_in_turn(ring: Callable[[], LocalRing]) -> None:
    with served(ring, cache_tokens=150, max_concurrent=8) as (url, service):
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: post(url, ask(max_tokens=40))[0], range(6)))
        assert found == [200] * 6
        assert service.ready()[0].held_tokens == 0
        status, _, reply = post(url, ask(max_tokens=200))
        assert status == 400 and "cache has room for 150" in reply["error"]["message"]


def test_an_answer_has_its_time(ring: Callable[[], LocalRing]) -> None:
    with served(ring, timeout_seconds=0.2) as (url, _):
        status, _, reply = post(url, {"model": NAME, **LONG})
        assert status == 504 and reply["error"]["code"] == "timeout"
        hasty = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=SECONDS)
        with pytest.raises(openai.InternalServerError):
            hasty.chat.completions.create(model=NAME, **LONG)
        assert figures(url)['requests_total{status="504"}'] == 2  # it does not ask again
        with pytest.raises(openai.APIError, match=r"not answered within 0\.2 s"):
            list(client_of(url).chat.completions.create(model=NAME, **LONG, stream=True))
        until(lambda: figures(url)["cache_bytes"] == 0)


def test_what_is_not_begun_in_time_is_not_made(ring: Callable[[], LocalRing]) -> None:
    with served(ring, timeout_seconds=2.0) as (url, service):
        go = threading.Event()
        try:
            busy = [service.threads.submit(go.wait, SECONDS) for _ in range(4)]
            assert post(url, ask())[0] == 504
            left = service.threads._work_queue.get_nowait()
            assert left is not None
            until(left.future.cancelled)  # which the event loop does, after it has answered
        finally:
            go.set()
        assert all(each.result(SECONDS) for each in busy)


def test_nobody_is_let_in_without_the_key_nor_answered_before_the_model_is_there() -> None:
    key = "a-key-of-some-length"
    with served(None, key_digest=digest_of(key)) as (url, _):
        with pytest.raises(openai.AuthenticationError):
            client_of(url, "another-key-altogether").models.list()
        assert post(url, ask())[0] == 401
        with pytest.raises(openai.InternalServerError, match="being loaded") as refused:
            client_of(url, key).chat.completions.create(**ask())
        assert refused.value.status_code == 503 and refused.value.response.headers["Retry-After"]
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(f"{url}/health", timeout=SECONDS)
        assert told.value.code == 503 and json.loads(told.value.read())["status"] == "loading"
        assert figures(url)["ready"] == 0


def test_a_ring_that_is_lost_ends_what_is_in_flight(ring: Callable[[], LocalRing]) -> None:
    with served(ring) as (url, service), ThreadPoolExecutor(1) as pool:
        whole = pool.submit(post, url, {"model": NAME, **LONG})
        until(lambda: figures(url)["cache_bytes"] > 0)
        service.fail(RuntimeError("rank 1 of the ring is lost"))
        status, _, reply = whole.result(SECONDS)
        assert status == 500 and "rank 1 of the ring is lost" in reply["error"]["message"]
        status, headers, reply = post(url, ask())
        assert (status, reply["error"]["code"]) == (503, "ring_lost") and headers["Retry-After"]


def test_a_row_that_cannot_be_drawn_ends_alone(ring: Callable[[], LocalRing]) -> None:
    made = ring()
    damaged = made.asker.loaded.tokenizer.encode("Q")
    made.asker.loaded.model.text_embed.weight.data[damaged] = float("nan")
    bad: Any = ask(messages=[{"role": "user", "content": "Q"}])
    with served(lambda: made) as (url, service):
        with client_of(url).chat.completions.create(model=NAME, **LONG, stream=True) as stream:
            next(iter(stream))
            status, headers, reply = post(url, bad)
            assert (status, reply["error"]["code"]) == (500, "engine_error")
            assert headers["x-should-retry"] == "false"
            assert reply["error"]["type"] == "server_error" and "NaN" in reply["error"]["message"]
            with pytest.raises(openai.APIError, match="NaN"):
                list(client_of(url).chat.completions.create(**bad, stream=True))
            assert service.ready()[0].running == 1
            assert [next(stream).choices[0].finish_reason for _ in range(5)] == [None] * 5
        until(lambda: figures(url)["cache_bytes"] == 0)


def test_a_model_that_cannot_be_loaded_says_why() -> None:
    def broken() -> Any:
        raise ValueError("the weights are damaged")

    with served(broken) as (url, service):
        assert service.state == "failed"
        assert "the weights are damaged" in post(url, ask())[2]["error"]["message"]


def test_a_rank_that_cannot_load_says_so_before_the_ranks_meet(tmp_path: Path) -> None:
    source = find_model(str(write_folder(tmp_path / "weights")), Path("runs"))
    rank, shape = Rank(), RingShape(size=2)
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(rank.loaded)
        with pytest.raises(ValueError, match="no such folder"):
            rank.load(replace(source, folder="nowhere"), shape, 1, "127.0.0.1", 9)
        assert "no such folder" in said.result(SECONDS)


def test_the_command_refuses_what_is_unsafe(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("k" * 20)
    key.chmod(0o644)
    short = tmp_path / "short"
    short.write_text("secret")
    short.chmod(0o600)
    for options, words in (
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", str(key)], "chmod 600"),
        (["--api-key-file", str(short)], "has 6 characters"),
        (["--api-key-file", str(tmp_path / "none")], "cannot be read"),
    ):
        found = CliRunner().invoke(command_line, ["serve", "weights", *options])
        said = " ".join(found.output.replace("│", " ").split())
        assert found.exit_code == 2 and words in said and "secret" not in said
