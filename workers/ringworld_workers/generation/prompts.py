"""Questions to prompts: text, images and videos in order, bare or as a conversation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringworld_model.batch import TEXT, VISION
from ringworld_model.sampling.prompt import Prompt
from ringworld_model.tokens import Span, vision_tokens
from ringworld_workers.data.chat_template import Content, Role, Turn
from ringworld_workers.data.draft import Part as DraftPart
from ringworld_workers.data.draft import SpecialPart, TextPart
from ringworld_workers.data.files import DataError
from ringworld_workers.data.media import sample_media
from ringworld_workers.data.sampling import Sampling
from ringworld_workers.generation.coder import Coder
from ringworld_workers.generation.source import RequestError

NUM_FRAMES = 8
"""Frames of a video that says nothing else, as the release of LWM takes."""
_EVEN_FPS = 25.0
"""Moments a second among which evenly spread frames are chosen."""
_BATCH_FRAMES = 64
"""Frames that are in memory at one time."""
_MAX_NAME = 80


@dataclass(frozen=True, slots=True)
class Image:
    """A picture: of a video or an animation, the first.

    Attributes:
        data: path of a file, or its bytes.
    """

    data: Path | str | bytes


@dataclass(frozen=True, slots=True)
class Clip:
    """A video, of which some frames are taken.

    Attributes:
        data: path of a file, or its bytes.
        fps: frames taken a second; None: ``num_frames`` of the whole, evenly.
        num_frames: most frames, spread evenly from the first to the last; None: all that ``fps``
            gives, and without ``fps`` ``NUM_FRAMES``.
    """

    data: Path | str | bytes
    fps: float | None = None
    num_frames: int | None = None


Medium = Image | Clip
Part = str | Medium
Message = Mapping[str, object]
"""``role`` (system, user, assistant) and ``content``: a text, or parts in order: texts, media, or
their codes."""


def prompt_of(parts: Sequence[Part], loaded: Coder) -> Prompt:
    """A bare prompt: bos, then texts and clips in order, as they stand.

    Args:
        parts: texts that follow each other are one text.
        loaded: the model, or its ``Coder``.

    Raises:
        RequestError: a medium cannot be used, or the model has no vision.
    """
    spans = [Span([loaded.tokenizer.bos_id], TEXT)]
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += utf8(part)
            continue
        spans += [Span(loaded.tokenizer.encode(text), TEXT), *clip_spans(part, loaded)]
        text = ""
    spans.append(Span(loaded.tokenizer.encode(text), TEXT))
    return Prompt.of(*spans)


def chat_prompt(messages: Sequence[Message], loaded: Coder) -> Prompt:
    """A conversation up to the next answer, in the words that the model was trained with.

    Args:
        messages: an optional system message, then user and assistant in turn; the last is the
            user's. Text and media of a message stand in the order of its parts.
        loaded: the model, or its ``Coder``.

    Raises:
        RequestError: messages out of order or empty, a medium that cannot be used, or a model
            without vision.
    """
    try:
        turns = [_turn(number, message, loaded) for number, message in enumerate(messages, 1)]
        parts = loaded.template.prompt(turns)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(str(error)) from error
    return Prompt.of(*spans_of(parts, loaded))


def spans_of(parts: Sequence[DraftPart], loaded: Coder) -> list[Span]:
    """Tokens of an example's parts, as training makes them."""
    tokenizer = loaded.tokenizer
    spans = []
    for part in parts:
        if isinstance(part, SpecialPart):
            ids = [tokenizer.bos_id if part.token == "bos" else tokenizer.eos_id]
            spans.append(Span(ids, TEXT))
        elif isinstance(part, TextPart):
            spans.append(Span(tokenizer.encode(part.spelled(tokenizer.marks_words)), TEXT))
        else:
            spans.append(Span(vision_tokens(part.codes, loaded.grammar.codebook_size), VISION))
    return spans


def utf8(text: str) -> str:
    """The text, if it is one: from a terminal or JSON it may hold halves of characters.

    Raises:
        RequestError: it does; says where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has no whole character at {error.start:,}; give it in UTF-8"
        ) from None
    return text


def clip_spans(medium: Medium, loaded: Coder) -> list[Span]:
    """A medium between its delimiters."""
    codes = codes_of(medium, loaded)
    return [
        Span(loaded.start_ids, TEXT),
        Span(vision_tokens(codes, loaded.grammar.codebook_size), VISION),
        Span(loaded.end_ids, TEXT),
    ]


def codes_of(
    medium: Medium, loaded: Coder, on_picture: Callable[[], None] = lambda: None
) -> npt.NDArray[np.int32]:
    """The codes of a medium's frames, of which some are in memory at a time.

    Args:
        medium: an image or a video.
        loaded: the model, or its ``Coder``.
        on_picture: see ``sample_media``.

    Returns:
        int32 [F, C].

    Raises:
        RequestError: it is missing, broken or of no known format, or the model has no codebook.
    """
    name = _name(medium)
    codebook = loaded.need_codebook(name)
    codes: list[npt.NDArray[np.int32]] = []
    frames: list[npt.NDArray[np.uint8]] = []
    try:
        with _file(medium) as path:
            for frame in sample_media(path, _sampling(medium), codebook.frame_size, on_picture):
                frames.append(frame.pixels)
                if len(frames) == _BATCH_FRAMES:
                    codes.append(codebook.encode(np.stack(frames)))
                    frames = []
    except DataError as error:
        raise RequestError(f"{name}: {error}") from error
    if frames:
        codes.append(codebook.encode(np.stack(frames)))
    return np.concatenate(codes)


def _sampling(medium: Medium) -> Sampling:
    if isinstance(medium, Image):
        return Sampling(_EVEN_FPS, 1)
    for name, value in (("fps", medium.fps), ("num_frames", medium.num_frames)):
        if value is not None and not 0 < value < float("inf"):
            raise RequestError(f"{_name(medium)}: {name}={value}: give a number above 0")
    if medium.fps is None:
        return Sampling(_EVEN_FPS, medium.num_frames or NUM_FRAMES)
    return Sampling(medium.fps, medium.num_frames)


def _name(medium: Medium) -> str:
    kind = "image" if isinstance(medium, Image) else "video"
    if isinstance(medium.data, bytes):
        return f"the {kind}"
    return f"{kind} {str(medium.data)[-_MAX_NAME:]}"


@contextmanager
def _file(medium: Medium) -> Iterator[Path]:
    """The medium as a file; bytes lie in one without a name, so that a kill leaves nothing."""
    if not isinstance(medium.data, bytes):
        yield Path(medium.data).expanduser()
        return
    with tempfile.TemporaryFile() as file:
        file.write(medium.data)
        file.flush()
        yield Path(f"/proc/self/fd/{file.fileno()}")


_ROLES: dict[object, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def _turn(number: int, message: Message, loaded: Coder) -> Turn:
    role = _ROLES.get(message.get("role"))
    if role is None:
        raise RequestError(
            f"message {number} is of role {message.get('role')!r}, expected one of "
            f"{', '.join(map(str, _ROLES))}"
        )
    content = message.get("content")
    parts = content if isinstance(content, list | tuple) else [content]
    return Turn(role, tuple(_content(number, part, loaded) for part in parts))


def _content(number: int, part: object, loaded: Coder) -> Content:
    if isinstance(part, str | np.ndarray):
        return utf8(part) if isinstance(part, str) else part
    if isinstance(part, Image | Clip):
        return codes_of(part, loaded)
    raise RequestError(
        f"message {number} holds a part of type {type(part).__name__}, expected text, Image or Clip"
    )
