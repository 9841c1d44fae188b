"""The loop of `ringworld chat`: lines in, answers out."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from ringworld_model.sampling.answer import Answer
from ringworld_platform.commands.asking import Reading, rate_text, stream_text
from ringworld_platform.console import err
from ringworld_workers.generation.coder import Coder
from ringworld_workers.generation.conversation import Conversation
from ringworld_workers.generation.media_files import write_image, write_video
from ringworld_workers.generation.prompts import Clip, Image, Part
from ringworld_workers.generation.source import RequestError

_HELP = """\
/undo         take the last question and its answer back
/reset        take all of them back; what was given at the start stays read
/image FILE   a picture that goes with the next question
/video FILE   a video that goes with the next question
/quit         end (Ctrl-D too); Ctrl-C ends an answer, twice the chat"""
_FPS = 4.0


def read_document(path: Path) -> str:
    """The text of a document.

    Raises:
        RequestError: it is not there, empty, or no UTF-8.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--document {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"--document {path} is not UTF-8 (byte {error.start:,}); give a text file"
        ) from None
    if not text.strip():
        raise RequestError(f"--document {path} is empty")
    return text.strip()


class Chat:
    """Reads lines until the last one, or /quit."""

    def __init__(
        self,
        conversation: Conversation,
        coder: Coder,
        lines: TextIO,
        *,
        fps: float | None = None,
        frames: int | None = None,
        save: Path | None = None,
    ) -> None:
        """Begin.

        Args:
            conversation: with what it is about read already.
            coder: of the model.
            lines: standard input.
            fps: of videos that are named in the chat.
            frames: of them at most.
            save: folder of frames that answers draw; None: they are only counted.
        """
        self._conversation, self._coder, self._lines = conversation, coder, lines
        self._fps, self._frames, self._save = fps, frames, save
        self._media: list[Part] = []
        self._drawn = 0
        self._typed = lines.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/undo": self._undo,
            "/reset": self._reset,
            "/image": self._image,
            "/video": self._video,
            "/help": lambda _: self._note(_HELP),
        }

    def run(self) -> None:
        """Answer line after line."""
        if self._typed:
            self._note("/help says what else may be written")
        while True:
            line = self._line()
            if line is None or line == "/quit":
                return
            if not line:
                continue
            try:
                self._take(line)
            except RequestError as error:
                err().print(f"error: {error}", style="red", markup=False)

    def _line(self) -> str | None:
        if not self._typed:
            line = self._lines.readline()
            return line.strip() if line else None
        try:
            import readline  # noqa: F401  # gives input() a history

            return input("> ").strip()
        except EOFError:
            return None

    def _take(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name in self._commands:
            self._commands[name](rest.strip())
        elif line.startswith("/"):
            raise RequestError(f"{name} is no command; /help lists them")
        else:
            self._ask(line)

    def _ask(self, question: str) -> None:
        parts: list[Part] = [question, *self._media]
        self._media = []
        answer = Answer()
        with _interrupt_once() as stopped:
            events = self._conversation.ask(
                parts,
                cancelled=lambda: (0,) if stopped.is_set() else (),
                on_chunk=Reading(),
            )
            tokens, seconds = stream_text(events, answer.add)
        for clip in answer.clips:
            self._drawn += 1
            path = None if self._save is None else self._save / f"{self._drawn:03d}"
            if path is None:
                self._note(f"[a clip of {len(clip)} frames; --save DIR keeps such]")
            elif len(clip) == 1:
                write_image(self._coder.pictures(clip)[0], path.with_suffix(".png"))
            else:
                write_video(self._coder.pictures(clip), path.with_suffix(".mp4"), self._fps or _FPS)
        why = {"length": ", cut off", "cancelled": ", stopped"}.get(answer.end or "", "")
        left, context = self._conversation.left, self._coder.context_length
        self._note(f"[{rate_text(tokens, seconds)}{why}; {left:,} of {context:,} tokens left]")

    def _undo(self, _: str) -> None:
        if not self._conversation.undo():
            raise RequestError("there is no question to take back")
        self._note(f"[taken back; {self._conversation.left:,} tokens left]")

    def _reset(self, _: str) -> None:
        self._media = []
        self._conversation.reset()
        self._note(f"[begun anew; {self._conversation.left:,} tokens left]")

    def _image(self, path: str) -> None:
        self._add(Image(_existing(path)))

    def _video(self, path: str) -> None:
        self._add(Clip(_existing(path), fps=self._fps, num_frames=self._frames))

    def _add(self, medium: Image | Clip) -> None:
        self._coder.need_codebook("a medium")
        self._media.append(medium)
        self._note("[goes with the next question]")

    def _note(self, text: str) -> None:
        err().print(text, style="dim", markup=False)


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not name or not path.is_file():
        raise RequestError(f"there is no file {name!r}")
    return path


@contextmanager
def _interrupt_once() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, the second one interrupts."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
        sys.stdout.flush()
