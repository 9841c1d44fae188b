"""Caption tables: rows to drafts, layouts, the chat form, and rows that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ringworld_jobs.recipe import MediaTextDataset
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_workers.data.caption_tables import ROWS
from ringworld_workers.data.draft import Draft, Refused, TextPart, VisionPart
from ringworld_workers.data.files import DataError
from ringworld_workers.data.media_reader import REPEATED, MediaReader
from ringworld_workers.data.media_store import MediaStore

Reader = Callable[..., MediaReader]


@pytest.fixture
def make_reader(tmp_path: Path, write_video: Callable[..., Path]) -> Reader:
    """A reader of ``table.jsonl``, beside a film of two seconds and two photos."""
    write_video(tmp_path / "film.mkv", [(12 * k,) * 3 for k in range(20)])
    (tmp_path / "photos").mkdir()
    for name, level in (("dark.png", 0), ("light.jpg", 255)):
        Image.new("RGB", (16, 8), (level,) * 3).save(tmp_path / "photos" / name)
    levels = np.repeat(np.linspace(0, 1, 16, dtype=np.float32)[:, None], 48, axis=1)
    codebook = PatchCodebook(levels, 8, 4)
    codebook.save(tmp_path / "codebook.npz")
    media = MediaStore(tmp_path / "media", 8, tmp_path / "codebook.npz", codebook.digest())

    def make(rows: str | list[dict[str, object]], **changes: object) -> MediaReader:
        text = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
        name = "table.csv" if isinstance(rows, str) else "table.jsonl"
        (tmp_path / name).write_text(text, encoding="utf-8")
        dataset = {"kind": "media_text", "captions": [name], "layouts": ["text,vision"]} | changes
        return MediaReader("seen", MediaTextDataset.model_validate(dataset), tmp_path, media)

    return make


def drafts(reader: MediaReader) -> list[Draft | Refused]:
    return [draft for item in reader.items() for draft in reader.drafts(item)]


def refusals(reader: MediaReader) -> list[tuple[str, str]]:
    found = drafts(reader)
    assert all(isinstance(draft, Refused) and draft.unusable for draft in found), found
    return [(draft.name, draft.reason) for draft in found if isinstance(draft, Refused)]


def codes_of(draft: Draft | Refused) -> list[list[int]]:
    assert isinstance(draft, Draft)
    (clip,) = (part for part in draft.parts if isinstance(part, VisionPart))
    return clip.codes.tolist()


def spelled(draft: Draft | Refused) -> list[tuple[str, bool]]:
    """Text of each part, a clip as [frames], and whether it has loss."""
    assert isinstance(draft, Draft)
    found = []
    for part in draft.parts:
        if isinstance(part, VisionPart):
            found.append((f"[{len(part.codes)}]", part.loss))
        else:
            found.append((part.text if isinstance(part, TextPart) else part.token, part.loss))
    return found


ROWS_OF_BOTH: list[dict[str, object]] = [
    {"path": "photos/dark.png", "caption": "night", "author": "nobody"},
    {"path": "film.mkv", "caption": "it grows light", "start": 0.5, "end": 1.5},
    {"path": "film.mkv", "caption": "a film"},
]


def test_a_row_is_an_example_of_its_frames(make_reader: Reader) -> None:
    dark, part, film = found = drafts(make_reader(ROWS_OF_BOTH, max_frames=5))
    assert [draft.name for draft in found] == [
        "table.jsonl line 1, photos/dark.png, text,vision",
        "table.jsonl line 2, film.mkv, text,vision",
        "table.jsonl line 3, film.mkv, text,vision",
    ]
    assert codes_of(dark) == [[0] * 4]
    # At 4 frames a second: grey 60, 84, 120, 144 of 255.
    assert codes_of(part) == [[level] * 4 for level in (4, 5, 7, 8)]
    # 0 to 1.75 s are 8 frames, of which linspace takes 0, 1, 3, 5, 7.
    assert codes_of(film) == [[level] * 4 for level in (0, 1, 5, 8, 12)]
    assert spelled(dark) == [
        (text, True) for text in ("bos", "night", "<vision>", "[1]", "</vision>", "eos")
    ]
    # All examples of a file are one document, wherever they stand.
    assert part.document == film.document != dark.document  # type: ignore[union-attr]
    assert {draft.held_out for draft in found if isinstance(draft, Draft)} == {None}


def test_csv_is_read_like_jsonl(make_reader: Reader) -> None:
    table = (
        "\ufeffcaption,path,start,end\r\n"
        'night,photos/dark.png,,\r\n\r\n"it grows\nlight, slowly",film.mkv,0.5,1.5\r\n'
    )
    found = drafts(make_reader(table))
    assert [draft.name for draft in found] == [
        "table.csv line 2, photos/dark.png, text,vision",
        "table.csv line 4, film.mkv, text,vision",
    ]
    assert spelled(found[1])[1] == ("it grows\nlight, slowly", True)
    assert len(codes_of(found[1])) == 4


def test_chat_asks_and_only_answers_carry_loss(make_reader: Reader) -> None:
    reader = make_reader(ROWS_OF_BOTH[:2], template="chat", layouts=["text,vision", "vision,text"])
    paint, describe, film, tell = (spelled(draft) for draft in drafts(reader))
    system = "You are a helpful assistant. USER:"
    assert paint == [
        ("bos", False),
        (f"{system} Generate an image of night ASSISTANT:", False),
        ("<vision>", True),
        ("[1]", True),
        ("</vision>", True),
        ("eos", True),
    ]
    assert describe == [
        ("bos", False),
        (f"{system} Describe the image.\n", False),
        ("<vision>", False),
        ("[1]", False),
        ("</vision>", False),
        (" ASSISTANT:", False),
        ("night", True),
        ("eos", True),
    ]
    assert film[1][0] == f"{system} Generate a video of it grows light ASSISTANT:"
    assert tell[1][0] == f"{system} Describe the video.\n"


def test_one_layout_is_drawn_by_the_row_alone(make_reader: Reader) -> None:
    rows: list[dict[str, object]] = [
        {"path": "photos/dark.png", "caption": f"night {k}"} for k in range(40)
    ]
    layouts = ["text,vision", "vision,text"]
    drawn = [d.name.rsplit(", ", 1)[1] for d in drafts(make_reader(rows, layouts=layouts))][::2]
    assert drawn == ["text,vision"] * 40
    names = [d.name for d in drafts(make_reader(rows, layouts=layouts, choose="one"))]
    assert len(names) == 40
    first = sum(name.endswith("text,vision") for name in names)
    assert 10 < first < 30
    # A row keeps its layout wherever it stands.
    rows.reverse()
    other = [d.name for d in drafts(make_reader(rows, layouts=layouts, choose="one"))]
    assert [n[-11:] for n in other] == [n[-11:] for n in reversed(names)]


def test_held_out_goes_by_the_media_files_name(make_reader: Reader) -> None:
    reader = make_reader(ROWS_OF_BOTH, held_out=["film.*"])
    assert [d.held_out for d in drafts(reader) if isinstance(d, Draft)] == [None, True, True]
    (item,) = reader.items()
    assert list(reader.training_texts(item)) == ["night"]
    assert [use.held_out for use in reader.media(item)] == [None, True, True]
    with pytest.raises(DataError, match=r"datasets\.seen\.held_out: 'tape' matches"):
        make_reader(ROWS_OF_BOTH, held_out=["tape"]).items()
    shared = make_reader(ROWS_OF_BOTH, held_out_share=0.999999)
    assert list(shared.training_texts(item)) == []


def test_a_copy_of_a_held_out_medium_is_held_out_under_any_name(
    make_reader: Reader, tmp_path: Path
) -> None:
    (tmp_path / "again.mp4").write_bytes((tmp_path / "film.mkv").read_bytes())
    rows = [{"path": "again.mp4", "caption": "seen before"}, *ROWS_OF_BOTH]
    reader = make_reader(rows, held_out=["film.*"])
    assert [d.held_out for d in drafts(reader) if isinstance(d, Draft)] == [True, None, True, True]
    (item,) = reader.items()
    assert list(reader.training_texts(item)) == ["night"]


def test_paths_are_the_tables_or_media_roots(make_reader: Reader, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"path": "dark.png", "caption": "night"}]
    (found,) = drafts(make_reader(rows, media_root="photos"))
    assert found.name == "table.jsonl line 1, photos/dark.png, text,vision"
    assert refusals(make_reader(rows)) == [
        ("table.jsonl line 1", "dark.png: there is no such file")
    ]
    rows[0]["path"] = str(tmp_path / "photos" / "dark.png")
    assert isinstance(drafts(make_reader(rows, media_root="photos"))[0], Draft)
    with pytest.raises(DataError, match=r"datasets\.seen\.media_root: 'photo' is no folder"):
        make_reader(rows, media_root="photo").items()
    with pytest.raises(DataError, match=r"datasets\.seen\.captions: '\*\.tsv' matches no file"):
        make_reader(rows, captions=["*.tsv"]).items()


BAD_ROWS: list[tuple[dict[str, object], str]] = [
    ({"caption": "a"}, "no 'path' (there is: caption); correct path_field or the table"),
    ({"path": "film.mkv"}, "no 'caption' (there is: path); correct text_field or the table"),
    (
        {"path": "film.mkv", "captoin": "a"},
        "no 'caption' (there is: path, captoin); did you mean 'captoin'? correct text_field or the "
        "table",
    ),
    ({"path": "film.mkv", "caption": ""}, "'caption' is empty"),
    ({"path": "film.mkv", "caption": "\n "}, "'caption' is empty"),
    ({"path": "film.mkv", "caption": ["a"]}, "'caption' is list, not text"),
    ({"path": "film.mkv", "caption": "\ud800"}, "'caption' holds half a surrogate pair"),
    ({"path": 3, "caption": "a"}, "'path' is int, not text"),
    ({"path": "https://x.org/a.png", "caption": "a"}, "is a URL; download the media"),
    ({"path": "photos", "caption": "a"}, "photos: is no file"),
    ({"path": "film.mkv", "caption": "a", "start": -1}, "start is -1; it is a number of seconds"),
    ({"path": "film.mkv", "caption": "a", "end": "soon"}, "end is 'soon'; it is a number of"),
    ({"path": "film.mkv", "caption": "a", "end": True}, "end is True; it is a number of seconds"),
    ({"path": "film.mkv", "caption": "a", "end": float("nan")}, "end is nan; it is a number"),
    ({"path": "film.mkv", "caption": "a", "start": 1, "end": 1}, "end 1 is not after start 1"),
    (
        {"path": "film.mkv", "caption": "a", "start": 1, "end": 9},
        "film.mkv: the stretch ends at 9 s, but the video ends at 2.000 s",
    ),
    (
        {"path": "film.mkv", "caption": "a", "start": 7},
        "film.mkv: the stretch starts at 7 s, but the video ends at 2.000 s",
    ),
    (
        {"path": "photos/dark.png", "caption": "a", "end": 1},
        "photos/dark.png: a still image has no stretch; take start and end out",
    ),
]


def test_rows_that_cannot_be_used_are_refused_by_line(make_reader: Reader) -> None:
    rows = [row for row, _ in BAD_ROWS]
    found = refusals(make_reader(rows))
    assert [name for name, _ in found] == [f"table.jsonl line {k + 1}" for k in range(len(rows))]
    for (_, reason), (row, says) in zip(found, BAD_ROWS, strict=True):
        assert says in reason, row


def test_damaged_tables_are_refused_by_line(make_reader: Reader, tmp_path: Path) -> None:
    make_reader([])
    sound = b'{"path": "photos/dark.png", "caption": "night"}\n'
    long = b'{"path": "photos/dark.png", "caption": "' + b"n" * (1 << 20) + b'"}\n'
    lines = [sound, b"{broken\n", b"\n", b"[1]\n", b'{"caption": "\xff"}\n', long, b"null\n", sound]
    (tmp_path / "bad.jsonl").write_bytes(b"".join(lines))
    found = drafts(make_reader([], captions=["bad.jsonl"]))
    assert [(draft.name, getattr(draft, "reason", "")) for draft in found] == [
        ("bad.jsonl line 1, photos/dark.png, text,vision", ""),
        (
            "bad.jsonl line 2",
            "not JSON: Expecting property name enclosed in double quotes (column 2)",
        ),
        ("bad.jsonl line 4", "holds a JSON list, expected an object"),
        ("bad.jsonl line 5", "not UTF-8 text (byte 13 of the line)"),
        ("bad.jsonl line 6", "longer than the limit of 1,048,576 bytes"),
        ("bad.jsonl line 7", "holds a JSON NoneType, expected an object"),
        ("bad.jsonl line 8", REPEATED),
    ]
    again = drafts(make_reader([], captions=["bad.jsonl"], deduplicate=False))
    assert isinstance(again[-1], Draft)
    table = b'path,caption\na.png\nb.png,x,y\nc.png,\xff\n"d.png"d,x\ne.png,"open\nf.png,x\n'
    (tmp_path / "bad.csv").write_bytes(table)
    assert refusals(make_reader([], captions=["bad.csv"])) == [
        ("bad.csv line 2", "1 values for 2 columns; quote commas"),
        ("bad.csv line 3", "3 values for 2 columns; quote commas"),
        ("bad.csv line 4", "not UTF-8 text (byte 6 of the line)"),
        ("bad.csv line 5", "not CSV: ',' expected after '\"'"),
        ("bad.csv line 6 to 7", "not CSV: unexpected end of data"),
    ]
    for name, content, says in (
        ("a.csv", b"", "the table is empty"),
        ("b.jsonl", b"\x00\x01" * 99, "holds NUL bytes"),
        ("c.txt", sound, "captions are read from .jsonl and .csv tables"),
    ):
        (tmp_path / name).write_bytes(content)
        ((label, reason),) = refusals(make_reader([], captions=[name]))
        assert (label, says in reason) == (name, True)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_long_table_is_read_in_parts(make_reader: Reader, tmp_path: Path, kind: str) -> None:
    count = 2 * ROWS + 5
    captions = [f"night\n{k}" if k % 3 else f"night {k}" for k in range(count)]
    if kind == "csv":
        rows: str | list[dict[str, object]] = "path,caption\n" + "".join(
            f'photos/dark.png,"{caption}"\n\n' for caption in captions
        )
    else:
        rows = [{"path": "photos/dark.png", "caption": caption} for caption in captions]
    reader = make_reader(rows)
    items = reader.items()
    assert [item.number for item in items] == [0, 1, 2]
    parts = [[d for d in reader.drafts(item)] for item in items]
    assert [len(part) for part in parts] == [ROWS, ROWS, 5]
    found = [draft for part in parts for draft in part]
    assert [spelled(draft)[1][0] for draft in found] == captions
    # Lines are counted through the table.
    lines = [int(draft.name.split(" line ")[1].split(",")[0]) for draft in found]
    if kind == "jsonl":
        assert lines == list(range(1, count + 1))
    else:
        text = (tmp_path / "table.csv").read_text().splitlines()
        assert all(text[line - 1].startswith('photos/dark.png,"night') for line in lines)
        assert len(set(lines)) == count
