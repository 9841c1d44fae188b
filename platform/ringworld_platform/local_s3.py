"""A real S3 server on this machine, for who has none: SeaweedFS, on loopback, with credentials.

S3 asks for the credentials; the ports behind it, which other programs of this machine could find,
do not. So it is for trying, and for tests.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from ringworld_platform.errors import PlatformError

LOOPBACK = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 15.0
REGION = "us-east-1"
_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
_SETTINGS_FILE = "s3.json"
_LOG_FILE = "server.log"
_LOCK_FILE = "server.lock"
_TAKEN = ("Port allocation failed", "address already in use")
_PORT_TRIES = 3
# Go's collector lets the server grow to several times of what it holds.
_MEMORY_LIMIT = "400MiB"


class _PortTaken(PlatformError):
    """One of the ports is another program's."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client signs its requests with; they change with every folder of data."""

    access_key: str
    secret_key: str


class LocalS3:
    """One server process and its folder. A context manager: it stops what it has started.

    Its ports listen on loopback only, and S3 answers nobody without the credentials.
    """

    def __init__(self, folder: Path, *, port: int | None = None) -> None:
        """Name the folder of objects and credentials; it is created if need be.

        Args:
            folder: data that is there from an earlier server is served again.
            port: that S3 is served on; a free one where None.
        """
        self.folder = folder.absolute()
        self._wanted = port
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._sockets: tempfile.TemporaryDirectory[str] | None = None
        self.credentials = Credentials("", "")

    @property
    def port(self) -> int:
        """Where S3 is served, once it was started."""
        return self._ports["s3.port"]

    @property
    def endpoint(self) -> str:
        """URL of the server."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int:
        """The server's process."""
        if self._process is None:
            raise PlatformError("the S3 server was not started")
        return self._process.pid

    def environment(self) -> dict[str, str]:
        """What a client's environment must hold, so that AWS's tools find this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def start(self, *buckets: str) -> None:
        """Start the server and wait until it serves; ports stay the same over restarts.

        Args:
            *buckets: to be made, where they are not there.

        Raises:
            PlatformError: the program is not installed, a port is taken, another server has the
                folder, or it does not start.
        """
        program = _program()
        # Of free ports each may be another program's by the time that the server takes it.
        attempts = 1 if self._ports else _PORT_TRIES
        while True:
            attempts -= 1
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._start(program)
            except OSError as error:
                reason = error.strerror or error
                raise PlatformError(f"cannot write {self.folder}: {reason}") from error
            try:
                return self._await_ready(self.folder / _LOG_FILE, buckets)
            except BaseException as error:
                self.stop()
                if not (attempts and isinstance(error, _PortTaken)):
                    raise
                self._ports = {}

    def _start(self, program: str) -> None:
        with (self.folder / _LOCK_FILE).open("a+") as lock:
            _take(lock, self.folder)
            self.credentials = self._settings()
            if not self._ports:
                self._ports = _free_ports(self._wanted)
            if self._sockets is None:
                # Not in the folder: a socket's path has at most 107 bytes.
                self._sockets = tempfile.TemporaryDirectory(prefix="ringworld-s3-")
            with (self.folder / _LOG_FILE).open("wb") as output:
                self._process = subprocess.Popen(
                    [program, *self._arguments(Path(self._sockets.name))],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    start_new_session=True,
                    pass_fds=(lock.fileno(),),  # it holds the lock for as long as it lives
                )
            lock.truncate(0)
            lock.write(str(self._process.pid))

    def stop(self) -> None:
        """End the server; asked first, then made to."""
        process, self._process = self._process, None
        sockets, self._sockets = self._sockets, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_SECONDS)
        if sockets is not None:
            sockets.cleanup()
        for port in self._ports.values():
            # SeaweedFS makes these wherever it is told to put its others, and leaves them.
            for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
                left.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the server as a power cut would: for tests of what survives that."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
            self._process = None

    def wait(self) -> int:
        """Wait for the server's end; returns its exit status."""
        if self._process is None:
            raise PlatformError("the S3 server was not started")
        return self._process.wait()

    def __enter__(self) -> LocalS3:
        """The server, started by the caller."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it."""
        self.stop()

    def _settings(self) -> Credentials:
        """The folder's credentials, made the first time; nobody else may read them."""
        file = self.folder / _SETTINGS_FILE
        if not file.exists():
            made = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_urlsafe(30)}
            actions = ["Admin", "Read", "Write", "List", "Tagging"]
            identity = {"name": "ringworld", "credentials": [made], "actions": actions}
            scratch = file.with_suffix(".tmp")
            scratch.touch(0o600)
            scratch.write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
            scratch.replace(file)
        try:
            held = json.loads(file.read_text(encoding="utf-8"))["identities"][0]["credentials"][0]
            return Credentials(held["accessKey"], held["secretKey"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise PlatformError(
                f"{file} is damaged ({error}); remove it to make new ones"
            ) from None

    def _arguments(self, sockets: Path) -> list[str]:
        data = self.folder / "data"
        data.mkdir(mode=0o700, exist_ok=True)
        ports = [f"-{name}={port}" for name, port in self._ports.items()]
        return [
            "-logtostderr=true",
            "mini",
            f"-dir={data}",
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
            f"-s3.config={self.folder / _SETTINGS_FILE}",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.concurrentUploadLimitMB=256",
            "-admin.ui=false",
            "-webdav=false",
            f"-filer.localSocket={sockets / 'filer.sock'}",
            f"-s3.localSocket={sockets / 's3.sock'}",
            *ports,
        ]

    def _await_ready(self, log: Path, buckets: tuple[str, ...]) -> None:
        """Wait until the very process that was started serves S3, and make the buckets."""
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=self.credentials.access_key,
            aws_secret_access_key=self.credentials.secret_key,
            config=Config(
                connect_timeout=2,
                read_timeout=5,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
            ),
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._process is None or self._process.poll() is not None:
                said = log.read_text(errors="replace").strip()
                last = " / ".join(said.splitlines()[-3:])
                kind = _PortTaken if any(sign in said for sign in _TAKEN) else PlatformError
                raise kind(f"the S3 server does not start: {last} ({log})")
            try:
                # Something else may answer on a port that was free a moment ago.
                if self._listens():
                    held = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
                    for bucket in set(buckets) - held:
                        client.create_bucket(Bucket=bucket)
                    return
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > deadline:
                    raise PlatformError(
                        f"the S3 server does not serve within {START_SECONDS:g} s: {error} ({log})"
                    ) from error
            if time.monotonic() > deadline:
                raise PlatformError(f"the S3 server opens no port in {START_SECONDS:g} s ({log})")
            time.sleep(0.05)

    def _listens(self) -> bool:
        try:
            open_here = psutil.Process(self.pid).net_connections("tcp")
        except psutil.Error:
            return False
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == self.port for c in open_here)


def _environment() -> dict[str, str]:
    """Of the server: it takes credentials from its settings alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {**kept, "GOMEMLIMIT": _MEMORY_LIMIT}


def _take(lock: IO[str], folder: Path) -> None:
    """Lock a folder for one server.

    Raises:
        PlatformError: another one has it, maybe of a command that was killed.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        process = lock.read().strip()
        raise PlatformError(
            f"a server has {folder} already (process {process or 'unknown'}); stop that one, or "
            "name another folder"
        ) from None


def _program() -> str:
    """Path of SeaweedFS's program: beside this Python, or on the path.

    Raises:
        PlatformError: it is not installed.
    """
    beside = shutil.which("weed", path=sysconfig.get_path("scripts"))
    found = beside or shutil.which("weed")
    if found is None:
        raise PlatformError(
            "SeaweedFS, which serves S3 here, is not installed; pip install 'ringworld[s3-server]'"
        )
    return found


def _free_ports(wanted: int | None) -> dict[str, int]:
    """A port for each of the server's services.

    Raises:
        PlatformError: the wanted one is taken.
    """
    ports = {}
    with ExitStack() as held:
        for name in _PORTS:
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            number = wanted or 0 if name == "s3.port" else 0
            try:
                listener.bind((LOOPBACK, number))
            except OSError as error:
                raise PlatformError(f"port {number} is taken ({error}); choose another") from None
            ports[name] = listener.getsockname()[1]
    return ports
