"""Text of every format: the same documents, in parts of any size, and what cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ringworld_jobs.recipe import TextDataset
from ringworld_workers.data import text_sources
from ringworld_workers.data.draft import Draft, Refused, TextPart, WorkItem
from ringworld_workers.data.files import DataError, InputFile
from ringworld_workers.data.text_reader import TextReader
from ringworld_workers.data.text_sources import (
    MAX_DOCUMENT_BYTES,
    Document,
    documents,
    format_of,
    parts,
)

TEXTS = [f"Document {n} says é{'!' * (7 * n % 41)} and\nends." for n in range(60)]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in TEXTS))


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.table({"text": TEXTS, "n": [1] * 60}), path, row_group_size=7)


def write_hf(folder: Path) -> None:
    """As save_to_disk does: Arrow streams, and a state that names them in order."""
    folder.mkdir(parents=True)
    names = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    for name, texts in zip(names, (TEXTS[:25], TEXTS[25:]), strict=True):
        table = pa.table({"text": texts})
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=6)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def read(tmp_path: Path, **fields: object) -> list[Draft | Refused]:
    reader = TextReader("texts", TextDataset(kind="text", **fields), tmp_path)
    return [draft for item in reader.items() for draft in reader.drafts(item)]


def texts_of(drafts: list[Draft | Refused]) -> list[str]:
    assert all(isinstance(draft, Draft) for draft in drafts), drafts
    return [p.text for d in drafts if isinstance(d, Draft) for p in d.parts if _is_text(p)]


def _is_text(part: object) -> bool:
    return isinstance(part, TextPart)


def test_every_format_gives_the_documents_of_txt(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02}.txt").write_text(text)
    write_jsonl(tmp_path / "all.jsonl")
    write_parquet(tmp_path / "all.parquet")
    write_hf(tmp_path / "set" / "train")
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    expected = read(tmp_path, files=["*.txt"])
    assert texts_of(expected) == TEXTS
    for pattern in ("all.jsonl", "all.parquet", "set", "set/train"):
        found = read(tmp_path, files=[pattern])
        assert texts_of(found) == TEXTS, pattern
        # The same documents, so that a held-out share falls on the same ones.
        assert [d.document for d in found] == [d.document for d in expected]
    assert read(tmp_path, files=["all.jsonl"])[41].name == "all.jsonl line 42"
    assert read(tmp_path, files=["all.parquet"])[41].name == "all.parquet row 42"
    names = [draft.name for draft in read(tmp_path, files=["set"], format="hf")]
    assert names[24:26] == [
        "set/train/data-00000-of-00002.arrow row 25",
        "set/train/data-00001-of-00002.arrow row 1",
    ]


@pytest.mark.parametrize("name", ["all.jsonl", "all.parquet", "set/data-00001-of-00002.arrow"])
@pytest.mark.parametrize("part_bytes", [1, 64, 300, 1000])
def test_parts_of_any_size_hold_each_document_once(
    tmp_path: Path, name: str, part_bytes: int
) -> None:
    write_jsonl(tmp_path / "all.jsonl")
    write_parquet(tmp_path / "all.parquet")
    write_hf(tmp_path / "set")
    file = InputFile(tmp_path / name, name)
    kind = format_of(file)
    (whole,) = parts(file, kind)
    cut = parts(file, kind, part_bytes)
    assert len(cut) > 1

    def found(chosen: object) -> list[Document | Refused]:
        return [
            document
            for n, p in enumerate(chosen)  # type: ignore[arg-type, var-annotated]
            for document in documents(
                WorkItem("texts", n, file, p.start, p.stop, p.first), kind, "text"
            )
        ]

    # Names too: lines and rows are counted from the file's first.
    assert found(cut) == found([whole])
    assert len(found([whole])) in (60, 35)


def test_the_line_after_one_that_is_too_long_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sources, "MAX_DOCUMENT_BYTES", 40)
    # Longer by its newline alone, and by more.
    for length in (40, 41, 200):
        lines = [b'{"text": "one"}', b"x" * length, b'{"text": "three"}']
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
        first, refused, last = read(tmp_path, files=["a.jsonl"])
        assert isinstance(refused, Refused) and refused.name == "a.jsonl line 2"
        assert texts_of([first, last]) == ["one", "three"] and last.name == "a.jsonl line 3"


def no_text(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")


def broken_parquet(path: Path) -> None:
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])


def broken_arrow(path: Path) -> None:
    write_hf(path.parent / "whole")
    path.write_bytes((path.parent / "whole" / "data-00000-of-00002.arrow").read_bytes()[:700])


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)


@pytest.mark.parametrize(
    ("name", "content", "refused"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b"fine \xff\xfe not", "a.txt: not UTF-8 text (byte 5)"),
        ("a.txt", no_text, "a.txt: holds NUL bytes"),
        ("a.txt", huge, "a.txt: a document of 67,108,865 bytes; the limit is 67,108,864"),
        ("a.txt", broken_parquet, "a.txt: holds NUL bytes"),
        ("a.txt", b" \n\t\r\n", "a.txt: the file holds nothing but white space"),
        ("a.txt", "text".encode("utf-16"), "a.txt: UTF-16 text, expected UTF-8"),
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: every line of the file is blank"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "a.jsonl line 1: not JSON that can be read"),
        ("a.jsonl", no_text, "a.jsonl: holds NUL bytes"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', "a.jsonl line 2: not JSON"),
        ("a.jsonl", b'\n{"text": "\xff"}', "a.jsonl line 2: not UTF-8 text (byte 10 of the line)"),
        ("a.jsonl", b'["x"]', "a.jsonl line 1: holds a list, expected an object"),
        ("a.jsonl", b'{"txt": "x"}', "a.jsonl line 1: no key 'text' (its keys: txt)"),
        ("a.jsonl", b'{"text": 5}', "a.jsonl line 1: 'text' holds a number, expected text"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl line 1: 'text' holds half of a surrogate"),
        ("a.jsonl", b"[" * 99_999, "a.jsonl line 1: not JSON"),
        ("a.parquet", b"", "a.parquet: not readable as parquet"),
        ("a.parquet", b'{"text": "x"}', "a.parquet: not readable as parquet"),
        ("a.parquet", broken_parquet, "a.parquet: not readable as parquet"),
        ("a.arrow", b"ARROW1", "a.arrow: not readable as Arrow"),
        ("a.arrow", broken_arrow, "a.arrow from row 7: not readable as Arrow"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, name: str, content: bytes | Callable[[Path], None], refused: str
) -> None:
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    found = [d for d in read(tmp_path, files=[name]) if isinstance(d, Refused)]
    assert [f"{d.name}: {d.reason}"[: len(refused)] for d in found] == [refused]
    assert all(str(tmp_path) not in d.reason for d in found)


def test_rows_without_text_are_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "a.parquet")
    found = read(tmp_path, files=["a.parquet"])
    assert found[1] == Refused("a.parquet row 2", "'text' holds null, expected text")
    assert [type(draft) for draft in found] == [Draft, Refused, Draft]
    (missing,) = read(tmp_path, files=["a.parquet"], text_field="body")
    assert missing.name == "a.parquet"
    assert "no column 'body' (its columns: text)" in missing.reason  # type: ignore[union-attr]


def test_line_ends_and_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one\\ntwo\\n"}\r\n\r\n')
    assert texts_of(read(tmp_path, files=["a.txt", "b.jsonl"])) == ["one\ntwo\n"] * 2


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (None, "holds no state.json"),
        ("{", "not JSON"),
        ('{"_data_files": []}', "names no data"),
        ('{"_data_files": [{"filename": "data.arrow"}]}', "not there; copy all files"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "not inside the folder"),
        ('{"_indices_data_files": [{"filename": "i"}]}', "call flatten_indices"),
    ],
)
def test_a_set_that_is_not_whole_is_an_error(tmp_path: Path, state: str | None, says: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "x.arrow").touch()
    if state is not None:
        (tmp_path / "set" / "state.json").write_text(state)
    with pytest.raises(DataError, match=rf"datasets\.texts\.files: set.*{says}"):
        read(tmp_path, files=["set"], format="hf")


def test_the_split_of_a_set_can_be_held_out(tmp_path: Path) -> None:
    for split in ("test", "train"):
        write_hf(tmp_path / "set" / split)
    splits = json.dumps({"splits": ["test", "train"]})
    (tmp_path / "set" / "dataset_dict.json").write_text(splits)
    found = read(tmp_path, files=["set"], held_out=["test"])
    assert [d.held_out for d in found] == [True] * 60 + [None] * 60  # type: ignore[union-attr]
