"""Secrets do not belong in a spec: it is stored with the run, printed, and committed."""

from __future__ import annotations

import re
from typing import Any

from ringworld_jobs.document import Document
from ringworld_jobs.problem import KeyPath

_REMEDY = (
    "take it out of the file (and revoke it if the file was shared): credentials come from the "
    "environment or from the cloud's own chain"
)
_SECRET_NAME = (
    r"(?:pass(?:word|wd|phrase)|pwd|secret|credentials?|token|(?:auth|access|api|bearer)_?token"
    r"|api_?key|access_?key(?:_?id)?|secret_?(?:access_?)?key|private_?key)"
)
_KEY = re.compile(rf"(?:^|.*[_.-]){_SECRET_NAME}", re.IGNORECASE)
_VALUES = {
    "an AWS access key id": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a URL with a password": re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@", re.IGNORECASE),
    "a URL with a token": re.compile(r"https?://[^/\s:@]{8,}@", re.IGNORECASE),
    "a password or token": re.compile(
        rf"(?:^|[\s;,&?_-]){_SECRET_NAME}\s*[=:]\s*[^\s]", re.IGNORECASE
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an access token": re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-)[A-Za-z0-9_-]{16,}"),
}


def refuse_secrets(document: Document) -> None:
    """Report every key or value that looks like a credential, and never show it.

    Looks at the file as written, so it runs before `defaults` are merged.
    """
    if isinstance(document.data, dict):
        _walk(document, document.data, ())


def kind_of_secret(text: str) -> str:
    """What a text looks like that has a credential in it; empty where it does not."""
    return next((kind for kind, pattern in _VALUES.items() if pattern.search(text)), "")


def _walk(document: Document, node: Any, path: KeyPath) -> None:
    if isinstance(node, dict):
        for key, value in list(node.items()):
            if kind := kind_of_secret(key):
                # Gone, so that no later message can list it among the keys.
                del node[key]
                document.report(path, f"a key in here looks like {kind}; {_REMEDY}")
            elif _KEY.fullmatch(key) and _holds_secret(value, path):
                _refuse(document, (*path, key), f"this looks like a credential; {_REMEDY}")
            else:
                _walk(document, value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _walk(document, value, (*path, index))
    elif isinstance(node, str) and (kind := kind_of_secret(node)):
        _refuse(document, path, f"this looks like {kind}; {_REMEDY}")


def _holds_secret(value: Any, path: KeyPath) -> bool:
    if isinstance(value, str):
        return bool(value)
    # A mixture may well name a dataset "token" and give its share.
    return isinstance(value, int | float) and "mixture" not in path


def _refuse(document: Document, path: KeyPath, message: str) -> None:
    document.report(path, message, secret=True)
