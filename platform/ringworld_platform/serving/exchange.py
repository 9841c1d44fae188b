"""A request from its first byte to its answer's last: place, body, limits, stream, and its end."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ringworld_platform.serving.api_errors import ApiError
from ringworld_platform.serving.api_types import ChatRequest, CompletionRequest, parse
from ringworld_platform.serving.flow import ClientGone, Flow
from ringworld_platform.serving.replies import Finish, Reply
from ringworld_platform.serving.service import Service

if TYPE_CHECKING:
    from ringworld_model.sampling.answer import Event
    from ringworld_workers.generation.asks import Ask

log = logging.getLogger(__name__)

GONE = 499
"""What a request is counted as whose client went away; it is never sent."""
_BEAT_SECONDS = 10.0
"""A stream that has nothing to say says so: else a client takes it for dead."""
_JSON = "application/json"


class Exchange(Response):
    """Answers one request. A response of its own kind: it alone reads what the client sends."""

    def __init__(self, service: Service, reply: Reply) -> None:
        """Say who answers, and in which shape."""
        super().__init__()
        self._service, self._reply = service, reply
        self._begun = time.monotonic()
        self._began = False
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say why not; whatever happens, nothing of it is held afterwards."""
        status, settings = GONE, self._service.settings
        try:
            with self._service.place():
                try:
                    async with asyncio.timeout(settings.timeout_seconds):
                        await self._answer(Request(scope, receive), scope, receive, send)
                    status = 200
                except TimeoutError:
                    raise ApiError(
                        504,
                        f"not answered within {settings.timeout_seconds:g} s; ask for fewer "
                        "tokens, or try again when there is less to do",
                        code="timeout",
                        again=False,
                    ) from None
        except ApiError as error:
            status = error.status
            await self._refuse(error, scope, receive, send)
        except (ClientGone, ClientDisconnect):
            pass
        except Exception:
            log.exception("a request failed")
            status = 500
            internal = ApiError(500, "an internal error; the server's log has the trace")
            await self._refuse(internal, scope, receive, send)
        finally:
            self._service.metrics.ended(status, time.monotonic() - self._begun)

    async def _answer(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        engine, asking = self._service.ready()
        asked = parse(self._reply.request, await self._body(request))
        self._check_model(asked.model)
        gone = asyncio.create_task(_until_gone(receive))
        try:
            has_media = isinstance(asked, ChatRequest) and asked.has_media
            pool = self._service.media_threads if has_media else self._service.threads
            given_up = threading.Event()
            thread = asyncio.get_running_loop().run_in_executor(
                pool, asking.ask, asked, given_up.is_set
            )
            either: set[asyncio.Future[Any]] = {thread, gone}
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not thread.done():
                    raise ClientGone
            finally:
                # Also where its time is over: nothing is made for nobody.
                thread.cancel()
                given_up.set()
            ask: Ask = thread.result()
            self._reply.prompt_tokens = len(ask.prompt)
            self._service.metrics.asked(len(ask.prompt))
            flow = Flow(engine, ask, gone)
            try:
                await self._write(flow, asked, scope, receive, send)
            finally:
                flow.close()
        finally:
            gone.cancel()

    async def _write(
        self,
        flow: Flow,
        asked: ChatRequest | CompletionRequest,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        reply = self._reply
        if not asked.stream:
            text, finish = "", None
            async for events in flow.events():
                more, finish = self._take(events)
                text += more
            await JSONResponse(reply.whole(text, _finish(finish)))(scope, receive, send)
            return
        reply.tells_usage = asked.stream_options is not None and asked.stream_options.include_usage
        await self._start(send)
        first = reply.first()
        if first is not None:
            await _send(send, first)
        async for events in flow.events(_BEAT_SECONDS):
            text, finish = self._take(events)
            if not events:
                await _send_line(send, ": waiting")
            elif text or finish:
                await _send(send, reply.piece(text, _finish(finish) if finish else None))
        if reply.tells_usage:
            await _send(send, reply.last())
        await _send_line(send, "data: [DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _take(self, events: list[Event]) -> tuple[str, str | None]:
        """Text of some events, and why the last ended the answer."""
        tokens = sum(event.token is not None for event in events)
        self._reply.answer_tokens += tokens
        self._service.metrics.wrote(tokens)
        if tokens and not self._began:
            self._began = True
            self._service.metrics.began(time.monotonic() - self._begun)
        return "".join(event.text for event in events), events[-1].end if events else None

    async def _start(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._started = True

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not self._started:
                reply = JSONResponse(error.body, error.status, dict(error.headers))
                await reply(scope, receive, send)
                return
            await _send(send, error.body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            pass  # nobody listens

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than its limit.

        Raises:
            ApiError: it is too large, or says that it is no JSON.
        """
        limit = self._service.settings.max_body_bytes
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != _JSON:
            # A page of another origin can send other kinds without the browser asking us first.
            raise ApiError(415, f"the body must be {_JSON}, not {kind or 'untold'}")
        length = request.headers.get("content-length", "")
        found = bytearray()
        if not (length.isdigit() and int(length) > limit):
            async for part in request.stream():
                found += part
                if len(found) > limit:
                    break
            else:
                return bytes(found)
        raise ApiError(
            413,
            f"the request has more than {limit:,} bytes; send fewer or smaller media, or have "
            "the server's operator raise --max-body-mb",
            code="request_too_large",
        )

    def _check_model(self, name: str) -> None:
        served = self._service.settings.name
        if name != served:
            raise ApiError(
                404,
                f"model {name!r} is not served here; {served!r} is",
                code="model_not_found",
                param="model",
            )


async def _until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _finish(end: str | None) -> Finish:
    if end in ("stop", "length"):
        return end  # type: ignore[return-value]  # mypy narrows no text to literals
    # Only who has gone is cancelled, and hears nothing.
    raise ClientGone


async def _send(send: Send, found: dict[str, Any]) -> None:
    await _send_line(send, f"data: {json.dumps(found, ensure_ascii=False)}")


async def _send_line(send: Send, line: str) -> None:
    body = f"{line}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
