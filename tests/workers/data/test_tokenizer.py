"""The text tokenizer: exact round trips, the same each time, and the three ways to load one."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_workers.data.files import DataError
from ringworld_workers.data.tokenizer import (
    JsonTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = [f"the state of the union is ring {n} of the world, and a clip of it" for n in range(50)]


@cache
def trained() -> JsonTokenizer:
    return train_tokenizer(TEXTS, 300)


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = trained().encode(text)
    assert trained().decode(ids) == text
    assert all(0 <= i < trained().size for i in ids)


def test_training_is_deterministic_and_the_digest_tells() -> None:
    again = train_tokenizer(TEXTS, 300)
    assert again.digest() == trained().digest()
    assert again.size == 300
    assert train_tokenizer(TEXTS, 290).digest() != again.digest()


@pytest.mark.parametrize("text", ["<bos>", "<eos>", "a<eos>b"])
def test_text_that_spells_a_special_token_stays_text(text: str) -> None:
    ids = trained().encode(text)
    assert not {trained().bos_id, trained().eos_id} & set(ids)
    assert trained().decode(ids) == text
    assert trained().encode_batch([text]) == [ids]


def test_too_little_text_is_an_error_with_the_number() -> None:
    with pytest.raises(DataError, match="vocabulary_size=2000.*only 3"):
        train_tokenizer(TEXTS, 2000)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    trained().save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.digest() == trained().digest()
    assert (loaded.bos_id, loaded.eos_id) == (trained().bos_id, trained().eos_id)
    assert loaded.encode("<vision>") == trained().encode("<vision>")


def test_the_config_beside_a_tokenizer_names_its_document_tokens(tmp_path: Path) -> None:
    trained().save(tmp_path)
    names = {"bos_token": {"content": "<eos>"}, "eos_token": "<bos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.bos_id, loaded.eos_id) == (trained().eos_id, trained().bos_id)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<nothing>"}))
    with pytest.raises(DataError, match="bos_token; looked for <nothing>"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    loaded = load_tokenizer(tmp_path / "tokenizer.model")
    assert isinstance(loaded, SentencePieceTokenizer)
    assert (loaded.bos_id, loaded.eos_id) == (1, 2)
    text = "the state of the ring </s>"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_id not in loaded.encode(text)
    assert loaded.decode([*loaded.encode("ring"), loaded.size]) == "ring"
    # It writes the space before a word itself; byte-level BPE does not.
    assert loaded.marks_words and not trained().marks_words
    assert loaded.encode("ring") + loaded.encode("world") == loaded.encode("ring world")
    assert trained().encode("ring") + trained().encode(" world") == trained().encode("ring world")
    (tmp_path / "copy").mkdir()
    loaded.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").digest() == loaded.digest()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(DataError, match=name):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent.json")
