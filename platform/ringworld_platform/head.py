"""The Ray head that `ringworld up` starts on this machine: it outlives the command.

What must be known to find and end it again lies in ``~/.ringworld``. Whoever reaches a Ray port may
run code as its owner: so all of them listen on loopback only, unless other nodes are to join (then
on every interface, but for the dashboard), and the head asks for Ray's token, kept in
``~/.ray/auth_token``. RAY_AUTH_MODE=disabled in the environment turns the token off.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ringworld_platform.errors import ClusterError

LOOPBACK = "127.0.0.1"
# By its name a switch for other systems. Off, Ray takes 127.0.0.1 to be the node's own address, and
# then listens on no other. Who connects must have it as well, or looks for the head elsewhere.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# The smallest that Ray takes; we pass handles and small records through it.
OBJECT_STORE_BYTES = 78_643_200
START_SECONDS = 60.0
# Once a worker lives, the raylet waits half a minute for it and does not ask it: that is not waited
# for, as whatever lives through a SIGKILL at any moment needs no farewell.
ASK_SECONDS = 5.0
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


def up(
    *,
    num_cpus: int | None = None,
    port: int = 6379,
    dashboard: bool = True,
    dashboard_port: int = 8265,
    host: str = LOOPBACK,
) -> ClusterInfo:
    """Start a cluster on this machine that outlives this command.

    Args:
        host: this machine's address that other nodes join at; on loopback none can.
        num_cpus: CPUs that it gives out; default: this machine's.
        port: of its head.
        dashboard: start Ray's dashboard, on loopback.
        dashboard_port: its port.

    Raises:
        ClusterError: one runs already, a port is taken, the host is another machine's, or Ray does
            not start.
    """
    running = find_running()
    if running is not None:
        raise ClusterError(
            f"a cluster runs already at {running.address}; `ringworld down` stops it"
        )
    _end_left()
    _check_ours(host)
    check_free(port, "Ray's head")
    if dashboard:
        check_free(dashboard_port, "the dashboard")
    environment = {**_head_environment(), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= LOOPBACK_ONLY if host == LOOPBACK else {}
    command = [*_RAY, "start", "--head", "--block", f"--node-ip-address={host}"]
    command += [f"--port={port}", "--disable-usage-stats"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += [f"--include-dashboard={'true' if dashboard else 'false'}"]
    command += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard_port}"]
    command += [f"--num-cpus={num_cpus}"] if num_cpus is not None else []
    head = _start(command, environment)
    info = ClusterInfo(
        f"{host}:{port}",
        f"http://{LOOPBACK}:{dashboard_port}" if dashboard else None,
        pid=head.pid,
    )
    try:
        _await_head(head, info)
        started = psutil.Process(head.pid).create_time()
        record = {**asdict(info), "started": started}
        _record_file().write_text(json.dumps(record))
    except BaseException as error:
        # Ctrl-C, a full disk: a head that nobody knows of could not be ended by `down`.
        with contextlib.suppress(psutil.NoSuchProcess):
            _end_tree(psutil.Process(head.pid))
        if isinstance(error, OSError):
            raise _unwritable(error) from error
        raise
    return info


def down() -> bool:
    """Stop the cluster that ``up`` started, and nothing else.

    Returns:
        False if none was running; what may be left of one whose head was killed has been ended.
    """
    info = find_running()
    if info is None or info.pid is None:
        _end_left()
        _record_file().unlink(missing_ok=True)
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        _end_tree(psutil.Process(info.pid))
    _record_file().unlink(missing_ok=True)
    return True


def find_running() -> ClusterInfo | None:
    """The cluster that ``up`` started on this machine, if it is alive."""
    found = _read_record()
    return found[0] if found is not None and _is_alive(*found) else None


def find_lost() -> ClusterInfo | None:
    """The cluster that ``up`` started on this machine, if it was killed rather than stopped."""
    found = _read_record()
    return found[0] if found is not None and not _is_alive(*found) else None


def _read_record() -> tuple[ClusterInfo, float] | None:
    """What is known of the cluster, and when its head started."""
    try:
        record = json.loads(_record_file().read_text())
        started = float(record.pop("started"))
        return ClusterInfo(**record), started
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_alive(info: ClusterInfo, started: float) -> bool:
    try:
        process = psutil.Process(info.pid)
        # A process number may have been given to another process since.
        same = abs(process.create_time() - started) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _end_left() -> None:
    """End what a killed head has left: the members of its session, which nothing leaves.

    They end by themselves within seconds, when they miss it; a worker that is stopped does not.
    """
    found = _read_record()
    if found is None or (head := found[0].pid) is None or psutil.pid_exists(head):
        return  # as long as the session has members, no other process gets its number
    left = [process for process in psutil.process_iter() if _session_of(process.pid) == head]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_SECONDS)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def auth_token() -> str | None:
    """The token that Ray's dashboard asks for; None when there is none."""
    given = os.environ.get("RAY_AUTH_TOKEN")
    if given:
        return given
    path = token_file()
    try:
        return path.read_text().strip() or None if path is not None else None
    except OSError:
        return None


def token_file() -> Path | None:
    """Where the token lies, or will; None where none is asked for."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the head in a session of its own, its output in our folder."""
    try:
        _state_folder().mkdir(parents=True, exist_ok=True)
        with (_state_folder() / "cluster.log").open("wb") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> ClusterError:
    return ClusterError(
        f"cannot write {_state_folder()}: {error.strerror or error}; the cluster was not started"
    )


def _head_environment() -> dict[str, str]:
    """Environment of a head: it asks for a token, which `ray start`, unlike `ray.init`, lacks.

    Raises:
        ClusterError: no token can be made.
    """
    environment = {"RAY_AUTH_MODE": "token", **os.environ}
    if environment["RAY_AUTH_MODE"] == "token" and auth_token() is None:
        try:
            made = subprocess.run(
                [*_RAY, "get-auth-token", "--generate"],
                capture_output=True,
                text=True,
                timeout=START_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"Ray makes no token within {START_SECONDS:g} s") from error
        if made.returncode != 0:
            raise ClusterError(f"Ray makes no token: {made.stderr.strip()[-300:]}")
    return environment


def _await_head(head: subprocess.Popen[bytes], info: ClusterInfo) -> None:
    """Wait until the head answers, or say why it does not."""
    host, _, port = info.address.rpartition(":")
    deadline = time.monotonic() + START_SECONDS
    output = _state_folder() / "cluster.log"
    while True:
        if head.poll() is not None:
            lines = output.read_text(errors="replace").strip().splitlines()
            said = [line for line in lines if "Error" in line] or lines or ["no output"]
            raise ClusterError(f"Ray does not start: {said[-1]} ({output})")
        # The line that --block prints once every process of the head is up.
        ready = "--block" in output.read_text(errors="replace")
        if ready and answers(host, int(port)):
            return
        if time.monotonic() > deadline:
            raise ClusterError(f"Ray does not start within {START_SECONDS:g} s; see {output}")
        time.sleep(0.1)


def _end_tree(head: psutil.Process) -> None:
    """End a head and all that it has started: asked first, then made to."""
    family = [head, *head.children(recursive=True)]
    with contextlib.suppress(psutil.NoSuchProcess):
        head.terminate()
    _, left = psutil.wait_procs(family, timeout=ASK_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_SECONDS)


def _check_ours(host: str) -> None:
    """Refuse an address that this machine does not have."""
    ours = {a.address for interface in psutil.net_if_addrs().values() for a in interface}
    if host not in ours:
        known = sorted(address for address in ours if address.count(".") == 3)
        raise ClusterError(f"{host} is no address of this machine; it has {', '.join(known)}")


def check_free(port: int, whose: str) -> None:
    """Refuse a port that something listens on already.

    Raises:
        ClusterError: names the port and what it is for.
    """
    if answers(LOOPBACK, port):
        raise ClusterError(f"port {port} is taken; choose another one for {whose}")


def answers(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        with socket.create_connection((host, port), timeout=3.0):
            return True
    except OSError:
        return False


def _state_folder() -> Path:
    return Path.home() / ".ringworld"


def _record_file() -> Path:
    return _state_folder() / "cluster.json"
