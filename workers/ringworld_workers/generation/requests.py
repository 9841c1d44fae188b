"""What is asked of a model in the same way for many prompts, and what of the answers are files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ringworld_jobs.evaluate_generate import DRAWN_FRAMES
from ringworld_jobs.prompts_file import PromptLine, Target, pieces_of
from ringworld_model.sampling.answer import Answer
from ringworld_model.sampling.settings import SamplingSettings
from ringworld_workers.generation.asks import Ask, Form, clip_ask, text_ask
from ringworld_workers.generation.coder import Coder
from ringworld_workers.generation.media_files import VIDEO_SUFFIXES, write_image, write_video
from ringworld_workers.generation.prompts import Clip, Image, Part
from ringworld_workers.generation.source import RequestError

_FPS = 4.0
"""Frames shown a second, as the release of LWM does."""
PathOf = Callable[[int, str], Path | None]
"""Where a clip goes, by its number in the answer and the suffix that suits it; None: nowhere."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked, whatever the prompt is.

    Attributes:
        settings: how answers are drawn.
        to: what comes out.
        form: how a question is spelled.
        media_first: media stand before the text.
        frames: to draw, or to take of a video; None: the default.
        fps: of videos, taken and written; None: the default.
        max_frames: that an answer in text may draw.
    """

    settings: SamplingSettings
    to: Target = "text"
    form: Form = "auto"
    media_first: bool = False
    frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None

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
        if self.to == "text":
            media = (
                [Image(path) for path in images],
                [Clip(path, fps=self.fps, num_frames=self.frames) for path in videos],
            )
            parts = arrange(text, *media, media_first=self.media_first)
            return text_ask(parts, coder, settings, form=self.form, max_frames=self.max_frames)
        video = self.to == "video"
        frames = (self.frames or DRAWN_FRAMES) if video else 1
        begin = None if given is None else Clip(given, fps=self.fps or _FPS)
        return clip_ask(text, frames, coder, settings, video=video, form=self.form, given=begin)

    def ask_line(self, line: PromptLine, coder: Coder) -> Ask:
        """What the model is asked by a line of a file; its number decides the seed.

        Raises:
            RequestError: it cannot be asked.
        """
        seed = line.number - 1
        return self.ask(line.prompt, line.images, line.videos, line.given, coder, seed)

    def write(self, answer: Answer, ask: Ask, coder: Coder, path_of: PathOf) -> list[Path]:
        """Write what was drawn.

        Args:
            answer: complete.
            ask: that it answers.
            coder: of the model.
            path_of: says where, clip by clip.

        Returns:
            The files.
        """
        written = []
        for number, codes in enumerate(answer.clips):
            if ask.given is not None:
                codes = np.concatenate([ask.given, codes])
            moves = self.to == "video" or len(codes) > 1
            path = path_of(number, ".mp4" if moves else ".png")
            if path is None:
                break
            pixels = coder.pictures(codes)
            if path.suffix.lower() in VIDEO_SUFFIXES:
                write_video(pixels, path, self.fps or _FPS)
            else:
                write_image(pixels[0], path)
            written.append(path)
        return written


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
    pieces = pieces_of(text)
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
