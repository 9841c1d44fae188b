"""Images and videos of a request: bytes within it, or of hosts that the operator has named.

A server that fetches any address that it is given lets a stranger reach what only the server can
reach. So it fetches none, unless its host was named; and follows no redirect from there.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from ringworld_platform.serving.api_errors import ApiError

FETCH_SECONDS = 30.0
_PART_BYTES = 1 << 20


class Media:
    """Gets the bytes that a request's URLs stand for."""

    def __init__(
        self, allowed_hosts: tuple[str, ...], max_bytes: int, seconds: float = FETCH_SECONDS
    ) -> None:
        """Say what may be fetched.

        Args:
            allowed_hosts: ``HOST`` or ``HOST:PORT``, as they stand in URLs.
            max_bytes: of one medium.
            seconds: for one medium.
        """
        self._allowed = {host.lower() for host in allowed_hosts}
        self._max_bytes, self._seconds = max_bytes, seconds
        # No proxy of the environment's either: what is reached must be what was named.
        self._opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))

    def read(self, url: str, place: str) -> bytes:
        """The bytes of a URL.

        Args:
            url: ``data:...;base64,...``, or http(s) of a host that is allowed.
            place: the request's field, for errors.

        Raises:
            ApiError: it is of another kind, broken or too large, or cannot be fetched.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return _inline(url, place)
        if scheme not in ("http", "https"):
            raise ApiError(
                400,
                f"{place}: give the bytes themselves, as data:image/png;base64,... (or video/mp4)",
                param=place,
            )
        try:
            parts = urllib.parse.urlsplit(url)
        except ValueError as error:
            raise ApiError(400, f"{place}: no URL ({error})", param=place) from None
        if parts.netloc.lower() not in self._allowed:
            raise ApiError(
                400,
                f"{place}: this server fetches nothing from {parts.hostname}; send the bytes as a "
                "data: URL, or have its operator name the host (--allow-urls)",
                code="url_not_allowed",
                param=place,
            )
        return self._fetch(url, place)

    def _fetch(self, url: str, place: str) -> bytes:
        found = bytearray()
        deadline = time.monotonic() + self._seconds
        try:
            with self._opener.open(url, timeout=self._seconds) as reply:
                # What has come, not a whole part: a host that sends a byte now and then would hold
                # us in one call.
                while part := reply.read1(_PART_BYTES):
                    found += part
                    if len(found) > self._max_bytes:
                        raise ApiError(
                            413,
                            f"{place}: the medium has more than {self._max_bytes:,} bytes",
                            param=place,
                        )
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"not there within {self._seconds:g} s")
        # Nothing of what came is told: it may be meant for the server alone.
        except urllib.error.HTTPError as error:
            raise ApiError(
                400, f"{place}: its host answered with status {error.code}", param=place
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ApiError(
                400, f"{place}: cannot be fetched ({type(error).__name__})", param=place
            ) from None
        return bytes(found)


def _inline(url: str, place: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(
            400, f"{place}: a data: URL is written data:image/png;base64,...", param=place
        )
    try:
        found = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{place}: its base64 is broken", param=place) from None
    if not found:
        raise ApiError(400, f"{place}: it holds no bytes", param=place)
    return found


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Go nowhere else: the reply is the redirect, which is an error."""
