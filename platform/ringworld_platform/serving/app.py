"""The HTTP routes, for any ASGI server: Ray Serve's replica is one."""

from __future__ import annotations

from typing import Any, cast

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ringworld_platform.serving.api_errors import ApiError
from ringworld_platform.serving.exchange import Exchange
from ringworld_platform.serving.metrics import CONTENT_TYPE
from ringworld_platform.serving.replies import ChatReply, CompletionReply
from ringworld_platform.serving.service import Service

_OWN_HOSTS = ("127.0.0.1", "localhost", "::1")
_GUARDED = "/v1/"


def create_app(service: Service) -> FastAPI:
    """The endpoint of one model.

    Args:
        service: that answers; it may still be loading.
    """
    name = service.settings.name
    app = FastAPI(title="ringworld", docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat() -> Response:
        return Exchange(service, ChatReply(name))

    @app.post("/v1/completions", response_model=None)
    async def complete() -> Response:
        return Exchange(service, CompletionReply(name))

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{model:path}", response_model=None)
    async def model(model: str) -> Response:
        if model != name:
            message = f"model {model!r} is not served here; {name!r} is"
            raise ApiError(404, message, code="model_not_found", param="model")
        return JSONResponse(_model(service))

    @app.get("/health", response_model=None)
    async def health() -> Response:
        state = service.state
        body: dict[str, Any] = {"status": state, "model": name}
        if state != "ready":
            body["detail"] = str(service.failure or service.said)
        return JSONResponse(body, 200 if state == "ready" else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _any_error)
    app.add_middleware(_Guard, service=service)
    return app


def _model(service: Service) -> dict[str, Any]:
    found = {"id": service.settings.name, "object": "model", "created": 0, "owned_by": "ringworld"}
    if service.state == "ready":
        _, asking = service.ready()
        found["max_model_len"] = asking.context_length
    return found


class _Guard:
    """Lets in who has the key; and on loopback, who means this machine.

    A page in a browser can have its own name resolve to 127.0.0.1, and would then be of the same
    origin as we are; its requests name that host.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._settings = app, service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Request(scope))
            except ApiError as error:
                await JSONResponse(error.body, error.status, dict(error.headers))(
                    scope, receive, send
                )
                return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        if self._settings.loopback and request.url.hostname not in _OWN_HOSTS:
            raise ApiError(421, "this server listens on loopback; name it 127.0.0.1 or localhost")
        if not self._settings.key_digest or not request.url.path.startswith(_GUARDED):
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not self._settings.is_key(key.strip()):
            raise ApiError(
                401,
                "the key is missing or wrong; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )


async def _api_error(_: Request, error: Exception) -> Response:
    refused = cast(ApiError, error)
    return JSONResponse(refused.body, refused.status, dict(refused.headers))


async def _http_error(request: Request, error: Exception) -> Response:
    wrong = cast(HTTPException, error)
    found = ApiError(wrong.status_code, f"{request.method} {request.url.path}: {wrong.detail}")
    return JSONResponse(found.body, found.status, wrong.headers)


async def _any_error(_: Request, error: Exception) -> Response:
    found = ApiError(500, f"an internal error ({type(error).__name__})")
    return JSONResponse(found.body, found.status)
