"""Conversations as examples: messages with images and videos, and UltraChat's lists of turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringworld_jobs.problem import nearest
from ringworld_jobs.recipe_text import ChatDataset
from ringworld_workers.data.chat_template import ChatTemplate, Content, Role, Turn
from ringworld_workers.data.draft import Draft, Refused, WorkItem
from ringworld_workers.data.files import DataError, InputFile
from ringworld_workers.data.json_lines import kind
from ringworld_workers.data.media_store import MediaStore, MediaUse, Sampling
from ringworld_workers.data.records import Record, RecordFiles, records, require_text

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class _Medium:
    """An image or video that a message names."""

    file: InputFile
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class _Message:
    """A turn whose media are not read yet."""

    role: Role
    content: tuple[str | _Medium, ...]


class ChatReader:
    """The conversations of one dataset, each an example."""

    def __init__(
        self,
        name: str,
        dataset: ChatDataset,
        base: Path,
        media: MediaStore | None,
        seed: int = 0,
    ) -> None:
        """Remember what to read; nothing is read yet.

        Args:
            name: of the dataset.
            dataset: its files, their form and the template.
            base: folder of the recipe.
            media: codes of images and videos; None: the recipe has no codebook.
            seed: of the recipe, which draws the held-out share.
        """
        self._dataset, self._media = dataset, media
        self._root = base / dataset.media_root
        self._files = RecordFiles(name, dataset, dataset.files, base, seed)
        self._template = ChatTemplate(dataset.system, dataset.user_prefix, dataset.assistant_prefix)

    def items(self) -> Sequence[WorkItem]:
        """The files by label, large ones in parts.

        Raises:
            DataError: a pattern of files or held_out matches nothing.
        """
        return self._files.items()

    def training_texts(self, item: WorkItem) -> Iterator[str]:
        """What is said in the conversations that are not held out."""
        for found in self._conversations(item):
            if isinstance(found, Refused):
                continue
            record, messages = found
            if self._files.certainly_held_out(item.file, record.digest):
                continue
            for message in messages:
                yield from (piece for piece in message.content if isinstance(piece, str))

    def media(self, item: WorkItem) -> Iterator[MediaUse]:
        """The images and videos that the item's conversations name."""
        held_out = self._files.named_held_out(item.file)
        for found in self._conversations(item):
            if isinstance(found, Refused):
                continue
            record, messages = found
            for piece in (piece for message in messages for piece in message.content):
                if isinstance(piece, _Medium):
                    yield MediaUse(piece.file, piece.sampling, record.digest, held_out)

    def drafts(self, item: WorkItem) -> Iterator[Draft | Refused]:
        """The item's conversations; what is none, or names media that fail, is refused."""
        held_out = self._files.named_held_out(item.file)
        for found in self._conversations(item):
            if isinstance(found, Refused):
                yield found
                continue
            record, messages = found
            try:
                turns = [Turn(m.role, tuple(map(self._content, m.content))) for m in messages]
                parts = self._template.parts(turns)
            except ValueError as error:  # DataError is one
                yield Refused(record.name, str(error))
                continue
            yield Draft(record.name, record.digest, parts, held_out)

    def _conversations(self, item: WorkItem) -> Iterator[Refused | tuple[Record, list[_Message]]]:
        for record in records(item):
            if isinstance(record, Refused):
                yield record
                continue
            try:
                yield record, self._messages(record)
            except ValueError as error:
                yield Refused(record.name, str(error))

    def _messages(self, record: Record) -> list[_Message]:
        form, value = self._dataset.format, record.value
        if form == "messages" or (form == "auto" and value.get("messages") is not None):
            return [self._message(n, one) for n, one in enumerate(_list(value, "messages"), 1)]
        if form == "ultrachat" or value.get("data") is not None:
            said = [
                require_text(f"data[{n}]", one).strip()
                for n, one in enumerate(_list(value, "data"))
            ]
            roles: tuple[Role, Role] = ("user", "assistant")
            return [_Message(roles[n % 2], (text,)) for n, text in enumerate(said)]
        keys = ", ".join(list(value)[:8]) or "none"
        raise ValueError(
            f"neither 'messages' (role and content) nor 'data' (questions and answers) "
            f"(its keys: {keys})"
        )

    def _message(self, number: int, message: object) -> _Message:
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is {kind(message)}, expected an object")
        name = message.get("role")
        if not isinstance(name, str) or name not in _ROLES:
            hint = nearest(name, _ROLES) if isinstance(name, str) else ""
            raise ValueError(
                f"message {number} is of role {name!r}, expected one of {', '.join(_ROLES)}"
                + (f"; did you mean {hint!r}?" if hint else "")
            )
        content = message.get("content")
        where = f"message {number} ({name})"
        if isinstance(content, list):
            pieces = [self._piece(f"{where}, part {n}", p) for n, p in enumerate(content, 1)]
        else:
            pieces = [require_text(where, content).strip()]
        return _Message(_ROLES[name], tuple(pieces))

    def _piece(self, where: str, part: object) -> str | _Medium:
        if not isinstance(part, dict):
            raise ValueError(f"{where} is {kind(part)}, expected an object with a type")
        form = part.get("type")
        if form == "text":
            return require_text(where, part.get("text")).strip()
        if form not in ("image", "video"):
            raise ValueError(f"{where} is of type {form!r}, expected text, image or video")
        path = require_text(f"{where}, path", part.get("path"))
        if self._media is None:
            raise ValueError(f"{where}: a medium needs a codebook; add `codebook:` to the recipe")
        root = self._root.resolve()
        # A record may come from anywhere; it does not choose what else of the machine is read.
        if not path or "\0" in path or not (root / path).resolve().is_relative_to(root):
            raise ValueError(f"{where}: {path!r} lies outside media_root; give a path in it")
        if not (root / path).is_file():
            raise ValueError(f"{where}: {path!r} is no file in media_root; correct one of them")
        most = 1 if form == "image" else self._dataset.max_frames
        return _Medium(InputFile(root / path, path), Sampling(self._dataset.fps, most))

    def _content(self, piece: str | _Medium) -> Content:
        if isinstance(piece, str):
            return piece
        if self._media is None:  # _piece has refused it
            raise DataError(f"{piece.file.label}: a medium needs a codebook")
        try:
            return self._media.codes(piece.file, piece.sampling).codes
        except DataError as error:
            raise DataError(f"{piece.file.label}: {error}") from error


def _list(value: dict[str, object], key: str) -> list[object]:
    found = value.get(key)
    if not isinstance(found, list):
        raise ValueError(f"{key!r} is {kind(found)}, expected a list")
    return found
