"""dev s3: an S3 server on this machine, for who has none at hand."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ringworld_platform.console import err, next_commands
from ringworld_platform.errors import PlatformError

if TYPE_CHECKING:
    from ringworld_platform.local_s3 import LocalS3

Handler = Callable[[int, FrameType | None], None]
NOT_FOUND = 127
# What would stand against the server's own, were it left in the environment.
_IN_THE_WAY = ("AWS_SESSION_TOKEN", "AWS_PROFILE")


def s3(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- COMMAND ...]", help="Run this with the server, and stop it afterwards."
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=1, max=65535, help="Of the server; a free one if left out."),
    ] = None,
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Its objects and credentials, kept.")
    ] = Path(".ringworld/s3"),
    bucket: Annotated[
        str, typer.Option("--bucket", metavar="NAME", help="Made if it is not there.")
    ] = "runs",
    env_file: Annotated[
        Path | None,
        typer.Option(
            "--env-file",
            metavar="FILE",
            help="Write the lines that a shell needs here (0600) instead of printing them.",
        ),
    ] = None,
) -> None:
    """Start an S3 server on this machine, for trying checkpoints on S3.

    It listens on loopback only and asks for the credentials that it makes for its folder of data.
    What it holds is there again the next time. Not for data that other users of this machine must
    not see.

    Without a command it prints what another shell needs to reach it, and stays until Ctrl-C. With
    one it hands that command the same in its environment, stops when that ends, and returns its
    exit code. It needs SeaweedFS: pip install 'ringworld\\[s3-server]'.
    """
    from ringworld_jobs.store_url import parse_store
    from ringworld_platform.local_s3 import LocalS3

    try:
        parse_store(f"s3://{bucket}")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--bucket") from None
    if command and env_file is not None:
        raise typer.BadParameter("a command is handed its environment", param_hint="--env-file")
    program = _program(command[0]) if command else None
    if command and program is None:
        err().print(f"error: there is no program {command[0]}", style="red", markup=False)
        raise typer.Exit(NOT_FOUND)
    with _stopped_by_signals(), LocalS3(data, port=port) as server:
        server.start(bucket)
        err().print(f"S3 at {server.endpoint}, its objects in {data}", style="dim", markup=False)
        if command and program:
            raise typer.Exit(_run([program, *command[1:]], server))
        _serve(server, bucket, env_file)


def _program(name: str) -> str | None:
    """Path of a program, as a shell finds it; else beside this one, as `ringworld` itself is."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def _run(command: list[str], server: LocalS3) -> int:
    """Run a command beside the server; returns its exit code, as a shell would give it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    process = subprocess.Popen(command, env=environment | server.environment())

    def pass_on(number: int, frame: FrameType | None) -> None:
        # A terminal sends Ctrl-C to the command as well. It ends in its own time, and then we do.
        if number != signal.SIGINT:
            process.send_signal(number)

    with _handling(pass_on):
        code = process.wait()
    return 128 - code if code < 0 else code


def _serve(server: LocalS3, bucket: str, env_file: Path | None) -> None:
    """Say how to reach the server, and stay until it is told to stop, or dies."""
    lines = [f"export {name}={shlex.quote(v)}" for name, v in server.environment().items()]
    text = "\n".join([f"unset {' '.join(_IN_THE_WAY)}", *lines]) + "\n"
    reach = "the lines above"
    if env_file is None:
        typer.echo(text, nl=False)
        sys.stdout.flush()
    else:
        _write_private(env_file, text)
        reach = f". {shlex.quote(str(env_file.absolute()))}"
    steps = [
        (reach, "in another shell, and then there:"),
        ("ringworld run jobs/quickstart-s3.yaml", "its checkpoints go to s3://runs/ringworld"),
        ("Ctrl-C", "here: stop the server; what it holds is kept"),
    ]
    if bucket != "runs":
        steps[1] = ("ringworld run JOB.yaml", f"checkpoint: {{store: s3://{bucket}/ringworld}}")
    err().print(next_commands(steps), markup=False)
    try:
        status = server.wait()
    except KeyboardInterrupt:
        err().print("stopping the server", style="dim")
        return
    raise PlatformError(f"the S3 server has ended by itself, with status {status}")


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(text)
    except OSError as error:
        raise PlatformError(f"cannot write {path}: {error.strerror or error}") from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let every way to be told to stop end the block in good order: the server must not outlive it.

    Ctrl-C that whoever started this has turned off stays so.
    """
    with _handling(_interrupt):
        yield


@contextmanager
def _handling(handler: Handler) -> Iterator[None]:
    signals = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = [signal.signal(number, handler) for number in signals]
    try:
        yield
    finally:
        for number, old in zip(signals, before, strict=True):
            signal.signal(number, old)
