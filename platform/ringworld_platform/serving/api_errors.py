"""Errors in OpenAI's shape: what its clients turn into exceptions of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that gets no answer, and why.

    Attributes:
        status: of HTTP.
        body: ``{"error": {"message", "type", "param", "code"}}``.
        headers: to be sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        again: bool = True,
    ) -> None:
        """Describe it.

        Args:
            status: of HTTP.
            message: one sentence: what is wrong, the limit, the remedy.
            code: that programs tell it by.
            param: the request's field that it is about.
            retry_after: seconds after which it may go better.
            again: False: it would go the same way, and clients are told not to try by themselves.
        """
        super().__init__(message)
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status = status
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }
        self.headers: Mapping[str, str] = {
            **({} if retry_after is None else {"Retry-After": str(retry_after)}),
            # OpenAI's clients ask again after any error from 500 on, but for this.
            **({} if again else {"x-should-retry": "false"}),
        }
