"""Clips as drafts: splits, captions, and what is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ringworld_jobs.recipe import VideoSpec, VideoTextDataset
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_workers.data.clip_reader import TOO_SHORT, WITHOUT_CAPTION, ClipReader
from ringworld_workers.data.draft import Draft, Refused, SpecialPart, TextPart, VisionPart
from ringworld_workers.data.files import DataError
from ringworld_workers.data.media_store import MediaStore

Reader = Callable[..., ClipReader]


@pytest.fixture
def make_reader(tmp_path: Path, write_video: Callable[..., Path]) -> Reader:
    """A reader of two seconds of grey film."""
    write_video(tmp_path / "film.mkv", [(12 * k,) * 3 for k in range(20)])
    codebook = PatchCodebook(np.linspace(0, 1, 16 * 48, dtype=np.float32).reshape(16, 48), 8, 4)
    codebook.save(tmp_path / "codebook.npz")
    media = MediaStore(tmp_path / "media", 8, tmp_path / "codebook.npz", codebook.digest())

    def make(video: dict[str, object] | None = None, **changes: object) -> ClipReader:
        film = {
            "path": "film.mkv",
            "captions": [
                {"start": 0, "end": 1, "text": "dark"},
                {"start": 1, "end": 2, "text": "light"},
            ],
        } | (video or {})
        dataset = {
            "kind": "video_text",
            "videos": ["film"],
            "fps": 10,
            "frames_per_clip": 5,
            "layouts": ["text,vision"],
        } | changes
        return ClipReader(
            "clips",
            VideoTextDataset.model_validate(dataset),
            {"film": VideoSpec.model_validate(film), "other": VideoSpec(path="none.mkv")},
            tmp_path,
            media,
        )

    return make


def drafts(reader: ClipReader) -> list[Draft | Refused]:
    return [draft for item in reader.items() for draft in reader.drafts(item)]


def test_a_clip_stands_between_bos_and_eos(make_reader: Reader) -> None:
    found = drafts(make_reader(layouts=["text,vision", "vision,text"]))
    assert [draft.name for draft in found[:3]] == [
        "film from 0.000 s, 5 frames, text,vision",
        "film from 0.000 s, 5 frames, vision,text",
        "film from 0.500 s, 5 frames, text,vision",
    ]
    kinds = []
    for draft in found[4:6]:
        assert isinstance(draft, Draft)
        assert draft.held_out is None
        assert all(part.loss for part in draft.parts)
        kinds.append([getattr(p, "text", getattr(p, "token", "codes")) for p in draft.parts])
    assert kinds == [
        ["bos", "light", "<vision>", "codes", "</vision>", "eos"],
        ["bos", "<vision>", "codes", "</vision>", "light", "eos"],
    ]
    assert len({draft.document for draft in found if isinstance(draft, Draft)}) == 1
    clip = next(p for p in found[0].parts if isinstance(p, VisionPart))  # type: ignore[union-attr]
    assert clip.codes.shape == (5, 4)
    types = {type(part) for part in found[0].parts}  # type: ignore[union-attr]
    assert types == {SpecialPart, TextPart, VisionPart}


def test_stretches_and_patterns_hold_out(make_reader: Reader) -> None:
    reader = make_reader({"held_out": [{"start": 1.0, "end": 2.0}]})
    assert [d.held_out for d in drafts(reader) if isinstance(d, Draft)] == [False] * 2 + [True] * 2
    assert list(reader.training_texts(reader.items()[0])) == ["dark"]
    (use,) = reader.media(reader.items()[0])
    assert (use.held_out, len(use.spans)) == (None, 1)
    # A pattern takes the whole video.
    reader = make_reader({"held_out": [{"start": 1.0, "end": 2.0}]}, held_out=["fil*"])
    assert {d.held_out for d in drafts(reader) if isinstance(d, Draft)} == {True}
    assert list(reader.training_texts(reader.items()[0])) == []
    (use,) = reader.media(reader.items()[0])
    assert use.held_out is True
    with pytest.raises(DataError, match=r"datasets\.clips\.held_out: 'tape' matches"):
        make_reader(held_out=["tape"]).items()


def test_what_is_left_out_is_counted(make_reader: Reader, tmp_path: Path) -> None:
    captions = [{"start": 0, "end": 0.5, "text": "dark"}, {"start": 2.5, "end": 3, "text": "late"}]
    found = drafts(make_reader({"captions": captions}))
    refused = [draft for draft in found if isinstance(draft, Refused)]
    assert len(found) - len(refused) == 1
    assert refused[0] == Refused(
        "film.mkv captions.1", "starts at 2.5 s, but the video's last frame is at 1.900 s"
    )
    assert [(r.reason, r.unusable) for r in refused[1:]] == [(WITHOUT_CAPTION, False)] * 3
    assert drafts(make_reader(frames_per_clip=21)) == [Refused("film.mkv", TOO_SHORT, False)]
    (tmp_path / "film.mkv").write_bytes(b"")
    assert drafts(make_reader()) == [Refused("film.mkv", "the file is empty")]
    with pytest.raises(DataError, match=r"videos\.other\.path: 'none\.mkv' matches no file"):
        make_reader(videos=["other"]).items()
