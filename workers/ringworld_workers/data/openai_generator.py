"""Questions from any OpenAI-compatible endpoint, asked once each: what is answered is kept on disk.

It is spoken to over the standard library: one POST of JSON needs no dependency, and what has to be
right here (deadlines, pauses, who may see the key) no client does alone.
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ringworld_jobs.recipe_text import GeneratorSpec
from ringworld_workers.data.files import Unavailable
from ringworld_workers.data.qa_generator import NoQuestion, QuestionAnswer
from ringworld_workers.data.work import written_whole

INSTRUCTION = (
    "You write reading-comprehension questions. From the passage you are given, write one question "
    "about one specific fact that is stated in it, and its short answer in the passage's own "
    "words. The question will be asked about a much longer text that contains the passage, so it "
    "must name what it is about and never mention a passage. Reply with one JSON object and "
    'nothing else: {"question": "...", "answer": "..."}'
)
"""What the model is told before each chunk; part of the cache's key."""

MAX_REPLY_BYTES = 1 << 20
MAX_CHARS = 2_000
"""Of a question, and of an answer."""
MAX_PAUSE_SECONDS = 300.0
"""An endpoint that asks for a longer pause stops the build; started again later, it goes on."""

_WORTH_A_RETRY = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to whatever host it names."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none."""


class _Retry(Exception):
    """What went wrong, and how long the endpoint wants to be left alone."""

    def __init__(self, reason: str, pause_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.pause_seconds = reason, pause_seconds


class OpenAiGenerator:
    """Asks an endpoint, several chunks at a time."""

    def __init__(self, spec: GeneratorSpec, cache: Path, first_pause_seconds: float = 1.0) -> None:
        """Remember whom to ask; nothing is sent yet.

        Args:
            spec: the endpoint, with a url and a model.
            cache: folder of the answers, one file each under a digest of model, prompt and chunk;
                shared by all workers, created where needed.
            first_pause_seconds: before the first retry; doubled before each further one.
        """
        self._spec, self._cache, self._first_pause = spec, cache, first_pause_seconds
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, chunks: Sequence[str], document: str) -> list[QuestionAnswer | NoQuestion]:
        """One question a chunk; a chunk whose replies stay malformed has none.

        Raises:
            Unavailable: the endpoint cannot be reached, refuses, or fails in spite of all retries.
                What was answered until then is in the cache.
        """
        errors: list[Unavailable] = []
        stop = threading.Event()

        def one(chunk: str) -> QuestionAnswer | NoQuestion:
            try:
                return self._one(chunk, stop)
            except Unavailable as error:
                errors.append(error)
                stop.set()
                raise

        with ThreadPoolExecutor(self._spec.concurrency) as pool:
            try:
                return list(pool.map(one, chunks))
            except Unavailable:
                # The first to fail says why; the others have merely stopped.
                raise errors[0] from None
            finally:
                stop.set()

    def _one(self, chunk: str, stop: threading.Event) -> QuestionAnswer | NoQuestion:
        place = self._place(chunk)
        with suppress(OSError, ValueError):  # absent, or torn by a full disk: it is asked again
            return parse_reply(place.read_text(encoding="utf-8"))
        if stop.is_set():
            raise Unavailable("stopped")
        reason = ""
        for attempt in range(self._spec.retries + 1):
            try:
                answer = parse_reply(self._complete(chunk, stop))
            except ValueError as error:
                if isinstance(error, Unavailable):
                    raise
                reason = str(error)
                if attempt < self._spec.retries:
                    self._pause(attempt, stop)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            content = {"question": answer.question, "answer": answer.answer}
            with written_whole(place) as path:
                path.write_text(json.dumps(content), encoding="utf-8")
            return answer
        return NoQuestion(
            f"the replies of {self._spec.model} are malformed, {self._spec.retries + 1} of them: "
            f"{reason}",
            unusable=True,
        )

    def _place(self, chunk: str) -> Path:
        spec = self._spec
        key = json.dumps([spec.model, spec.temperature, INSTRUCTION, chunk])
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self._cache / digest[:2] / f"{digest}.json"

    def _complete(self, chunk: str, stop: threading.Event) -> str:
        """The model's reply, after as many tries as allowed.

        Raises:
            Unavailable: no try succeeded, or trying again cannot help.
            ValueError: a reply of another form.
        """
        for attempt in range(self._spec.retries + 1):
            try:
                return _content(self._post(chunk))
            except _Retry as failure:
                if attempt == self._spec.retries:
                    raise Unavailable(
                        f"generator.url: {self._spec.url} failed {attempt + 1} times, the last "
                        f"time with: {failure.reason}. What was answered is kept: start the build "
                        f"again when the endpoint is well, or raise retries or timeout"
                    ) from None
                self._pause(attempt, stop, failure.pause_seconds)
        raise AssertionError("the loop above returns or raises")

    def _pause(self, attempt: int, stop: threading.Event, least_seconds: float = 0.0) -> None:
        """Wait, doubling, and jittered so that requests in flight do not come back together.

        Raises:
            Unavailable: ``stop`` was set meanwhile.
        """
        pause = min(MAX_PAUSE_SECONDS, self._first_pause * 2.0**attempt)
        if stop.wait(max(least_seconds, pause * random.uniform(0.5, 1.0))):
            raise Unavailable("stopped")

    def _post(self, chunk: str) -> bytes:
        spec = self._spec
        body = {
            "model": spec.model,
            "temperature": spec.temperature,
            "messages": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": chunk},
            ],
        }
        key = self._key()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            spec.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
        )
        deadline = time.monotonic() + spec.timeout
        try:
            with self._opener.open(request, timeout=spec.timeout) as response:
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, key) from None
        except TimeoutError:
            raise _Retry(f"no answer within timeout, {spec.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _Retry(f"{type(reason).__name__}: {reason}") from None

    def _refusal(self, error: urllib.error.HTTPError, key: str) -> Exception:
        status = f"HTTP {error.code} {error.reason}"
        if error.code in _WORTH_A_RETRY:
            pause = _retry_after(error.headers.get("Retry-After"), time.time)
            if pause <= MAX_PAUSE_SECONDS:
                return _Retry(status, pause)
            return Unavailable(
                f"generator.url: {self._spec.url} answers {status} and wants to be left alone for "
                f"{pause:,.0f} s; start the build again then, what was answered is kept"
            )
        said = ""
        with suppress(OSError, http.client.HTTPException):
            said = " ".join(error.read(2_000).decode("utf-8", "replace").split())[:200]
        if key:
            said = said.replace(key, "(the key)")
        variable = self._spec.api_key_variable
        remedy = "correct generator.url or generator.model"
        if error.code in (401, 403):
            remedy = f"{'replace' if key else 'set'} the key in the environment variable {variable}"
        elif 300 <= error.code < 400:
            remedy = "give the address that it redirects to"
        return Unavailable(f"generator.url: {self._spec.url} answers {status}: {said}; {remedy}")

    def _key(self) -> str:
        variable = self._spec.api_key_variable
        key = os.environ.get(variable, "").strip()
        if not key.isascii() or any(
            not character.isprintable() or character == " " for character in key
        ):
            raise Unavailable(
                f"the environment variable {variable} holds no key: there are spaces or control "
                f"characters in it"
            )
        return key


def parse_reply(text: str) -> QuestionAnswer:
    """A question and an answer from a model's reply: one JSON object, fenced or not.

    Raises:
        ValueError: anything else; says what is wrong.
    """
    content = text.strip()
    if content.startswith("```") and content.endswith("```") and "\n" in content:
        content = content[content.index("\n") : -3].strip()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"not one JSON object: {content[:60]!r}") from None
    if not isinstance(found, dict):
        raise ValueError(f"not a JSON object: {content[:60]!r}")
    values = []
    for key in ("question", "answer"):
        value = found.get(key)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{key!r} is no text: {str(value)[:60]!r}")
        if len(value) > MAX_CHARS:
            raise ValueError(f"{key!r} has {len(value):,} characters; the limit is {MAX_CHARS:,}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{key!r} holds half a surrogate pair") from None
        values.append(" ".join(value.split()))
    return QuestionAnswer(*values)


def _content(reply: bytes) -> str:
    """The first choice's text.

    Raises:
        ValueError: it is no chat completion.
    """
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"no chat completion: {reply[:60]!r}") from None
    if not isinstance(content, str):
        raise ValueError("the completion holds no text")
    return content


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole reply; the socket's own timeout starts anew with every byte that drips in."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise _Retry(f"a reply above the limit of {MAX_REPLY_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def _retry_after(value: str | None, now: Callable[[], float]) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 where it says neither."""
    if not value:
        return 0.0
    with suppress(ValueError):
        seconds = float(value)
        return seconds if 0 <= seconds < float("inf") else 0.0
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now())
    return 0.0
