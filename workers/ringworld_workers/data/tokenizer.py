"""The text tokenizer: trained on the recipe's own texts, or loaded from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ringworld_workers.data.files import DataError

BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
"""What published tokenizers call the token at the start of a document."""
EOS_NAMES = ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>")
"""What published tokenizers call the token at the end of a document."""
WORD_MARKS = ("\u2581", "\u0120")
"""How SentencePiece and byte-level BPE spell a space within a piece."""
STORED_NAMES = ("tokenizer.json", "tokenizer.model")
"""File names under which ``save`` stores a tokenizer."""


class TextTokenizer(Protocol):
    """Text to ids and back. Text never turns into special tokens, whatever it spells."""

    size: int
    """Ids, special tokens included."""
    bos_id: int
    """The token at the start of a document."""
    eos_id: int
    """The token at its end."""
    marks_words: bool
    """A text's first word is encoded as if a space stood before it."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, in parallel where the library can."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""

    def digest(self) -> str:
        """Tells two tokenizers apart: equal digests encode alike."""

    def save(self, folder: Path) -> Path:
        """Store it in a folder for ``load_tokenizer``; returns the file."""


class JsonTokenizer:
    """A Hugging Face tokenizer.json, through the tokenizers library."""

    def __init__(self, tokenizer: Tokenizer, bos: str, eos: str) -> None:
        """Wrap a tokenizer; ``bos`` and ``eos`` name two of its tokens.

        Raises:
            DataError: the tokenizer has no such token.
        """
        # Otherwise a document that spells "<eos>" would end itself.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._id(bos)
        self.eos_id = self._id(eos)
        self.marks_words = _marks_words(tokenizer.id_to_token(id_) for id_ in self.encode("a"))

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f"the tokenizer has no token {token!r}")
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens, computed on all cores."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def digest(self) -> str:
        """SHA-256 of the tokenizer's JSON, keys sorted, and of the two document tokens."""
        content = json.dumps(json.loads(self._tokenizer.to_str()), sort_keys=True)
        return hashlib.sha256(f"{self.bos_id},{self.eos_id},{content}".encode()).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write tokenizer.json, and the names of the document tokens beside it."""
        names = {
            "bos_token": self._tokenizer.id_to_token(self.bos_id),
            "eos_token": self._tokenizer.id_to_token(self.eos_id),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1))
        path = folder / "tokenizer.json"
        path.write_text(self._tokenizer.to_str(), encoding="utf-8")
        return path


class SentencePieceTokenizer:
    """A SentencePiece .model file, as Llama-2 and LWM use."""

    def __init__(self, path: Path) -> None:
        """Load the model.

        Raises:
            DataError: not a SentencePiece model, or one without bos or eos.
        """
        self._content = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._content)
        except RuntimeError as error:
            raise DataError(f"{path}: not a SentencePiece model: {error}") from error
        self.size = int(self._processor.vocab_size())
        self.bos_id = int(self._processor.bos_id())
        self.eos_id = int(self._processor.eos_id())
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"{path}: the model has no bos or no eos token; documents need both")
        self.marks_words = _marks_words(
            self._processor.id_to_piece(id_) for id_ in self.encode("a")
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return list(self._processor.encode(text, out_type=int))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        # A model may have more rows than there are ids; the library would raise IndexError.
        return str(self._processor.decode([id_ for id_ in ids if id_ < self.size]))

    def digest(self) -> str:
        """SHA-256 of the model file."""
        return hashlib.sha256(self._content).hexdigest()

    def save(self, folder: Path) -> Path:
        """Copy the model file to tokenizer.model."""
        path = folder / "tokenizer.model"
        path.write_bytes(self._content)
        return path


def _marks_words(pieces: Iterable[str | None]) -> bool:
    """Whether the pieces of a lone word start with a mark."""
    return (next(iter(pieces), None) or "").startswith(WORD_MARKS)


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, *, split_digits: bool = False
) -> JsonTokenizer:
    """Train a byte-level BPE: every byte is a piece, so that no text is out of vocabulary.

    The result depends on the texts and the size alone.

    Args:
        texts: what to learn from.
        vocabulary_size: pieces, <bos>, <eos> and the 256 bytes included.
        split_digits: each digit is a piece of its own.

    Raises:
        DataError: the texts hold fewer distinct pieces than asked for.
    """
    tokenizer = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
        if split_digits
        else by_bytes
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = JsonTokenizer(tokenizer, "<bos>", "<eos>")
    if trained.size < vocabulary_size:
        raise DataError(
            f"tokenizer.train.vocabulary_size={vocabulary_size}, but the texts give only "
            f"{trained.size} pieces; lower it, or train on more text"
        )
    return trained


def load_tokenizer(path: Path) -> TextTokenizer:
    """Load a tokenizer: a tokenizer.json, a SentencePiece .model, or a folder that holds one.

    Where a tokenizer_config.json lies beside a tokenizer.json, it names the document tokens;
    else the usual names are tried.

    Raises:
        DataError: there is none, or it has no bos or eos token.
    """
    if path.is_dir():
        found = [path / name for name in STORED_NAMES if (path / name).is_file()]
        if not found:
            raise DataError(f"{path}: holds neither of {', '.join(STORED_NAMES)}")
        path = found[0]
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file; correct tokenizer.path")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not a tokenizer.json: {error}") from error
    config = _token_names(path.parent / "tokenizer_config.json")
    chosen = []
    for key, usual in (("bos_token", BOS_NAMES), ("eos_token", EOS_NAMES)):
        names = [config[key]] if key in config else usual
        known = [name for name in names if tokenizer.token_to_id(name) is not None]
        if not known:
            raise DataError(
                f"{path}: no {key}; looked for {', '.join(names)}. Name it in a "
                f"tokenizer_config.json beside the file"
            )
        chosen.append(known[0])
    return JsonTokenizer(tokenizer, *chosen)


def _token_names(path: Path) -> dict[str, str]:
    """The two document tokens that a tokenizer_config.json names, as far as it does."""
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    names = {}
    for key in ("bos_token", "eos_token"):
        token = config.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            names[key] = token
    return names
