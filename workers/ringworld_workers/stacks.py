"""Where a process is in its Python code, asked of it, or of its node when it does not answer."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

# Frames below these folders wait for other ranks, or lead there.
_COLLECTIVES = (
    os.path.join("torch", "distributed", ""),
    os.path.join("deepspeed", "comm", ""),
    os.path.join("ringworld_model", "ring", "comm.py"),
)
_LIBRARIES = tuple({*sysconfig.get_paths().values()} - {sysconfig.get_path("data")})
_WRAPPERS = frozenset({"wrapper", "inner"})
SIGNAL_SECONDS = 1.0
STATES = {
    psutil.STATUS_STOPPED: "is stopped by a signal (SIGSTOP)",
    psutil.STATUS_TRACING_STOP: "is stopped by a debugger",
    psutil.STATUS_DISK_SLEEP: "waits for a disk or a file system that does not answer",
    psutil.STATUS_ZOMBIE: "has ended",
}


@dataclass(frozen=True, slots=True)
class Stacks:
    """What the threads of a rank are doing.

    Attributes:
        text: the Python stack of every thread.
        at: the place in the code where the training thread is, collectives left out.
        waits_in: the collective in which it waits for other ranks; empty if it is in none.
    """

    text: str
    at: str = ""
    waits_in: str = ""


@dataclass(frozen=True, slots=True)
class ProcessLook:
    """A process that does not answer, as its node sees it.

    Attributes:
        state: what it does, in words.
        stacks: its Python stacks, where it could still be made to write them.
    """

    state: str
    stacks: str = ""


def own_stacks(training_thread: int | None) -> Stacks:
    """The stacks of this process.

    Args:
        training_thread: the thread whose place is told; None if there is none yet.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    parts = []
    for ident, frame in frames.items():
        name = "training" if ident == training_thread else names.get(ident, ident)
        parts.append(f"thread {name}:\n{''.join(traceback.format_stack(frame))}")
    frame_there = frames.get(training_thread) if training_thread is not None else None
    at, waits_in = _place(frame_there)
    return Stacks("\n".join(parts), at, waits_in)


def _place(innermost: FrameType | None) -> tuple[str, str]:
    """The innermost place outside of collectives, of the project's own code if any is there."""
    waits_in, at = "", ""
    frame = innermost
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename for part in _COLLECTIVES):
            if not at and not waits_in and code.co_name not in _WRAPPERS:
                waits_in = code.co_name
        else:
            place = f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
            ours = "ringworld_" in code.co_filename
            if ours or not code.co_filename.startswith(_LIBRARIES):
                return place, waits_in
            at = at or place
        frame = frame.f_back
    return at, waits_in


def write_stacks_on_signal() -> str:
    """Make SIGUSR1 write the stacks to standard error, also while C code keeps Python from running.

    Returns:
        The file that standard error goes to; empty where it is none.
    """
    # The plain descriptor: sys.stderr may be a wrapper.
    with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        return os.readlink("/proc/self/fd/2")
    return ""


def look_at_process(pid: int, errors_file: str) -> ProcessLook:
    """Look at a process of this machine that does not answer.

    Args:
        pid: the process; it has called ``write_stacks_on_signal``.
        errors_file: what that has returned.
    """
    try:
        state = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return ProcessLook("is gone")
    except psutil.Error as error:
        return ProcessLook(f"cannot be looked at: {error}")
    told = STATES.get(state)
    if told is not None:
        return ProcessLook(told)
    try:
        stacks = _made_to_write(pid, Path(errors_file)) if errors_file else ""
    except OSError as error:
        stacks = f"its stacks cannot be had: {error}"
    return ProcessLook("is alive and does not let Python run", stacks)


def _made_to_write(pid: int, file: Path) -> str:
    before = file.stat().st_size
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + SIGNAL_SECONDS
    size = before
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = file.stat().st_size
        if now == size > before:
            break
        size = now
    with file.open("rb") as opened:
        opened.seek(before)
        return opened.read(1 << 20).decode("utf-8", "replace")
