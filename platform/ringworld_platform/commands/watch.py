"""watch: a run as it goes, on the whole terminal; plain lines where there is none."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringworld_platform.commands.options import (
    DEFAULT_RUNS,
    Address,
    NewestRun,
    Runs,
    StoreUrl,
)
from ringworld_platform.console import err, out

if TYPE_CHECKING:
    from rich.console import Console

    from ringworld_platform.progress import RunProgress
    from ringworld_platform.run_view import OpenView
    from ringworld_platform.watch_screen import Look

PICTURE_SIZE = "100x32"
# Rich's own fetches a font from the web.
_PICTURE = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px;
  line-height: {line_height}px;
  white-space: pre;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def watch(
    job: NewestRun = None,
    svg: Annotated[
        Path | None,
        typer.Option("--svg", metavar="FILE", help="Write one picture of it instead, and end."),
    ] = None,
    view: Annotated[
        str, typer.Option("--view", help="What to begin with: overview, curves, ring or events.")
    ] = "overview",
    size: Annotated[
        str, typer.Option("--size", metavar="COLUMNSxLINES", help="Of the picture.")
    ] = PICTURE_SIZE,
    runs: Runs = DEFAULT_RUNS,
    address: Address = None,
    store: StoreUrl = None,
) -> None:
    """Watch a run: its stages, losses, ring of workers and events. The job does not notice.

    Keys 1 to 4 or the arrows change the view, up and down scroll, q or Ctrl-C leaves and the job
    goes on. Where the output is no terminal, there are plain lines until the run ends.
    """
    from ringworld_platform.left_alone import farewell
    from ringworld_platform.progress import RunProgress
    from ringworld_platform.run_view import find_status, open_view
    from ringworld_platform.store_view import split_url
    from ringworld_platform.watch_screen import VIEWS, Look

    if view not in VIEWS:
        problem = f"there is no view {view}; there are {', '.join(VIEWS)}"
        raise typer.BadParameter(problem, param_hint="--view")
    columns, lines = _size(size)
    look = Look(VIEWS.index(view))
    job, store = split_url(job, store)
    console = out()
    with open_view(runs, address, store) as opened:
        progress = RunProgress(opened.view, str(find_status(opened.view, job)["run_id"]))
        if svg is not None:
            _draw(progress, look, svg, columns, lines)
            return
        try:
            if console.is_terminal:
                _stay(progress, look, opened, console)
            else:
                _tell(progress, opened, console)
        except KeyboardInterrupt:
            pass  # leaving is no failure
    state = progress.status.get("state")
    if progress.status.get("left"):
        err().print(farewell(progress.status), markup=False)
    elif not progress.ended:
        err().print(f"left {progress.name}, which is {state} and goes on", markup=False)
    elif console.is_terminal:
        console.print(f"{progress.name} is {state}", markup=False)


def _stay(progress: RunProgress, look: Look, opened: OpenView, console: Console) -> None:
    """Show the screen until a key ends it."""
    from rich.live import Live

    from ringworld_platform.errors import PlatformError, UnknownRunError
    from ringworld_platform.keys import Keys
    from ringworld_platform.watch_screen import screen

    due = 0.0
    with Keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            if time.monotonic() >= due:
                try:
                    progress.poll()
                    look.problem = ""
                except UnknownRunError:
                    raise
                except PlatformError as error:  # the store or the cluster is away: it may come back
                    look.problem = str(error)
                due = time.monotonic() + opened.poll_seconds
            width, height = console.size
            live.update(screen(progress, look, width, height), refresh=True)
            pressed = keys.pressed(max(0.05, due - time.monotonic()))
            if not all([look.press(key, max(1, height - 4)) for key in pressed]):
                return


def _tell(progress: RunProgress, opened: OpenView, console: Console) -> None:
    """Print lines until the run ends, or nobody goes on with it."""
    from ringworld_platform.display import PlainDisplay
    from ringworld_platform.left_alone import LeftAlone

    plain, alone = PlainDisplay(console), LeftAlone()
    while True:
        progress.poll()
        plain.update(progress)
        if progress.ended or alone.seen(progress.status):
            return
        time.sleep(opened.poll_seconds)


def _draw(progress: RunProgress, look: Look, path: Path, columns: int, lines: int) -> None:
    """Write the screen as it is now into a file."""
    import io

    from rich.console import Console

    from ringworld_platform.watch_screen import screen

    progress.poll()
    console = Console(
        record=True,
        width=columns,
        height=lines,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    console.print(screen(progress, look, columns, lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"ringworld watch {progress.name}"
    path.write_text(console.export_svg(title=title, code_format=_PICTURE), encoding="utf-8")
    out().print(f"picture: {path}", markup=False)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not (20 <= int(match[1]) <= 400 and 6 <= int(match[2]) <= 200):
        problem = f"{text} is no size; write 100x32: 20 to 400 columns, 6 to 200 lines"
        raise typer.BadParameter(problem, param_hint="--size")
    return int(match[1]), int(match[2])
