"""One request of `ringworld generate`, or a file of them: what is asked, and where answers go."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from ringworld_model.sampling.answer import Answer, Event
from ringworld_model.sampling.settings import SamplingSettings
from ringworld_platform.commands.asking import Reading, rate_text, stream_text
from ringworld_platform.console import FAILED, err, out
from ringworld_workers.generation.answers_file import AnswersFile
from ringworld_workers.generation.asks import Ask, Form, clip_ask, text_ask
from ringworld_workers.generation.batches import Answered, answer_lines
from ringworld_workers.generation.coder import Coder
from ringworld_workers.generation.media_files import write_image, write_video
from ringworld_workers.generation.prompts import Clip, Image, Part
from ringworld_workers.generation.prompts_file import PromptLine, read_prompts
from ringworld_workers.generation.source import RequestError

if TYPE_CHECKING:
    from ringworld_workers.generation.local_ring import LocalRing

_PLACES = re.compile(r"\{(image|video)\}")
_FRAMES, _FPS = 8, 4.0
"""Frames that are drawn, and written a second, as the release of LWM does."""
OpenRing = Callable[[], "AbstractContextManager[LocalRing]"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the options ask for, whatever the prompt is.

    Attributes:
        settings: how answers are drawn.
        form: how a question is spelled.
        media_first: media stand before the text.
        frames: to draw, or to take of a video; None: the default.
        fps: of videos, taken and written; None: the default.
        max_frames: that an answer in text may draw.
        target: file (of many answers: folder) of the image or video; None: text is asked for.
        video: a video is drawn, not an image.
        save: folder of what answers in text draw.
    """

    settings: SamplingSettings
    form: Form
    media_first: bool
    frames: int | None
    fps: float | None
    max_frames: int | None
    target: Path | None
    video: bool
    save: Path | None

    def ask(
        self,
        text: str,
        images: Sequence[Path],
        videos: Sequence[Path],
        given: Path | None,
        coder: Coder,
        seed: int = 0,
    ) -> Ask:
        """What the model is asked.

        Args:
            text: of the prompt.
            images: to ask about.
            videos: to ask about.
            given: what a video begins with.
            coder: of the model.
            seed: added to that of the settings.

        Raises:
            RequestError: it cannot be asked.
        """
        settings = replace(self.settings, seed=self.settings.seed + seed)
        if self.target is None:
            media = (
                [Image(path) for path in images],
                [Clip(path, fps=self.fps, num_frames=self.frames) for path in videos],
            )
            parts = arrange(text, *media, media_first=self.media_first)
            return text_ask(parts, coder, settings, form=self.form, max_frames=self.max_frames)
        if images or videos:
            raise RequestError("media are asked about in text; a video goes on `from` one")
        frames = (self.frames or _FRAMES) if self.video else 1
        begin = None if given is None else Clip(given, fps=self.fps or _FPS)
        return clip_ask(
            text, frames, coder, settings, video=self.video, form=self.form, given=begin
        )

    def write(self, answer: Answer, ask: Ask, coder: Coder, name: str) -> list[Path]:
        """Write what was drawn.

        Args:
            answer: complete.
            ask: that it answers.
            coder: of the model.
            name: of the files in a folder; empty: the target is a file.

        Returns:
            The files.
        """
        written = []
        for number, codes in enumerate(answer.clips):
            if ask.given is not None:
                codes = np.concatenate([ask.given, codes])
            path = self._path(len(codes), name, number)
            if path is None:
                break
            pixels = coder.pictures(codes)
            if path.suffix == ".mp4" or path.suffix == ".gif":
                write_video(pixels, path, self.fps or _FPS)
            else:
                write_image(pixels[0], path)
            written.append(path)
        return written

    def _path(self, frames: int, name: str, number: int) -> Path | None:
        if self.target is not None and not name:
            return self.target
        folder = self.target or self.save
        suffix = ".mp4" if frames > 1 or (self.target is not None and self.video) else ".png"
        tail = "" if self.target is not None else f"-{number}"
        return None if folder is None else folder / f"{name or 'answer'}{tail}{suffix}"


def arrange(
    text: str, images: Sequence[Image], videos: Sequence[Clip], *, media_first: bool
) -> list[Part]:
    """Text and media in order: where placeholders stand, else together.

    Args:
        text: with ``{image}`` and ``{video}``, or without.
        images: in the order of their placeholders.
        videos: likewise.
        media_first: where there is no placeholder.

    Raises:
        RequestError: not as many placeholders as media.
    """
    pieces = _PLACES.split(text)
    if len(pieces) == 1:
        said: list[Part] = [text] if text else []
        media: list[Part] = [*images, *videos]
        return media + said if media_first else said + media
    left: dict[str, list[Part]] = {"image": list(images), "video": list(videos)}
    for kind, there in left.items():
        places = pieces[1::2].count(kind)
        if places != len(there):
            raise RequestError(
                f"the prompt has {places} places {{{kind}}} and there are {len(there)} {kind}s; "
                "give one for each place"
            )
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        if number % 2:
            parts.append(left[piece].pop(0))
        elif piece.strip():
            parts.append(piece)
    return parts


def answer_one(ring: LocalRing, ask: Ask, request: Request, coder: Coder) -> None:
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
    written = request.write(answer, ask, coder, "")
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
    request: Request,
    open_ring: OpenRing,
) -> None:
    """Answer a file's questions into another one, as far as they are not answered there yet.

    Raises:
        RequestError: a line cannot be asked, or the answers are of other settings.
        typer.Exit: some lines could not be answered; a rerun tries them again.
    """
    lines = read_prompts(prompts)
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
            return request.ask(
                line.prompt, line.images, line.videos, line.given, coder, line.number - 1
            )

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
    request: Request,
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


def _record(done: Answered, ask: Ask, request: Request, coder: Coder) -> dict[str, Any]:
    files = request.write(done.answer, ask, coder, f"{done.line.number:05d}")
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


def _facts(request: Request, coder: Coder) -> dict[str, Any]:
    """What answers depend on, for the file that lies beside them."""
    plain = {name: getattr(request, name) for name in ("form", "media_first", "frames", "fps")}
    return {
        "model": coder.label,
        **plain,
        "max_frames": request.max_frames,
        "target": None if request.target is None else str(request.target),
        **asdict(request.settings),
    }
