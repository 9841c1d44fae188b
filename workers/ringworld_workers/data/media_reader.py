"""Images and videos with the captions of a table: an example a row and layout."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringworld_jobs.problem import nearest
from ringworld_jobs.recipe import MediaTextDataset
from ringworld_model.tokens import Layout
from ringworld_workers.data.caption_tables import Row, table_items, table_rows
from ringworld_workers.data.chat_template import IMAGE_PROMPT, VIDEO_PROMPT, ChatTemplate, Turn
from ringworld_workers.data.clip_reader import captioned
from ringworld_workers.data.draft import Draft, Part, Refused, WorkItem
from ringworld_workers.data.files import DataError, InputFile, matches
from ringworld_workers.data.held_out import drawn_held_out, named_held_out
from ringworld_workers.data.media_store import MediaStore, MediaUse, Sampling, media_digest

DESCRIBE_IMAGE = "Describe the image."
DESCRIBE_VIDEO = "Describe the video."
"""What the chat template asks about a medium whose caption is the answer."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
REPEATED = "rows that repeat an earlier one"
"""Why a row is left out whose file, stretch and caption stand in an earlier row of its table."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A sound row.

    Attributes:
        name: the table and its line.
        line: the line.
        file: the image or video.
        caption: what is to be seen.
        sampling: which frames.
        content: what makes the row one of its own: file, caption and stretch, as JSON.
    """

    name: str
    line: int
    file: InputFile
    caption: str
    sampling: Sampling
    content: str


class MediaReader:
    """The rows of one media_text dataset's caption tables, in parts."""

    def __init__(
        self,
        name: str,
        dataset: MediaTextDataset,
        base: Path,
        media: MediaStore,
        template: ChatTemplate | None = None,
        seed: int = 0,
    ) -> None:
        """Remember what to read; nothing is read yet.

        Args:
            name: of the dataset.
            dataset: its tables, and how their rows are spelled.
            base: folder of the recipe.
            media: where the codes come from.
            template: how a request and its answer are spelled, with ``template: chat``; None: as
                LWM does.
            seed: of the recipe, which draws the held-out share.
        """
        self._name, self._dataset, self._base = name, dataset, base
        self._media, self._seed = media, seed
        self._template = template or ChatTemplate()
        self._repeats: dict[str, frozenset[int]] = {}

    def items(self) -> Sequence[WorkItem]:
        """The tables by label, in parts of some rows. Reads the tables.

        Raises:
            DataError: a pattern of captions matches no table, one of held_out no row's file, or
                media_root's package is not installed.
        """
        _ = self._root
        if self._dataset.held_out:
            named_held_out(self._name, self._dataset.held_out, self._files())
        return table_items(self._name, self._tables)

    def training_texts(self, item: WorkItem) -> Iterator[str]:
        """Captions of the media that are not held out."""
        for entry in self._entries(item):
            if isinstance(entry, _Entry) and not self._certainly_held_out(entry.file):
                yield entry.caption

    def media(self, item: WorkItem) -> Iterator[MediaUse]:
        """The media of the item's rows."""
        for entry in self._entries(item):
            if isinstance(entry, _Entry):
                try:
                    document = media_digest(entry.file)
                except DataError:
                    continue
                held_out = self._held_out(entry.file)
                yield MediaUse(entry.file, entry.sampling, document, held_out)

    def drafts(self, item: WorkItem) -> Iterator[Draft | Refused]:
        """Each row in every layout, or in the one drawn for it."""
        for entry in self._entries(item):
            if isinstance(entry, Refused):
                yield entry
                continue
            try:
                document = media_digest(entry.file)
                codes = self._media.codes(entry.file, entry.sampling).codes
            except DataError as error:
                yield Refused(entry.name, f"{entry.file.label}: {error}")
                continue
            for layout in self._layouts(entry):
                name = f"{entry.name}, {entry.file.label}, {layout}"
                parts = self._parts(entry.caption, codes, layout)
                yield Draft(name, document, parts, self._held_out(entry.file))

    def _layouts(self, entry: _Entry) -> Sequence[Layout]:
        layouts = self._dataset.layouts
        if self._dataset.choose == "all":
            return layouts
        digest = hashlib.sha256(entry.content.encode()).digest()
        return (layouts[int.from_bytes(digest[:8]) % len(layouts)],)

    def _parts(
        self, caption: str, codes: npt.NDArray[np.int32], layout: Layout
    ) -> tuple[Part, ...]:
        if self._dataset.template == "plain":
            return captioned(caption, codes, layout)
        # A clip of one frame is an image, whatever file it comes from.
        image = len(codes) == 1
        if layout == "text,vision":
            request = (IMAGE_PROMPT if image else VIDEO_PROMPT).format(caption)
            return self._template.parts([Turn("user", (request,)), Turn("assistant", (codes,))])
        request = DESCRIBE_IMAGE if image else DESCRIBE_VIDEO
        return self._template.parts([Turn("user", (request, codes)), Turn("assistant", (caption,))])

    def _entries(self, item: WorkItem) -> Iterator[_Entry | Refused]:
        """The item's rows, each refused by itself."""
        repeated = self._repeated(item.file)
        for row in table_rows(item):
            entry = self._entry(item.file, row)
            if isinstance(entry, _Entry):
                if entry.line in repeated:
                    yield Refused(entry.name, REPEATED, unusable=False)
                    continue
            yield entry

    def _repeated(self, table: InputFile) -> frozenset[int]:
        """Lines of a table that repeat an earlier one; read once a process."""
        if not self._dataset.deduplicate:
            return frozenset()
        if table.label not in self._repeats:
            seen: set[bytes] = set()
            lines: set[int] = set()
            for row in table_rows(WorkItem(self._name, 0, table)):
                entry = self._entry(table, row)
                if isinstance(entry, _Entry):
                    digest = hashlib.sha256(entry.content.encode()).digest()[:16]
                    if digest in seen:
                        lines.add(entry.line)
                    seen.add(digest)
            self._repeats[table.label] = frozenset(lines)
        return self._repeats[table.label]

    def _entry(self, table: InputFile, row: Row | Refused) -> _Entry | Refused:
        if isinstance(row, Refused):
            return row
        name = f"{table.label} line {row.line}"
        try:
            path = _text(row.values, self._dataset.path_field, "path_field")
            caption = _text(row.values, self._dataset.text_field, "text_field")
            start, end = _seconds(row.values, "start"), _seconds(row.values, "end")
            if end is not None and end <= (start or 0.0):
                raise ValueError(f"end {end:g} is not after start {start or 0.0:g}")
            file = self._file(table, path)
        except ValueError as error:
            return Refused(name, str(error))
        dataset = self._dataset
        sampling = Sampling(dataset.fps, dataset.max_frames, start or 0.0, end)
        content = json.dumps([path, caption, sampling.start, end])
        return _Entry(name, row.line, file, caption, sampling, content)

    def _file(self, table: InputFile, path: str) -> InputFile:
        if _URL.match(path):
            raise ValueError(f"{path!r} is a URL; download the media and name the files")
        if "\0" in path:
            raise ValueError(f"{path!r} is no file name")
        if Path(path).is_absolute():
            return InputFile(Path(path), path)
        folder, prefix = self._root if self._root is not None else (None, "")
        if folder is None:
            folder, prefix = table.path.parent, table.label.rpartition("/")[0]
        label = Path(path).as_posix()
        return InputFile(folder / path, f"{prefix}/{label}" if prefix else label)

    @cached_property
    def _root(self) -> tuple[Path, str] | None:
        """media_root and its label; None: each table's own folder."""
        root = self._dataset.media_root
        if not root:
            return None
        found = [f for f in self._matching("media_root", root) if f.path.is_dir()]
        if len(found) != 1:
            raise DataError(f"datasets.{self._name}.media_root: {root!r} is no folder; correct it")
        return found[0].path, found[0].label

    @cached_property
    def _tables(self) -> list[InputFile]:
        found: dict[str, InputFile] = {}
        for pattern in self._dataset.captions:
            files = [f for f in self._matching("captions", pattern) if f.path.is_file()]
            if not files:
                raise DataError(
                    f"datasets.{self._name}.captions: {pattern!r} matches no file; correct the "
                    f"path or pattern"
                )
            found |= {file.label: file for file in files}
        return [found[label] for label in sorted(found)]

    def _matching(self, field: str, pattern: str) -> list[InputFile]:
        try:
            return matches(pattern, self._base)[1]
        except DataError as error:
            raise DataError(f"datasets.{self._name}.{field}: {error}") from error

    def _files(self) -> Iterator[InputFile]:
        for table in self._tables:
            for row in table_rows(WorkItem(self._name, 0, table)):
                entry = self._entry(table, row)
                if isinstance(entry, _Entry):
                    yield entry.file

    def _held_out(self, file: InputFile) -> bool | None:
        if not self._dataset.held_out:
            return None
        if self._named(file):
            return True
        try:
            return True if media_digest(file) in self._apart else None
        except DataError:
            return None

    def _named(self, file: InputFile) -> bool:
        return any(fnmatchcase(file.path.name, p) for p in self._dataset.held_out)

    @cached_property
    def _apart(self) -> frozenset[str]:
        """Digests of the media that are held out by name: copies under other names are too."""
        digests = set()
        for file in dict.fromkeys(filter(self._named, self._files())):
            with suppress(DataError):
                digests.add(media_digest(file))
        return frozenset(digests)

    def _certainly_held_out(self, file: InputFile) -> bool:
        share = self._dataset.held_out_share
        if self._held_out(file) or share <= 0:
            return bool(self._held_out(file))
        try:
            return drawn_held_out(media_digest(file), share, self._seed)
        except DataError:
            return True


def _text(values: Mapping[str, Any], key: str, field: str) -> str:
    """A row's text of a key.

    Raises:
        ValueError: it has none.
    """
    if key not in values:
        hint = nearest(key, list(values))
        meant = f"did you mean {hint!r}? " if hint else ""
        keys = ", ".join(list(values)[:8]) or "none"
        raise ValueError(f"no {key!r} (there is: {keys}); {meant}correct {field} or the table")
    value = values[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key!r} holds half a surrogate pair (character {error.start})") from None
    return value.strip()


def _seconds(values: Mapping[str, Any], key: str) -> float | None:
    """A row's seconds of a key; None: it says nothing.

    Raises:
        ValueError: it is no number of seconds.
    """
    value = values.get(key)
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{key} is {value!r}; it is a number of seconds, 0 or more")
    return seconds
