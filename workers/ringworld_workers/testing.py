"""Run one function in several real processes that share a gloo process group: tests and parity.

The ranks are spawned, not forked: each has a fresh interpreter and no inherited torch threads.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0


class DistributedError(RuntimeError):
    """One or more ranks of ``run_distributed`` failed; the message holds every traceback."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank of a fresh gloo group.

    The default process group exists while ``fn`` runs and is destroyed after it. Every rank
    computes with one thread. Tensors in the results are brought back as CPU copies.

    Args:
        fn: a module-level function. Its module need not be importable by name: a test module
            loaded by pytest's importlib mode is loaded again from its file.
        world_size: number of processes, at least 1.
        *args: picklable arguments, the same for all ranks.
        timeout: seconds after which all ranks are killed; bounds every collective too.

    Returns:
        What ``fn`` returned, by rank.

    Raises:
        ValueError: ``fn`` is not a module-level function, or world_size < 1.
        DistributedError: a rank raised, died or ran out of time.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: at least one process is needed")
    target = _locate(fn)
    with tempfile.TemporaryDirectory(prefix="ringworld-ranks-") as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(
                target=_child, args=(rank, world_size, target, args, folder, timeout), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            with _interrupts_held():
                for process in processes:
                    process.start()
            late = _join(processes, Path(folder), timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join(_GRACE_SECONDS)
        return _collect(Path(folder), fn.__qualname__, processes, late, timeout)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes that never see Ctrl-C: the parent ends them, and they print nothing of it.

    A blocked signal stays blocked in the processes that are started meanwhile; the parent gets
    its own once the block ends.
    """
    # Its first start would unblock the signal again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _locate(fn: Callable[..., Any]) -> tuple[str, str | None, str]:
    """(module name, file or None, qualified name): enough for a child to find ``fn`` again."""
    if "<" in fn.__qualname__:
        raise ValueError(
            f"{fn.__qualname__} is not at module level; a spawned process cannot find it. "
            "Move it to the top of its module"
        )
    file = getattr(sys.modules.get(fn.__module__), "__file__", None)
    return fn.__module__, str(Path(file).resolve()) if file else None, fn.__qualname__


def _load(target: tuple[str, str | None, str]) -> Callable[..., Any]:
    name, file, qualified_name = target
    found: Any = _module(name, file)
    for part in qualified_name.split("."):
        found = getattr(found, part)
    return found


def _module(name: str, file: str | None) -> ModuleType:
    # Under importlib mode a test module's name ("model.ring.test_x") is no import path, or
    # leads to another file; the file decides.
    try:
        module = importlib.import_module(name) if name != "__main__" else None
    except ImportError:
        module = None
    if module is not None and (
        file is None or Path(getattr(module, "__file__", None) or "").resolve() == Path(file)
    ):
        return module
    if file is None:
        raise ImportError(f"module {name} has no file and cannot be imported")
    spec = importlib.util.spec_from_file_location("ringworld_distributed_target", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {file}")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def _child(
    rank: int,
    world_size: int,
    target: tuple[str, str | None, str],
    args: tuple[Any, ...],
    folder: str,
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    failed = False
    # The parent asks where this rank is before it kills it.
    faulthandler.register(signal.SIGUSR1, file=Path(folder, f"stack-{rank}").open("w"))
    try:
        fn = _load(target)
        # The path is unique to this call, so concurrent tests share no port and no file.
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(Path(folder, "store")), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        # A file a rank, not a queue: a result larger than a pipe's buffer cannot block the exit.
        _write(Path(folder, f"result-{rank}"), fn(rank, world_size, *args))
    except BaseException:
        failed = True
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
    finally:
        # After a failure the peers may be gone: a tidy shutdown could wait for them.
        if failed:
            os._exit(1)
        dist.destroy_process_group()


def _write(path: Path, result: Any) -> None:
    part = path.with_suffix(".part")
    torch.save(result, part)
    part.replace(path)


def _join(processes: list[Any], folder: Path, timeout: float) -> bool:
    """Wait for all; True if time ran out. After the first failure the rest get a short grace."""
    deadline = time.monotonic() + timeout
    shortened = False
    while time.monotonic() < deadline:
        running = [process for process in processes if process.is_alive()]
        if not running:
            return False
        if not shortened and any(process.exitcode for process in processes):
            shortened = True
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        running[0].join(_POLL_SECONDS)
    if not shortened:
        _ask_for_stacks(processes)
    return not shortened


def _ask_for_stacks(processes: list[Any]) -> None:
    """Let the ranks that are late write where they are; a moment is all that they get."""
    late = [process for process in processes if process.is_alive()]
    for process in late:
        os.kill(process.pid, signal.SIGUSR1)
    for process in late:
        process.join(_POLL_SECONDS)


def _collect(
    folder: Path, name: str, processes: list[Any], late: bool, timeout: float
) -> list[Any]:
    problems: list[str] = []
    results: list[Any] = []
    for rank, process in enumerate(processes):
        error, result = folder / f"error-{rank}", folder / f"result-{rank}"
        if error.exists():
            problems.append(f"rank {rank} raised:\n{error.read_text()}")
        elif result.exists() and not process.exitcode:
            # Written by our own child a moment ago, so any pickled type is fine.
            results.append(torch.load(result, map_location="cpu", weights_only=False))
        elif late:
            stack = folder / f"stack-{rank}"
            place = f":\n{stack.read_text()}" if stack.exists() else ""
            problems.append(
                f"rank {rank} was still running after {timeout:g} s and was killed{place}"
            )
        else:
            problems.append(f"rank {rank} ended with exit code {process.exitcode} and no result")
    if problems:
        raise DistributedError(f"{name} on {len(processes)} ranks:\n" + "\n".join(problems))
    return results
