"""The Ray cluster under a job: one for a command, one that stays, or somebody else's.

Authentication: a cluster that we start asks for Ray's token (kept in ``~/.ray/auth_token``),
because whoever reaches a Ray port may run code as its owner, and Ray's ports listen on every
interface of the machine (its dashboard is kept on loopback). RAY_AUTH_MODE=disabled in the
environment turns that off. ``ray.init`` makes it so by itself as long as nothing is set.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from ringworld_platform.errors import ClusterError

log = logging.getLogger(__name__)

NAMESPACE = "ringworld"
LOOPBACK = "127.0.0.1"
# The smallest that Ray takes; we pass handles and small records through it.
OBJECT_STORE_BYTES = 78_643_200
START_SECONDS = 60.0
STOP_SECONDS = 20.0
_RAY = (sys.executable, "-m", "ray.scripts.scripts")


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """A Ray cluster.

    Attributes:
        address: host and port of its head.
        dashboard_url: where its dashboard listens, if it has one.
        local: whether it ends with this process.
        pid: the head's process, if ``up`` started it on this machine.
    """

    address: str
    dashboard_url: str | None
    local: bool = False
    pid: int | None = None


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

    Args:
        num_cpus: CPUs that Ray gives out; default: this machine's.
        dashboard: start Ray's dashboard, on loopback.
        dashboard_port: its port; default: the first free one from 8265.
        env_vars: environment of every worker.

    Raises:
        ClusterError: Ray is connected already, or does not start.
    """
    import ray

    if ray.is_initialized():
        raise ClusterError("this process is connected to a Ray cluster already")
    _quiet_ray()
    if dashboard_port is not None:
        _check_free(dashboard_port, "the dashboard")
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


def connect(address: str | None = None) -> ClusterInfo:
    """Connect to a cluster that runs.

    Args:
        address: ``HOST:PORT`` of its head; default: the one that ``up`` started, else what
            RAY_ADDRESS or Ray itself knows of.

    Raises:
        ClusterError: there is none, or it does not answer.
    """
    import ray

    if ray.is_initialized():
        raise ClusterError("this process is connected to a Ray cluster already")
    running = find_running() if address is None else None
    target = address or (running.address if running else "auto")
    _quiet_ray()
    if target != "auto":
        _check_answers(target)
        _offer_token()
    try:
        context = ray.init(
            address=target, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        ray.shutdown()
        if target == "auto":
            raise ClusterError(
                "no Ray cluster runs here; start one with `ringworld up` or name one: --address"
            ) from error
        raise ClusterError(f"no Ray cluster answers at {target}: {_first_line(error)}") from error
    url = context.dashboard_url
    known = running or ClusterInfo(ray.get_runtime_context().gcs_address, None)
    return ClusterInfo(known.address, f"http://{url}" if url else None, pid=known.pid)


def disconnect() -> None:
    """Let go of the cluster; one that others share goes on."""
    import ray

    ray.shutdown()


def up(
    *,
    num_cpus: int | None = None,
    port: int = 6379,
    dashboard: bool = True,
    dashboard_port: int = 8265,
) -> ClusterInfo:
    """Start a cluster on this machine that outlives this command.

    Args:
        num_cpus: CPUs that it gives out; default: this machine's.
        port: of its head.
        dashboard: start Ray's dashboard, on loopback.
        dashboard_port: its port.

    Raises:
        ClusterError: one runs already, a port is taken, or Ray does not start.
    """
    running = find_running()
    if running is not None:
        raise ClusterError(
            f"a cluster runs already at {running.address}; `ringworld down` stops it"
        )
    _check_free(port, "Ray's head")
    if dashboard:
        _check_free(dashboard_port, "the dashboard")
    _quiet_ray()
    environment = _head_environment()
    command = [*_RAY, "start", "--head", "--block"]
    command += [f"--port={port}", "--disable-usage-stats"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += [f"--include-dashboard={'true' if dashboard else 'false'}"]
    command += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard_port}"]
    command += [f"--num-cpus={num_cpus}"] if num_cpus is not None else []
    _state_folder().mkdir(parents=True, exist_ok=True)
    with (_state_folder() / "cluster.log").open("wb") as output:
        head = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    info = ClusterInfo(
        f"{LOOPBACK}:{port}",
        f"http://{LOOPBACK}:{dashboard_port}" if dashboard else None,
        pid=head.pid,
    )
    _await_head(head, info)
    record = {**asdict(info), "started": psutil.Process(head.pid).create_time()}
    _record_file().write_text(json.dumps(record))
    return info


def down() -> bool:
    """Stop the cluster that ``up`` started, and nothing else.

    Returns:
        False if none was running.
    """
    info = find_running()
    if info is None or info.pid is None:
        _record_file().unlink(missing_ok=True)
        return False
    _end_tree(psutil.Process(info.pid))
    _record_file().unlink(missing_ok=True)
    return True


def find_running() -> ClusterInfo | None:
    """The cluster that ``up`` started on this machine, if it is alive."""
    try:
        record = json.loads(_record_file().read_text())
        started = record.pop("started")
        info = ClusterInfo(**record)
        process = psutil.Process(info.pid)
        # A process number may have been given to another process since.
        alive = abs(process.create_time() - started) < 1.0 and process.is_running()
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    return info if alive and process.status() != psutil.STATUS_ZOMBIE else None


def auth_token() -> str | None:
    """The token that Ray's dashboard asks for; None when there is none."""
    given = os.environ.get("RAY_AUTH_TOKEN")
    if given:
        return given
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return None
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _quiet_ray() -> None:
    """No usage reports home; and no advice of Ray's in the middle of our output."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    logging.getLogger("ray").setLevel(logging.ERROR)


def _offer_token() -> None:
    """Show our token, if we have one, to a cluster named by its address.

    ``ray.init`` does this only for clusters that it finds by itself.
    """
    from ray._private.authentication import authentication_token_setup

    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _head_environment() -> dict[str, str]:
    """Environment of a head: it asks for a token, which `ray start`, unlike `ray.init`, lacks.

    Raises:
        ClusterError: no token can be made.
    """
    environment = {"RAY_AUTH_MODE": "token", **os.environ}
    if environment["RAY_AUTH_MODE"] == "token" and auth_token() is None:
        made = subprocess.run(
            [*_RAY, "get-auth-token", "--generate"],
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
        if made.returncode != 0:
            raise ClusterError(f"Ray makes no token: {made.stderr.strip()[-300:]}")
    return environment


def _await_head(head: subprocess.Popen[bytes], info: ClusterInfo) -> None:
    """Wait until the head answers, or say why it does not."""
    host, port = info.address.split(":")
    deadline = time.monotonic() + START_SECONDS
    output = _state_folder() / "cluster.log"
    while True:
        if head.poll() is not None:
            lines = output.read_text(errors="replace").strip().splitlines()
            said = [line for line in lines if "Error" in line] or lines or ["no output"]
            raise ClusterError(f"Ray does not start: {said[-1]} ({output})")
        # The line that --block prints once every process of the head is up.
        ready = "--block" in output.read_text(errors="replace")
        if ready and _answers(host, int(port)):
            return
        if time.monotonic() > deadline:
            _end_tree(psutil.Process(head.pid))
            raise ClusterError(f"Ray does not start within {START_SECONDS:g} s; see {output}")
        time.sleep(0.1)


def _end_tree(head: psutil.Process) -> None:
    """End a head and all that it has started: asked first, then made to."""
    family = [head, *head.children(recursive=True)]
    with contextlib.suppress(psutil.NoSuchProcess):
        head.terminate()
    _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_SECONDS)


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
    blocked = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if blocked else None
    try:
        ray.shutdown()
        mine = [process for process in family if _is_ray(process)]
        _, left = psutil.wait_procs(mine, timeout=5.0)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    finally:
        if blocked:
            signal.signal(signal.SIGINT, before)


def _is_ray(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "ray" in words


def _check_free(port: int, whose: str) -> None:
    if _answers(LOOPBACK, port):
        raise ClusterError(f"port {port} is taken; choose another one for {whose}")


def _check_answers(address: str) -> None:
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        raise ClusterError(f"{address!r} is no address of a Ray head; write HOST:PORT")
    if not _answers(host, int(port)):
        raise ClusterError(f"no Ray cluster answers at {address}; is it running?")


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=3.0):
            return True
    except OSError:
        return False


def _state_folder() -> Path:
    return Path.home() / ".ringworld"


def _record_file() -> Path:
    return _state_folder() / "cluster.json"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
