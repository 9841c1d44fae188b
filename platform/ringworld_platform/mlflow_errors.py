"""What an MLflow server's error means for what was sent: try later, never again, or begin anew."""

from __future__ import annotations

import re

_LIMIT_CHARACTERS = 240
_REFUSALS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "INVALID_STATE",
        "NOT_IMPLEMENTED",
        "ENDPOINT_NOT_FOUND",
        "FEATURE_DISABLED",
        "PERMISSION_DENIED",
        "RESOURCE_LIMIT_EXCEEDED",
    }
)
_UNKNOWN_CALLER = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
_CREDENTIALS = (
    "it wants credentials; set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD, where `ringworld run` or `ringworld up` is started"
)
# What is found in the long texts of HTTP clients, and what it means.
_MEANINGS = (
    ("Connection refused", "nothing listens there (connection refused)"),
    ("timed out", "it does not answer (timed out)"),
    ("timeout exception", "it does not answer (timed out)"),
    ("Failed to resolve", "there is no host of that name"),
    ("Name or service not known", "there is no host of that name"),
    ("too many 429 error responses", "it has too much to do (429)"),
    ("too many 500 error responses", "it failed (500); its log says why"),
    ("too many 502 error responses", "its proxy does not reach it (502)"),
    ("too many 503 error responses", "it is not available (503)"),
    ("too many 504 error responses", "its proxy does not reach it (504)"),
    ("Connection reset", "it ended the connection"),
    ("RemoteDisconnected", "it ended the connection"),
)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


class TrackingError(Exception):
    """Something is wrong with tracking; the text is one line."""


class ServerAway(TrackingError):
    """It may work later."""


class Refused(TrackingError):
    """It will not work later either; the server is well."""


class Gone(TrackingError):
    """The server does not have what was there: it is another one, or began anew."""


def judge(code: str, text: str) -> TrackingError:
    """The error that one of MLflow's is for us.

    Args:
        code: MLflow's error code.
        text: its message.
    """
    if code in _UNKNOWN_CALLER or "failed with error code 401" in text:
        return ServerAway(_CREDENTIALS)
    if code == "RESOURCE_DOES_NOT_EXIST":
        return Gone(one_line(text))
    if code in _REFUSALS:
        return Refused(one_line(text))
    meaning = next((words for mark, words in _MEANINGS if mark in text), None)
    return ServerAway(meaning or one_line(text))


def one_line(text: str) -> str:
    """The first line, cut, without what a URL may hold of a secret."""
    line = next(iter(text.strip().splitlines()), "no reason given")
    return _IN_URL.sub("", line)[:_LIMIT_CHARACTERS]
