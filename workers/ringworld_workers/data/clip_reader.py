"""Clips of a recipe's videos with the captions that stand in the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringworld_jobs.recipe import VideoSpec, VideoTextDataset
from ringworld_model.tokens import Layout
from ringworld_workers.data.chat_template import clip_parts
from ringworld_workers.data.clips import Timeline, cut_clips
from ringworld_workers.data.draft import Draft, Part, Refused, SpecialPart, TextPart, WorkItem
from ringworld_workers.data.files import DataError, InputFile, resolve
from ringworld_workers.data.held_out import drawn_held_out, named_held_out
from ringworld_workers.data.media_store import EncodedMedia, MediaStore, MediaUse, media_digest
from ringworld_workers.data.sampling import Sampling

WITHOUT_CAPTION = "clips without caption"
"""Why a clip is left out that no caption of the recipe covers."""
TOO_SHORT = "videos without frames_per_clip frames in a row"
"""Why a video gives no clip: it is too short, or its held-out stretches leave no room."""


class ClipReader:
    """The clips of one video_text dataset: an item a video, an example a clip and layout."""

    def __init__(
        self,
        name: str,
        dataset: VideoTextDataset,
        videos: Mapping[str, VideoSpec],
        base: Path,
        media: MediaStore,
        seed: int = 0,
    ) -> None:
        """Remember what to read; nothing is read yet.

        Args:
            name: of the dataset.
            dataset: its videos, and how they are cut.
            videos: the recipe's, by name.
            base: folder of the recipe.
            media: where the codes come from.
            seed: of the recipe, which draws the held-out share.
        """
        self._name, self._dataset, self._base = name, dataset, base
        self._videos = {video: videos[video] for video in dataset.videos}
        self._media, self._seed = media, seed

    def items(self) -> Sequence[WorkItem]:
        """One a video, in the recipe's order.

        Raises:
            DataError: a video's path matches no file or several, or a held_out pattern none.
        """
        _ = self._named
        return [WorkItem(self._name, i, file) for i, file in enumerate(self._files)]

    def training_texts(self, item: WorkItem) -> Iterator[str]:
        """Captions of the item's video that are not held out whole."""
        video = self._video(item)
        if self._held_out(item.file) or self._drawn(item):
            return
        for caption in video.captions:
            if not any(s.start <= caption.start and caption.end <= s.end for s in video.held_out):
                yield caption.text

    def media(self, item: WorkItem) -> Iterator[MediaUse]:
        """The item's video."""
        video = self._video(item)
        held_out = self._held_out(item.file)
        try:
            document = media_digest(item.file)
        except DataError:
            return
        yield MediaUse(item.file, self._sampling(item), document, held_out, tuple(video.held_out))

    def drafts(self, item: WorkItem) -> Iterator[Draft | Refused]:
        """The video's clips in order of time, each in every layout."""
        video, dataset = self._video(item), self._dataset
        try:
            document = media_digest(item.file)
            encoded = self._media.codes(item.file, self._sampling(item))
        except DataError as error:
            yield Refused(item.file.label, str(error))
            return
        yield from _beyond_the_end(item.file.label, video, encoded)
        clips = cut_clips(
            Timeline(encoded.shown, dataset.fps),
            length=dataset.frames_per_clip,
            stride=dataset.stride_frames or dataset.frames_per_clip,
            held_out=video.held_out,
            captions=video.captions,
        )
        if not clips:
            yield Refused(item.file.label, TOO_SHORT, unusable=False)
        whole = self._held_out(item.file)
        for clip in clips:
            start = clip.start / dataset.fps
            title = f"{self._title(item)} from {start:.3f} s, {clip.length} frames"
            if clip.caption is None:
                yield Refused(title, WITHOUT_CAPTION, unusable=False)
                continue
            # A video with held-out stretches has chosen; of the others the share may take some.
            held_out = clip.held_out if whole is None and video.held_out else whole
            codes = encoded.codes[clip.start : clip.start + clip.length]
            for layout in dataset.layouts:
                parts = captioned(clip.caption, codes, layout)
                yield Draft(f"{title}, {layout}", document, parts, held_out)

    @cached_property
    def _files(self) -> list[InputFile]:
        found = []
        for name, video in self._videos.items():
            where = f"videos.{name}.path"
            try:
                files = resolve(video.path, self._base)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            if len(files) > 1:
                raise DataError(f"{where}: {video.path!r} matches {len(files)} files; name one")
            found += files
        return found

    @cached_property
    def _named(self) -> frozenset[str]:
        return named_held_out(self._name, self._dataset.held_out, self._files)

    def _held_out(self, file: InputFile) -> bool | None:
        return True if file.label in self._named else None

    def _drawn(self, item: WorkItem) -> bool:
        share = self._dataset.held_out_share
        if share <= 0 or self._video(item).held_out:
            return False
        try:
            return drawn_held_out(media_digest(item.file), share, self._seed)
        except DataError:
            return False

    def _title(self, item: WorkItem) -> str:
        return list(self._videos)[item.number]

    def _video(self, item: WorkItem) -> VideoSpec:
        return self._videos[self._title(item)]

    def _sampling(self, item: WorkItem) -> Sampling:
        return Sampling(self._dataset.fps, crop=self._video(item).crop)


def captioned(caption: str, codes: npt.NDArray[np.int32], layout: Layout) -> tuple[Part, ...]:
    """A captioned clip as LWM lays it out, between bos and eos; all but the first token has loss.

    Args:
        caption: what is to be seen.
        codes: [F, C] int32.
        layout: ``text,vision`` or ``vision,text``.
    """
    text, clip = (TextPart(caption),), clip_parts(codes, loss=True)
    middle = (*text, *clip) if layout == "text,vision" else (*clip, *text)
    return (SpecialPart("bos"), *middle, SpecialPart("eos"))


def _beyond_the_end(label: str, video: VideoSpec, encoded: EncodedMedia) -> Iterator[Refused]:
    """Captions and held-out stretches of which the video has nothing."""
    # The picture that was shown last may stay as long as it likes; nothing was sampled after it.
    last = float(encoded.times[-1])
    for entry, spans in (("captions", video.captions), ("held_out", video.held_out)):
        for number, span in enumerate(spans):
            if span.start > last:
                yield Refused(
                    f"{label} {entry}.{number}",
                    f"starts at {span.start:g} s, but the video's last frame is at {last:.3f} s",
                )
