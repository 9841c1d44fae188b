"""What the commands share: two consoles, and how each kind of error ends a command."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import Console

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
"""Exit codes: the job (or the platform) failed; the user's mistake; Ctrl-C."""
_PIPE_WIDTH = 200  # of a table that another program reads: none of its names should be folded


def out() -> Console:
    """Console on standard output. Made anew, because tests replace the stream."""
    from rich.console import Console

    piped = not sys.stdout.isatty()
    width = _PIPE_WIDTH if piped and "COLUMNS" not in os.environ else None
    return Console(highlight=False, soft_wrap=piped, width=width)


def err() -> Console:
    """Console on standard error, for notes and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def examples(*lines: str) -> str:
    """An epilog of example command lines."""
    shown = (f"[cyan]$ {line}[/cyan]" for line in lines)
    return "\n".join(["[bold]Examples[/bold]", *shown])


class Guarded(TyperGroup):
    """Ends every command with the right exit code, and shows no stack trace for a mistake."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see the exit codes above."""
        from ringworld_platform.errors import PlatformError

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader (head, less) has gone; keep Python from flushing into the closed pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None
        except (PlatformError, ValueError, OSError) as error:
            code = _expected(error)
            if code is None or ctx.params.get("debug"):
                raise typer.Exit(_bug(error, bool(ctx.params.get("debug")))) from None
            raise typer.Exit(code) from None
        except RuntimeError as error:
            # typer's own Exit and Abort are RuntimeErrors.
            if isinstance(error, typer.Exit | typer.Abort):
                raise
            raise typer.Exit(_bug(error, bool(ctx.params.get("debug")))) from None
        except Exception as error:
            if hasattr(error, "exit_code"):  # a usage error, which typer shows itself
                raise
            raise typer.Exit(_bug(error, bool(ctx.params.get("debug")))) from None


def _expected(error: Exception) -> int | None:
    """Show an error that a person can act on; None for one that is a bug."""
    from ringworld_jobs.problem import JobSpecError
    from ringworld_platform.errors import (
        PlatformError,
        RunConflictError,
        StoreRefused,
        UnknownRunError,
    )

    console = err()
    if isinstance(error, JobSpecError):
        show_problems(error)
        return MISTAKE
    if isinstance(error, PlatformError):
        console.print(f"error: {error}", style="red", markup=False)
        if isinstance(error, StoreRefused):
            console.print("nothing was started", style="bold")
        mistake = isinstance(error, UnknownRunError | RunConflictError | StoreRefused)
        return MISTAKE if mistake else FAILED
    return None


def show_problems(error: Any) -> None:
    """Print every problem of a spec, with its place in the file."""
    console = err()
    count = len(error.problems)
    for problem in error.problems:
        console.print(str(problem), markup=False, style="red")
    console.print(f"{count} problem{'s' if count > 1 else ''}; nothing was started", style="bold")


def _bug(error: BaseException, debug: bool) -> int:
    console = err()
    if debug:
        console.print_exception()
        return FAILED
    name = f"ringworld-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    path = Path(tempfile.gettempdir()) / name
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    console.print(f"internal error: {line}", style="red", markup=False)
    console.print(f"the trace is in {path}; `ringworld --debug ...` shows it", markup=False)
    return FAILED


def next_commands(lines: Sequence[tuple[str, str]]) -> str:
    """Commands to go on with, one a line, what each does behind it."""
    width = max(len(command) for command, _ in lines)
    return "\n".join(f"  {command:<{width}}  {what}" for command, what in lines)
