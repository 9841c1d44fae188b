"""LWM's JSONL, token by token by hand, and every way that a line can be wrong."""

from __future__ import annotations

import json
import pickle
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ringworld_jobs.recipe_text import LwmCodesSpec, LwmDataset
from ringworld_model.tokens import vision_tokens
from ringworld_workers.data.draft import Draft, Refused, SpecialPart, TextPart
from ringworld_workers.data.files import DataError
from ringworld_workers.data.lwm_reader import LwmReader, require_same_codebook
from ringworld_workers.data.media_store import CodeGeometry
from ringworld_workers.data.records import RecordFiles
from ringworld_workers.data.text_sources import parts
from ringworld_workers.data.tokenizer import JsonTokenizer

WORDS = ["<s>", "</s>", "?", "<vision>", "</vision>", "draw", "a", "ring", "red", "what", "so"]
BOS, EOS, _, START, END, DRAW, A, RING, RED, WHAT, SO = range(len(WORDS))
GEOMETRY = CodeGeometry(codebook_size=8, codes_per_frame=2)
EOF, EOV = 8, 9

Token = tuple[int, int, int]
"""Id, whether it is a vision id, loss."""


@cache
def tokenizer() -> JsonTokenizer:
    words = models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="?")
    splitter = Tokenizer(words)
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return JsonTokenizer(splitter, "<s>", "</s>")


def dataset(**changes: Any) -> LwmDataset:
    return LwmDataset.model_validate({"kind": "lwm", "files": ["*.jsonl"]} | changes)


def read(folder: Path, records: list[Any], **changes: Any) -> list[Draft | Refused]:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    geometry = changes.pop("geometry", GEOMETRY)
    reader = LwmReader("lwm", dataset(**changes), folder, geometry)
    reader = pickle.loads(pickle.dumps(reader))
    return [draft for item in reader.items() for draft in reader.drafts(item)]


def tokens(draft: Draft | Refused) -> list[Token]:
    """What a build makes of a draft."""
    assert isinstance(draft, Draft), draft
    found: list[Token] = []
    for part in draft.parts:
        if isinstance(part, TextPart):
            found += [(i, 0, int(part.loss)) for i in tokenizer().encode(part.spelled(False))]
        elif isinstance(part, SpecialPart):
            found.append((BOS if part.token == "bos" else EOS, 0, int(part.loss)))
        else:
            ids = vision_tokens(part.codes, GEOMETRY.codebook_size)
            found += [(int(i), 1, int(part.loss)) for i in ids]
    return found


def text(*ids: int, loss: int = 1) -> list[Token]:
    return [(i, 0, loss) for i in ids]


def vision(*ids: int, loss: int = 1) -> list[Token]:
    return [(START, 0, loss), *[(i, 1, loss) for i in ids], (END, 0, loss)]


EXAMPLE = {"prompt": "draw", "caption": "a red ring", "vision": [1, 2, 3, 4]}


def test_text_to_video_and_back(tmp_path: Path) -> None:
    there, back = read(
        tmp_path,
        [EXAMPLE | {"fields": "[prompt],vision"}, EXAMPLE | {"fields": "[vision],caption"}],
        fields_from_example="fields",
    )
    assert tokens(there) == [
        *text(BOS, loss=0),
        *text(DRAW, loss=0),
        *vision(1, 2, EOF, 3, 4, EOV),
        *text(EOS),
    ]
    assert tokens(back) == [
        *text(BOS, loss=0),
        *vision(1, 2, EOF, 3, 4, EOV, loss=0),
        *text(A, RED, RING),
        *text(EOS),
    ]


def test_joins_brackets_and_tokens(tmp_path: Path) -> None:
    (draft,) = read(
        tmp_path,
        [EXAMPLE],
        fields="[prompt+caption],<|eos|>,caption+prompt,[<|bos|>],[prompt]",
        prepend_text="so ",
    )
    assert tokens(draft) == [
        *text(BOS, loss=0),
        *text(SO, DRAW, A, RED, RING, loss=0),
        *text(EOS),
        *text(A, RED, RING, DRAW),
        *text(BOS, DRAW, loss=0),
        *text(EOS),
    ]
    (glued,) = read(tmp_path, [EXAMPLE], fields="prompt+prompt", subfield_separator="")
    assert isinstance(glued, Draft) and TextPart("drawdraw") in glued.parts
    (bare,) = read(tmp_path, [EXAMPLE], fields="[prompt]", add_bos_token=False, add_eos_token=False)
    assert tokens(bare) == text(DRAW, loss=0)
    # prepend_text goes before a first TEXT alone.
    (clip,) = read(tmp_path, [EXAMPLE], fields="vision,prompt", prepend_text="so ")
    assert SO not in [token for token, _, _ in tokens(clip)]


def test_frames_are_subsampled_as_lwm_does(tmp_path: Path) -> None:
    # linspace(0, 6, 4) = 0, 2, 4, 6; linspace(0, 6, 3) = 0, 3, 6; of 5 frames 0, 1.33, 2.67, 4.
    for frames, most, kept in ((7, 4, [0, 2, 4, 6]), (7, 3, [0, 3, 6]), (5, 4, [0, 1, 2, 4])):
        codes = [code for frame in range(frames) for code in (frame, frame)]
        (draft,) = read(tmp_path, [{"vision": codes}], fields="vision", max_frames=most)
        shown = [token for token, is_vision, _ in tokens(draft) if is_vision]
        assert shown[0::3] == kept
        assert shown[2::3] == [EOF] * (len(kept) - 1) + [EOV]


def test_layouts_are_drawn_by_line_as_lwm_draws_them(tmp_path: Path) -> None:
    layouts = ["[prompt],vision", "[vision],caption", "caption"]
    lines: list[Any] = [EXAMPLE | {"fields": layouts, "n": n} for n in range(40)]
    lines[3] = ""  # counts as a line, and is none
    drafts = read(tmp_path, lines, fields_from_example="fields")
    drawn = [draft.name for draft in drafts]
    expected = [random.Random(line).choice(layouts) for line in range(40)]
    assert drawn == [f"a.jsonl line {n + 1}, {expected[n]}" for n in range(40) if n != 3]
    # What CPython's generator gives for the first lines, in case it should ever change.
    assert [layouts.index(layout) for layout in expected[:8]] == FIRST_DRAWS
    fixed = read(tmp_path, lines[:2], fields_from_example="fields", fields_index=2)
    assert [draft.name for draft in fixed] == ["a.jsonl line 1, caption", "a.jsonl line 2, caption"]


FIRST_DRAWS = [1, 0, 0, 0, 0, 2, 2, 1]


def test_a_file_in_parts_is_the_file(tmp_path: Path) -> None:
    layouts = ["prompt", "caption"]
    lines = [EXAMPLE | {"fields": layouts, "n": "x" * (n % 7)} for n in range(60)]
    whole = read(tmp_path, lines, fields_from_example="fields")
    spec = dataset(fields_from_example="fields")
    reader = LwmReader("lwm", spec, tmp_path, GEOMETRY)
    files = RecordFiles("lwm", spec, spec.files, tmp_path, seed=0)
    items = files.items(lambda file: parts(file, "jsonl", 500))
    assert len(items) > 5
    assert [draft for item in items for draft in reader.drafts(item)] == whole


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "draw"}, r"no key 'vision' \(its keys: prompt\)"),
        ({"prompt": "draw", "Vision": [1, 2]}, "no key 'vision'.*did you mean 'Vision'"),
        ({"prompt": 7, "vision": [1, 2]}, "'prompt' holds a number, expected text"),
        ({"prompt": ["draw"], "vision": [1, 2]}, "'prompt' holds a list, expected text"),
        ({"prompt": "\ud800", "vision": [1, 2]}, "'prompt' holds half a surrogate pair"),
        ({"prompt": "draw", "vision": "1 2"}, "'vision' holds text, expected a list of codes"),
        ({"prompt": "draw", "vision": []}, "holds 0 codes, expected whole frames of 2"),
        ({"prompt": "draw", "vision": [1, 2, 3]}, "holds 3 codes, expected whole frames of 2"),
        ({"prompt": "draw", "vision": [1, 8]}, r"'vision'\[1\] \(frame 0\) is 8, outside .* of 8"),
        ({"prompt": "draw", "vision": [1, 1, -1, 0]}, r"'vision'\[2\] \(frame 1\) is -1"),
        ({"prompt": "draw", "vision": [1, 10**30]}, "outside the codebook"),
        ({"prompt": "draw", "vision": [1, 2.5]}, r"'vision'\[1\] is a number, expected a whole"),
        ({"prompt": "draw", "vision": [1, True]}, r"'vision'\[1\] is a boolean"),
        ({"prompt": "draw", "vision": [[1, 2]]}, r"'vision'\[0\] is a list"),
        ("[1, 2]", "holds a list, expected an object"),
        ('{"prompt": "dr', "not JSON: Unterminated string"),
        ("[" * 100_000, "nested|recursion"),
    ],
)
def test_bad_lines_are_refused_by_number_and_the_rest_is_read(
    tmp_path: Path, record: Any, reason: str
) -> None:
    good = {"prompt": "draw", "vision": [1, 2]}
    first, bad, last = read(tmp_path, [good, record, good], fields="[prompt],vision")
    assert isinstance(first, Draft) and isinstance(last, Draft)
    assert isinstance(bad, Refused) and bad.name == "a.jsonl line 2" and bad.unusable
    assert re.search(reason, bad.reason), bad.reason


def test_bad_layouts_in_lines_are_refused(tmp_path: Path) -> None:
    drafts = read(
        tmp_path,
        [
            EXAMPLE | {"fields": "[vision+prompt],caption"},
            EXAMPLE | {"fields": []},
            EXAMPLE | {"fields": 3},
            EXAMPLE | {"fields": ["prompt"]},
        ],
        fields_from_example="fields",
        fields_index=1,
    )
    reasons = [draft.reason for draft in drafts if isinstance(draft, Refused)]
    assert "write '[vision],[prompt],caption'" in reasons[0]
    assert "empty list" in reasons[1] and "holds a number" in reasons[2]
    assert "lists 1 layouts, and fields_index asks for number 1" in reasons[3]


def test_bytes_that_are_no_jsonl(tmp_path: Path) -> None:
    (tmp_path / "binary.jsonl").write_bytes(b"PAR1\0\0\0")
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    (tmp_path / "latin.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "x"}\r\n{"a": "\xe9"}\r\n{"a": "z"}')
    reader = LwmReader("lwm", dataset(fields="a"), tmp_path, None)
    found = [draft for item in reader.items() for draft in reader.drafts(item)]
    refused = {draft.name: draft.reason for draft in found if isinstance(draft, Refused)}
    assert "NUL bytes" in refused["binary.jsonl"]
    assert "blank" in refused["empty.jsonl"]
    assert "not UTF-8" in refused["latin.jsonl line 2"]
    names = [draft.name for draft in found if isinstance(draft, Draft)]
    assert names == ["latin.jsonl line 1, a", "latin.jsonl line 3, a"]


def test_without_a_codebook_a_key_that_holds_vision_is_text(tmp_path: Path) -> None:
    (draft,) = read(tmp_path, [{"television": "a ring"}], fields="television", geometry=None)
    assert tokens(draft) == [*text(BOS, loss=0), *text(A, RING), *text(EOS)]
    (refused,) = read(tmp_path, [{"vision": [1, 2]}], fields="vision", geometry=None)
    assert isinstance(refused, Refused) and "recipe's codebook:" in refused.reason


def test_held_out_files_and_training_texts(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"a": "what", "vision": [1, 2]}\n')
    (tmp_path / "c.jsonl").write_text('{"a": "so", "vision": [1, 2]}\n')
    reader = LwmReader("lwm", dataset(fields="a,vision", held_out=["c*"]), tmp_path, GEOMETRY)
    items = reader.items()
    assert [next(iter(reader.drafts(item))).held_out for item in items] == [None, True]  # type: ignore[union-attr]
    assert [list(reader.training_texts(item)) for item in items] == [["what"], []]
    # A tokenizer is trained before there is a codebook to check codes against.
    early = LwmReader("lwm", dataset(fields="a,vision"), tmp_path, CodeGeometry(1, 1))
    assert [list(early.training_texts(item)) for item in items] == [["what"], ["so"]]
    with pytest.raises(DataError, match="held_out: 'd\\*' matches the name of none"):
        LwmReader("lwm", dataset(fields="a", held_out=["d*"]), tmp_path, None).items()
    with pytest.raises(DataError, match=r"datasets.lwm.files: 'x\*' matches no file"):
        LwmReader("lwm", dataset(fields="a", files=["x*"]), tmp_path, None).items()
    with pytest.raises(DataError, match="datasets.lwm.fields: .*joined by comma"):
        LwmReader("lwm", dataset(fields="a+vision"), tmp_path, GEOMETRY)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (
            {"codebook": "amused", "codebook_size": 9, "codes_per_frame": 2},
            "codebook_size: 9, .* 8",
        ),
        ({"codebook": "amused", "codebook_size": 8, "codes_per_frame": 3}, "per_frame: 3, .* 2"),
        ({"codebook": "amused", "codebook_size": 8, "codes_per_frame": 2}, "'amused', but .* 0123"),
    ],
)
def test_codes_of_another_codebook_are_named(codes: dict[str, Any], message: str) -> None:
    names = ["0123456789abcdef", "patch"]
    with pytest.raises(DataError, match=f"datasets.lwm.codes.{message}|{message}"):
        require_same_codebook("lwm", dataset(fields="a", codes=codes), GEOMETRY, names)
    for same in ("patch", "0123456789"):
        spec = LwmCodesSpec(codebook=same, codebook_size=8, codes_per_frame=2)
        require_same_codebook("lwm", dataset(fields="a", codes=spec), GEOMETRY, names)
    require_same_codebook("lwm", dataset(fields="a"), GEOMETRY, names)


def test_drafts_of_equal_lines_are_one_document(tmp_path: Path) -> None:
    same, again, other = read(tmp_path, [EXAMPLE, EXAMPLE, EXAMPLE | {"n": 1}], fields="prompt")
    assert isinstance(same, Draft) and isinstance(again, Draft) and isinstance(other, Draft)
    assert same.document == again.document != other.document
    assert np.array_equal([len(same.parts)], [3])
