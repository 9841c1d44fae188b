"""A proxy before the real S3 server, for what breaks on the way there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ringworld_platform.local_s3 import LocalS3

_PROXY = Path(__file__).parent / "store" / "fault_proxy.py"


@pytest.fixture(scope="session")
def proxy_module() -> Any:
    """``fault_proxy``: tests are no package to import from."""
    spec = importlib.util.spec_from_file_location("fault_proxy", _PROXY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fault_proxy(
    proxy_module: Any, s3_server: LocalS3, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """A ``FaultProxy`` before the server; the environment leads clients to it."""
    with proxy_module.FaultProxy(("127.0.0.1", s3_server.port)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy
