"""The Ray cluster under a job: one for a command, or one that runs already.

Whoever reaches a Ray port may run code as its owner: clusters of this machine listen on loopback
only, and all ask for a token. See ``head``, which starts the ones that stay; ``ray.init`` asks for
one by itself as long as nothing is set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import psutil

from ringworld_platform.errors import ClusterError
from ringworld_platform.head import (
    LOOPBACK,
    LOOPBACK_ONLY,
    OBJECT_STORE_BYTES,
    ClusterInfo,
    answers,
    check_free,
    find_running,
)
from ringworld_platform.shipping import runtime_env

NAMESPACE = "ringworld"
JOB_NAME = "job_name"
"""What the dashboard's Jobs page looks for in the metadata."""


@contextlib.contextmanager
def local_cluster(
    *,
    num_cpus: int | None = None,
    dashboard: bool = False,
    dashboard_port: int | None = None,
    env_vars: Mapping[str, str] | None = None,
) -> Iterator[ClusterInfo]:
    """A cluster for one command: started here, gone at the end of the block.

    SIGTERM raises KeyboardInterrupt inside the block, so that both ways to stop clean up alike.
    Ray's ports listen on loopback only, unless Ray was imported before.

    Args:
        num_cpus: CPUs that Ray gives out; default: this machine's.
        dashboard: start Ray's dashboard, on loopback.
        dashboard_port: its port; default: the first free one from 8265.
        env_vars: environment of every worker.

    Raises:
        ClusterError: Ray is connected already, or does not start.
    """
    _stay_on_loopback()
    import ray

    if ray.is_initialized():
        raise ClusterError("this process is connected to a Ray cluster already")
    quiet_ray()
    if dashboard_port is not None:
        check_free(dashboard_port, "the dashboard")
    options: dict[str, Any] = {"dashboard_port": dashboard_port} if dashboard_port else {}
    with _terminate_as_interrupt() as install_again:
        try:
            context = ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=dashboard,
                dashboard_host=LOOPBACK,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace=NAMESPACE,
                runtime_env={"env_vars": dict(env_vars)} if env_vars else None,
                **options,
            )
        except (RuntimeError, ValueError, OSError, TimeoutError) as error:
            ray.shutdown()
            raise ClusterError(f"Ray does not start: {_first_line(error)}") from error
        try:
            # Ray has put its own handler there, which ends the process on the spot.
            install_again()
            url = context.dashboard_url
            address = ray.get_runtime_context().gcs_address
            yield ClusterInfo(address, f"http://{url}" if dashboard and url else None, local=True)
        finally:
            _shut_down_ray()


def connect(address: str | None = None, *, ship: bool = False, name: str = "") -> ClusterInfo:
    """Connect to a cluster that runs.

    Args:
        address: ``HOST:PORT`` of its head, or ``auto`` for the one that ``up`` or ``ray start``
            made here; default: the one that ``up`` started, else what RAY_ADDRESS says.
        ship: bring our own packages, unless it is the cluster of ``up``, which has them.
        name: of this command, for the Jobs page of Ray's dashboard.

    Raises:
        ClusterError: there is none, or it does not answer.
        UploadRefused: the packages hold more than code.
    """
    running = find_running()
    if running and address not in (None, "auto", running.address):
        running = None
    if running and running.address.startswith(f"{LOOPBACK}:"):
        _stay_on_loopback(required=True)
    import ray

    if ray.is_initialized():
        raise ClusterError("this process is connected to a Ray cluster already")
    target = running.address if running else address or os.environ.get("RAY_ADDRESS")
    if target == "auto":
        target = _started_by_ray()
    if target is None:
        raise ClusterError(
            "no Ray cluster runs here; start one with `ringworld up` or name one: --address"
        )
    from ray.job_config import JobConfig

    quiet_ray()
    _check_answers(target)
    offer_token()
    try:
        context = ray.init(
            address=target,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=runtime_env() if ship and running is None else None,
            job_config=JobConfig(metadata={JOB_NAME: name} if name else None),
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        ray.shutdown()
        raise ClusterError(f"no Ray cluster answers at {target}: {_first_line(error)}") from error
    url = context.dashboard_url
    known = running or ClusterInfo(ray.get_runtime_context().gcs_address, None)
    return ClusterInfo(known.address, f"http://{url}" if url else None, pid=known.pid)


def disconnect() -> None:
    """Let go of the cluster; one that others share goes on."""
    import ray

    ray.shutdown()


def _started_by_ray() -> str | None:
    """Where Ray believes a cluster of this machine to be; it may be gone.

    ``ray.init("auto")`` would try a dead one for ten minutes.
    """
    from ray._private import services

    return services.canonicalize_bootstrap_address("auto")


def _stay_on_loopback(*, required: bool = False) -> None:
    """Have Ray use no other interface; it reads this once, when it is imported.

    Raises:
        ClusterError: it is required, and Ray was imported without it.
    """
    if "ray" not in sys.modules:
        os.environ.update(LOOPBACK_ONLY)
    elif required and any(os.environ.get(k) != value for k, value in LOOPBACK_ONLY.items()):
        raise ClusterError(
            "this process has imported Ray, which now looks for no cluster on loopback; connect "
            "before `import ray`, or start the cluster with `ringworld up --host ADDRESS`"
        )


def quiet_ray() -> None:
    """No usage reports home; and no advice of Ray's in the middle of our output."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    logging.getLogger("ray").setLevel(logging.ERROR)


def offer_token() -> None:
    """Show our token, if we have one, to a cluster named by its address.

    ``ray.init`` does this only for clusters that it finds by itself.
    """
    from ray._private.authentication import authentication_token_setup

    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[Callable[[], None]]:
    """Make SIGTERM raise KeyboardInterrupt (in the main thread; elsewhere nothing changes).

    Yields:
        What installs the handler again, after somebody else has put theirs in its place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def install() -> None:
        signal.signal(signal.SIGTERM, interrupt)

    before = signal.getsignal(signal.SIGTERM)
    install()
    try:
        yield install
    finally:
        signal.signal(signal.SIGTERM, before)


def _shut_down_ray() -> None:
    """Shut Ray down, and see that none of its processes is left, signals or not."""
    import ray

    family = psutil.Process().children(recursive=True)
    main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        ray.shutdown()
        mine = [process for process in family if _is_ray(process)]
        _, left = psutil.wait_procs(mine, timeout=5.0)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _is_ray(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "ray" in words


def _check_answers(address: str) -> None:
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        raise ClusterError(f"{address!r} is no address of a Ray head; write HOST:PORT")
    if not answers(host, int(port)):
        raise ClusterError(f"no Ray cluster answers at {address}; is it running?")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
