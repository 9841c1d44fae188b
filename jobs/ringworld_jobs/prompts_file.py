"""Questions from a jsonl file, one a line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ringworld_jobs.problem import nearest

Target = Literal["text", "image", "video"]
"""What questions are answered with."""
_KEYS = ("id", "prompt", "image", "images", "video", "videos", "from")
_MAX_LINE_BYTES = 64 << 20
_PLACES = re.compile(r"\{(image|video)\}")


class PromptsError(ValueError):
    """A file of questions, or a line of it, that cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One question.

    Attributes:
        number: of the line, from 1.
        id: unlike for any two lines: the line's own, or its number.
        prompt: its text.
        images: files, in the order in which they are meant.
        videos: files.
        given: an image or video that a clip begins with; None: none.
        digest: of the line's content, so that a changed one is noticed.
    """

    number: int
    id: str
    prompt: str
    images: tuple[Path, ...]
    videos: tuple[Path, ...]
    given: Path | None
    digest: str


def read_prompts(path: Path) -> list[PromptLine]:
    """Read all lines, and look whether the media that they name are there.

    Args:
        path: UTF-8; an object a line: ``prompt``, and perhaps ``id``, ``image`` or ``images``,
            ``video`` or ``videos``, ``from`` (what a clip begins with). Files are relative to it.

    Raises:
        PromptsError: the file or a line cannot be used; names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptsError(f"{path}: {error.strerror}") from error
    found: dict[str, PromptLine] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = _parse(number, line, path.parent)
        except ValueError as error:
            raise PromptsError(f"{path} line {number}: {error}") from error
        if one.id in found:
            raise PromptsError(
                f"{path} line {number}: id {one.id!r} is that of line {found[one.id].number} too; "
                "an id names one line"
            )
        found[one.id] = one
    if not found:
        raise PromptsError(f'{path} holds no prompt; write an object a line: {{"prompt": "..."}}')
    return list(found.values())


def pieces_of(prompt: str) -> list[str]:
    """A prompt cut at its placeholders: text, ``image`` or ``video``, text, and so on."""
    return _PLACES.split(prompt)


def check_lines(lines: Iterable[PromptLine], to: Target, path: Path) -> None:
    """Refuse questions whose media cannot be used as they stand.

    Args:
        lines: of the file.
        to: what they are to be answered with.
        path: of the file, for messages.

    Raises:
        PromptsError: names the first such line.
    """
    for line in lines:
        if problem := _media_problem(line, to):
            raise PromptsError(f"{path} line {line.number}: {problem}")


def _media_problem(line: PromptLine, to: Target) -> str:
    if to != "text" and (line.images or line.videos):
        return "media are asked about in text; a video goes on `from` one"
    if to != "video" and line.given is not None:
        return "`from` is what a video begins with; `video` asks about one"
    places = pieces_of(line.prompt)[1::2]
    for kind, files in (("image", line.images), ("video", line.videos)):
        if places and places.count(kind) != len(files):
            return (
                f"the prompt has {places.count(kind)} places {{{kind}}} and there are "
                f"{len(files)} {kind}s; give one for each place"
            )
    return ""


def _parse(number: int, line: bytes, base: Path) -> PromptLine:
    if len(line) > _MAX_LINE_BYTES:
        raise ValueError(f"{len(line):,} bytes; the limit is {_MAX_LINE_BYTES:,}")
    try:
        given: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(given, dict):
        raise ValueError("not an object; write {" + '"prompt": "..."}')
    for key in given:
        if key not in _KEYS:
            hint = nearest(key, _KEYS)
            meant = f"; did you mean {hint!r}?" if hint else ""
            raise ValueError(f"unknown key {key!r}{meant} (known: {', '.join(_KEYS)})")
    prompt, name = given.get("prompt", ""), given.get("id", number)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt is {type(prompt).__name__}, not text")
    if not isinstance(name, str | int) or isinstance(name, bool) or str(name) == "":
        raise ValueError(f"id={name!r}; it is a text or a whole number")
    images, videos = _files(given, "image", base), _files(given, "video", base)
    begins = _files({"from": given["from"]} if "from" in given else {}, "from", base)
    if not (prompt.strip() or images or videos or begins):
        raise ValueError("it asks nothing; give prompt, image or video")
    content = json.dumps(given, sort_keys=True).encode()
    return PromptLine(
        number=number,
        id=str(name),
        prompt=prompt,
        images=images,
        videos=videos,
        given=begins[0] if begins else None,
        digest=hashlib.sha256(content).hexdigest()[:16],
    )


def _files(given: Mapping[str, Any], key: str, base: Path) -> tuple[Path, ...]:
    values = given.get(f"{key}s", []) if key != "from" else []
    one = given.get(key)
    names = [*values, *([] if one is None else [one])] if isinstance(values, list) else [values]
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"{key}={name!r} is no file name")
        if not (base / name).is_file():
            raise ValueError(f"{key} {name!r}: there is no such file in {base}")
    return tuple(base / name for name in names)
