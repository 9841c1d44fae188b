"""An endpoint from its start to its end, on a Ray cluster that this process is connected to."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from ringworld_platform.errors import ClusterError, PlatformError
from ringworld_platform.head import LOOPBACK, answers
from ringworld_platform.serving.ray_ring import RingShape
from ringworld_platform.serving.settings import ServeSettings

if TYPE_CHECKING:
    from ringworld_workers.generation.source import ModelSource

_LOOK_SECONDS = 0.2
_EVERYWHERE = ("0.0.0.0", "::")


class NotServed(PlatformError):
    """The model could not be loaded; the message says why."""


def choose_device(name: str, size: int) -> Literal["cpu", "cuda"]:
    """Where a ring computes, and whether the cluster can ever hold it.

    Args:
        name: auto, cpu or cuda.
        size: ranks.

    Raises:
        ClusterError: it cannot; says what it has.
    """
    import ray

    has = ray.cluster_resources()
    gpus, cpus = int(has.get("GPU", 0)), int(has.get("CPU", 0))
    device: Literal["cpu", "cuda"] = "cpu"
    if name == "cuda" or (name == "auto" and gpus >= size):
        device = "cuda"
    if device == "cuda" and gpus < size:
        raise ClusterError(
            f"a ring of {size} needs {size} GPUs, and the cluster has {gpus}; take a smaller "
            "--ring, or --device cpu"
        )
    if cpus < size:
        raise ClusterError(
            f"a ring of {size} takes {size} CPU cores of Ray's, and the cluster gives out {cpus}; "
            "take a smaller --ring"
        )
    return device


@contextlib.contextmanager
def serving(
    source: ModelSource,
    settings: ServeSettings,
    shape: RingShape,
    *,
    host: str,
    port: int,
    on_wait: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Serve a model until the end of the block.

    Args:
        source: of the model.
        settings: names and limits.
        shape: how it is spread.
        host: address to listen on.
        port: to listen on.
        on_wait: told what is waited for, several times a second.

    Yields:
        The endpoint's URL, when it answers.

    Raises:
        ClusterError: the port is taken, or the cluster serves something already.
        NotServed: the model cannot be loaded.
    """
    from ray import serve

    from ringworld_platform.serving.replica import APP, deployment

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    reached = LOOPBACK if host in _EVERYWHERE else host
    running = sorted(serve.status().applications)
    if running:
        raise ClusterError(
            f"this cluster serves already ({', '.join(running)}); end that first: with Ctrl-C "
            "where it was started, or with `serve shutdown`"
        )
    if answers(reached, port):
        raise ClusterError(f"port {port} is taken; choose another one: --port")
    url = f"http://{f'[{reached}]' if ':' in reached else reached}:{port}"
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={
                "host": host,
                "port": port,
                # Ours comes first, and says so in the shape that clients know.
                "request_timeout_s": settings.timeout_seconds + 30.0,
            },
            logging_config={"enable_access_log": False},
        )
        serve.run(deployment(source, settings, shape), name=APP, route_prefix="/")
        _await_ready(url, on_wait)
        yield url
    finally:
        serve.shutdown()


def health(url: str) -> dict[str, Any] | None:
    """What an endpoint says of itself; None: it does not answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=10.0) as reply:
            found = json.loads(reply.read())
    except urllib.error.HTTPError as error:
        try:
            found = json.loads(error.read())
        except ValueError:
            return None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "status" in found else None


def _await_ready(url: str, on_wait: Callable[[str], None]) -> None:
    while True:
        found = health(url) or {"status": "starting", "detail": "it does not answer yet"}
        if found["status"] == "ready":
            return
        if found["status"] == "failed":
            raise NotServed(f"the model is not served: {found['detail']}")
        on_wait(str(found.get("detail", "")))
        time.sleep(_LOOK_SECONDS)
