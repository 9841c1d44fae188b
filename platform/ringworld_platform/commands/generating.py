"""One request of `ringworld generate`, or a file of them: what is asked, and where answers go."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ringworld_jobs.prompts_file import PromptLine, check_lines, read_prompts
from ringworld_model.sampling.answer import Answer, Event
from ringworld_platform.commands.asking import Reading, rate_text, stream_text
from ringworld_platform.console import FAILED, err, out
from ringworld_workers.generation.answers_file import AnswersFile
from ringworld_workers.generation.asks import Ask
from ringworld_workers.generation.batches import Answered, answer_lines
from ringworld_workers.generation.coder import Coder
from ringworld_workers.generation.requests import Request
from ringworld_workers.generation.source import RequestError

if TYPE_CHECKING:
    from ringworld_workers.generation.local_ring import LocalRing

OpenRing = Callable[[], "AbstractContextManager[LocalRing]"]


@dataclass(frozen=True, kw_only=True)
class FileRequest(Request):
    """A request of the command line.

    Attributes:
        target: file (of many answers: folder) of the image or video; None: text is asked for.
        save: folder of what answers in text draw.
    """

    target: Path | None
    save: Path | None

    def keep(self, answer: Answer, ask: Ask, coder: Coder, name: str) -> list[Path]:
        """Write what was drawn.

        Args:
            answer: complete.
            ask: that it answers.
            coder: of the model.
            name: of the files in a folder; empty: the target is a file.

        Returns:
            The files.
        """

        def path_of(number: int, suffix: str) -> Path | None:
            if self.target is not None and not name:
                return self.target
            folder = self.target or self.save
            tail = "" if self.target is not None else f"-{number}"
            return None if folder is None else folder / f"{name or 'answer'}{tail}{suffix}"

        return self.write(answer, ask, coder, path_of)


def answer_one(ring: LocalRing, ask: Ask, request: FileRequest, coder: Coder) -> None:
    """Answer to standard output, or into the request's file."""
    from rich.progress import Progress

    answer, console = Answer(), err()
    draws = request.target is not None
    with Progress(
        console=console, transient=True, disable=not (draws and console.is_terminal)
    ) as bar:
        task = bar.add_task("drawing", total=ask.settings.max_new_tokens)

        def take(event: Event) -> None:
            answer.add(event)
            bar.advance(task)

        events = ring.call("answer", [ask], on_chunk=Reading())
        tokens, seconds = stream_text(events, take)
    written = request.keep(answer, ask, coder, "")
    console.print(f"{rate_text(tokens, seconds)}, end: {answer.end}", style="dim", markup=False)
    for path in written:
        out().print(f"written to {path}", markup=False)
    missed = len(answer.clips) - len(written)
    if missed:
        console.print(f"{missed} clips were drawn; --save DIR keeps them", style="yellow")


def answer_file(
    prompts: Path,
    path: Path,
    batch: int,
    coder: Coder,
    request: FileRequest,
    open_ring: OpenRing,
) -> None:
    """Answer a file's questions into another one, as far as they are not answered there yet.

    Raises:
        PromptsError, RequestError: a line cannot be asked, or the answers are of other settings.
        typer.Exit: some lines could not be answered; a rerun tries them again.
    """
    lines = read_prompts(prompts)
    check_lines(lines, request.to, prompts)
    answers = AnswersFile(path, _facts(request, coder))
    with closing(answers):
        for line in lines:
            before = answers.done.get(line.id)
            if before is not None and before != line.digest:
                raise RequestError(
                    f"{path} has an answer to another question of id {line.id!r} than {prompts} "
                    f"line {line.number}; name another --out"
                )
        left = [line for line in lines if line.id not in answers.done]
        err().print(f"{len(left)} of {len(lines)} prompts to answer", markup=False)
        if not left:
            return

        def make(line: PromptLine) -> Ask:
            return request.ask_line(line, coder)

        # Before the weights are loaded; media are read when it is their turn.
        for line in left:
            if not (line.images or line.videos or line.given):
                try:
                    make(line)
                except RequestError as error:
                    raise RequestError(f"{prompts} line {line.number}: {error}") from error
        with open_ring() as ring:
            failed = _answer(ring, left, make, batch, answers, request, coder)
    if failed:
        err().print(f"{failed} prompts have no answer; the same command tries them again")
        raise typer.Exit(FAILED)


def _answer(
    ring: LocalRing,
    lines: Sequence[PromptLine],
    make: Callable[[PromptLine], Ask],
    batch: int,
    answers: AnswersFile,
    request: FileRequest,
    coder: Coder,
) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console, tokens, failed, begun = err(), 0, 0, time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("answers", total=len(lines))
        for done in answer_lines(ring, lines, make, batch):
            if done.ask is None:
                failed += 1
                console.print(f"line {done.line.number}: {done.problem}", style="red", markup=False)
                continue
            answers.add(_record(done, done.ask, request, coder))
            tokens += done.answer.tokens
            speed = tokens / max(time.monotonic() - begun, 1e-6)
            bar.update(task, advance=1, description=f"answers, {speed:,.1f} tokens/s")
    answered = len(lines) - failed
    console.print(
        f"{answered} answers of {tokens:,} tokens in {answers.path}", markup=False, style="dim"
    )
    return failed


def _record(done: Answered, ask: Ask, request: FileRequest, coder: Coder) -> dict[str, Any]:
    files = request.keep(done.answer, ask, coder, f"{done.line.number:05d}")
    return {
        "id": done.line.id,
        "digest": done.line.digest,
        "prompt": done.line.prompt,
        "answer": done.answer.text,
        "end": done.answer.end,
        "prompt_tokens": len(ask.prompt),
        "tokens": done.answer.tokens,
        "files": [str(path) for path in files],
    }


def _facts(request: FileRequest, coder: Coder) -> dict[str, Any]:
    """What answers depend on, for the file that lies beside them."""
    plain = {name: getattr(request, name) for name in ("form", "media_first", "frames", "fps")}
    return {
        "model": coder.label,
        **plain,
        "max_frames": request.max_frames,
        "target": None if request.target is None else str(request.target),
        **asdict(request.settings),
    }
