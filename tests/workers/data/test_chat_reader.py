"""Conversations of every form, with media, and everything that is none."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from ringworld_jobs.recipe_text import ChatDataset
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_workers.data import records
from ringworld_workers.data.chat_reader import ChatReader
from ringworld_workers.data.draft import Draft, Refused, SpecialPart, TextPart, VisionPart
from ringworld_workers.data.files import InputFile
from ringworld_workers.data.inputs import Inputs
from ringworld_workers.data.media_store import MediaStore

QUESTION, ANSWER = {"role": "user", "content": " Why? "}, {"role": "assistant", "content": "So."}


def reader_of(folder: Path, media: MediaStore | None = None, **changes: Any) -> ChatReader:
    spec = {"kind": "chat", "files": ["*.jsonl", "*.parquet"]} | changes
    if not list(folder.glob("*.parquet")):
        spec["files"] = ["*.jsonl"]
    reader = ChatReader("talk", ChatDataset.model_validate(spec), folder, media)
    return pickle.loads(pickle.dumps(reader))


def read(folder: Path, lines: list[Any], **changes: Any) -> list[Draft | Refused]:
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader = reader_of(folder, **changes)
    return [draft for item in reader.items() for draft in reader.drafts(item)]


def spoken(draft: Draft | Refused) -> list[tuple[str, bool]]:
    assert isinstance(draft, Draft), draft
    return [
        (p.spelled(False) if isinstance(p, TextPart) else f"<{p.token}>", p.loss)
        for p in draft.parts
        if not isinstance(p, VisionPart)
    ]


def test_messages_and_ultrachat_say_the_same(tmp_path: Path) -> None:
    talk = {"messages": [QUESTION, ANSWER]}
    messages, ultrachat, own = read(
        tmp_path,
        [
            talk | {"prompt": "Why?"},
            {"id": "0", "data": ["Why?", "So."]},
            {"messages": [{"role": "system", "content": "Be kind."}, QUESTION, ANSWER]},
        ],
    )
    assert spoken(messages) == [
        ("<bos>", False),
        ("You are a helpful assistant. USER: Why? ASSISTANT:", False),
        (" So.", True),
        ("<eos>", True),
    ]
    assert spoken(ultrachat) == spoken(messages)
    assert spoken(own)[1][0] == "Be kind. USER: Why? ASSISTANT:"
    assert [d.name for d in (messages, ultrachat, own)] == [f"a.jsonl line {n}" for n in (1, 2, 3)]
    reader = reader_of(tmp_path)
    assert list(reader.training_texts(reader.items()[0]))[:2] == ["Why?", "So."]
    assert not list(reader_of(tmp_path, held_out=["a*"]).training_texts(reader.items()[0]))


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    from_jsonl, _, from_parquet, refused = read(tmp_path, rows)
    assert spoken(from_jsonl) == spoken(from_parquet)
    assert isinstance(refused, Refused) and refused.name == "b.parquet row 2"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "hello"}, r"neither 'messages' .* \(its keys: text\)"),
        ({"messages": []}, "no message of role 'assistant'"),
        ({"messages": "hello"}, "'messages' is text, expected a list"),
        ({"messages": [QUESTION, QUESTION, ANSWER]}, "message 2 is of role 'user'"),
        ({"messages": [QUESTION, ANSWER, QUESTION]}, "message 3, the last, is a question without"),
        ({"messages": [ANSWER]}, "message 1 is of role 'assistant', expected 'user'"),
        ({"messages": [QUESTION, {"role": "asistant", "content": "a"}]}, "mean 'assistant'"),
        ({"messages": [QUESTION, {"content": "a"}]}, "message 2 is of role None"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, r"message 2 \(assistant\) holds null"),
        ({"messages": [QUESTION, ANSWER | {"content": 3}]}, "holds a number, expected text"),
        ({"messages": [QUESTION, ANSWER | {"content": " \n"}]}, r"message 2 .* is empty"),
        ({"messages": [QUESTION, ANSWER | {"content": []}]}, r"message 2 .* is empty"),
        ({"messages": [QUESTION, ANSWER | {"content": "\udc00"}]}, "half a surrogate pair"),
        ({"messages": [QUESTION, "So."]}, "message 2 is text, expected an object"),
        ({"messages": [QUESTION | {"content": ["Why?"]}, ANSWER]}, "part 1 is text, expected"),
        (
            {"messages": [QUESTION | {"content": [{"type": "audio"}]}, ANSWER]},
            "of type 'audio', expected text, image or video",
        ),
        (
            {"messages": [QUESTION | {"content": [{"type": "image", "path": "x.png"}]}, ANSWER]},
            "a medium needs a codebook; add `codebook:`",
        ),
        ({"data": ["Why?"]}, "no message of role 'assistant'"),
        ({"data": ["Why?", 3]}, r"data\[1\] holds a number"),
    ],
)
def test_what_is_no_conversation_is_refused_by_line(
    tmp_path: Path, record: Any, reason: str
) -> None:
    good = {"messages": [QUESTION, ANSWER]}
    first, bad, last = read(tmp_path, [good, record, good])
    assert isinstance(first, Draft) and isinstance(last, Draft)
    assert isinstance(bad, Refused) and bad.name == "a.jsonl line 2"
    assert re.search(reason, bad.reason), bad.reason


def test_the_line_after_one_that_is_too_long_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good: dict[str, Any] = {"data": ["Why?", "So."]}
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 40)
    for length in (38, 200):  # longer by its newline alone, and by more
        first, bad, last = read(tmp_path, [good, "x" * length, good])
        assert isinstance(bad, Refused) and "longer than the limit of 40 bytes" in bad.reason
        assert spoken(first) == spoken(last)


@pytest.fixture
def media(tmp_path: Path) -> MediaStore:
    codebook = PatchCodebook.fit(
        np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), np.uint8), 4, 4, 3, seed=0
    )
    codebook.save(tmp_path / "book")
    return MediaStore(tmp_path / "codes", 8, tmp_path / "book", codebook.digest())


def test_media_stand_where_lwm_puts_them(tmp_path: Path, media: MediaStore) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (20, 16), (200, 0, 0)).save(pictures / "red.png")
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "outside.png").write_bytes((pictures / "red.png").read_bytes())

    def ask(path: str) -> dict[str, Any]:
        content = [{"type": "text", "text": "What?"}, {"type": "image", "path": path}]
        return {"messages": [{"role": "user", "content": content}, ANSWER]}

    drafts = read(
        tmp_path,
        [ask(path) for path in ("red.png", "broken.png", "none.png", "../outside.png", "/etc/x")],
        media=media,
        media_root="pictures",
    )
    shown = drafts[0]
    assert isinstance(shown, Draft)
    assert shown.parts[0] == SpecialPart("bos", loss=False)
    assert [part.text for part in shown.parts if isinstance(part, TextPart)] == [
        "You are a helpful assistant. USER: What?\n",
        "<vision>",
        "</vision>",
        " ASSISTANT:",
        "So.",
    ]
    (clip,) = [part for part in shown.parts if isinstance(part, VisionPart)]
    assert clip.codes.shape == (1, 4) and not clip.loss
    reasons = [draft.reason for draft in drafts[1:] if isinstance(draft, Refused)]
    assert reasons[0].startswith("broken.png: ") and str(tmp_path) not in reasons[0]
    assert "'none.png' is no file in media_root" in reasons[1]
    assert all("lies outside media_root" in reason for reason in reasons[2:]) and len(reasons) == 4
    reader = reader_of(tmp_path, media, media_root="pictures")
    uses = list(reader.media(reader.items()[0]))
    assert [use.file.label for use in uses] == ["red.png", "broken.png"]
    assert uses[0].document == shown.document and uses[0].sampling.max_frames == 1
    # Another dataset's medium of the same name, in a folder of its own, is another file.
    other = replace(uses[0], file=InputFile(tmp_path / "red.png", "red.png"))
    files = Inputs({}, {"talk": uses, "other": [other]}, [], []).files()
    assert [file.label for file in files] == ["broken.png", "red.png", "red.png"]
