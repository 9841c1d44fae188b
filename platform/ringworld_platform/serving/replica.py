"""The endpoint as a Ray Serve deployment: routes, engine and the ring's first rank in one actor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray import serve

from ringworld_platform.serving.ray_ring import RayRing, RingShape
from ringworld_platform.serving.service import Service
from ringworld_platform.serving.settings import ServeSettings

if TYPE_CHECKING:
    from ringworld_workers.generation.source import ModelSource

APP = "ringworld"
_HEALTH_SECONDS = 1.0
_HEALTH_TIMEOUT_SECONDS = 60.0
"""A check waits for the thread that answers, and that for torch, as long as one kernel takes."""
_SPARE_REQUESTS = 256
"""Beyond the places: they are refused at once, which needs a place of Ray Serve's."""


@serve.ingress()
class Replica:
    """One copy of a model. When a rank is lost its health check fails, and Serve makes it anew."""

    def __init__(self, source: ModelSource, settings: ServeSettings, shape: RingShape) -> None:
        """Begin to load; requests are refused with 503 meanwhile.

        Args:
            source: of the model.
            settings: names and limits.
            shape: how it is spread.
        """
        self._service = service = Service(settings)
        service.load(lambda: RayRing(source, shape, service.fail))

    def __serve_build_asgi_app__(self) -> Any:
        """What answers HTTP; Serve asks for it after the constructor."""
        from ringworld_platform.serving.app import create_app

        return create_app(self._service)

    def check_health(self) -> None:
        """Asked by Serve all the time; raises if this replica is to be replaced."""
        failure = self._service.failure
        if failure is not None:
            raise RuntimeError(str(failure))

    def __del__(self) -> None:
        """End the requests and the ring."""
        self._service.close()


def deployment(source: ModelSource, settings: ServeSettings, shape: RingShape) -> Any:
    """The application for ``serve.run``: one replica, its ring reserved with it or not at all."""
    places = settings.max_concurrent + settings.max_queue
    configure = serve.deployment(
        name="ring",
        num_replicas=1,
        max_ongoing_requests=places + _SPARE_REQUESTS,
        placement_group_bundles=[shape.resources] * shape.size,
        placement_group_strategy="PACK",
        ray_actor_options={
            "num_cpus": shape.resources["CPU"],
            "num_gpus": shape.resources.get("GPU", 0),
        },
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=_HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config={"enable_access_log": False},
    )
    return configure(Replica).bind(source, settings, shape)
