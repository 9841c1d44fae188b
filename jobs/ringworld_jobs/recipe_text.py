"""Datasets of text: documents, LWM's JSONL, chat, and questions about long documents."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from ringworld_jobs.chat_words import ASSISTANT_PREFIX, CHAT_SYSTEM, USER_PREFIX
from ringworld_jobs.lwm_fields import parse_layout
from ringworld_jobs.recipe_dataset import DatasetBase, Longer
from ringworld_jobs.spec import Positive, Share, Size, Spec
from ringworld_jobs.units import ContextLength, Seconds

Files = Annotated[list[str], Field(min_length=1)]


class TextDataset(DatasetBase):
    """Text documents."""

    kind: Literal["text"]
    """text"""
    files: Files
    """Glob patterns relative to the recipe, or package:NAME/pattern; with `format: hf`, folders."""
    format: Literal["auto", "txt", "jsonl", "parquet", "hf"] = "auto"
    """txt: a file a document; jsonl: a line; parquet: a row; hf: a folder that Hugging Face
    datasets' save_to_disk wrote. auto goes by the file's suffix (.jsonl, .parquet, else txt) and
    takes folders as hf."""
    text_field: str = "text"
    """Key or column of the text in jsonl, parquet and hf."""
    min_chars: Size = 1
    """Shorter documents are left out, and counted."""
    longer: Longer = "split"
    """What a stage does with a document longer than its context: split cuts it into rows, drop
    leaves it out and counts it, refuse stops with an error."""


class LwmCodesSpec(Spec):
    """The codebook that precomputed codes come from."""

    codebook: str
    """Its name or digest; datasets of different codebooks cannot be mixed."""
    codebook_size: Size = 8_192
    """Codes; eof and eov follow them."""
    codes_per_frame: Size = 256
    """Codes of one frame."""


class LwmDataset(DatasetBase):
    """JSONL as the Large World Model's release reads it: text, or text and precomputed codes."""

    kind: Literal["lwm"]
    """lwm"""
    files: Files
    """Glob patterns relative to the recipe, or package:NAME/pattern."""
    fields: str = ""
    """The layout of every example: keys joined at token level by comma and at text level by plus;
    [key] carries no loss; <|bos|> and <|eos|> are tokens; a key whose name holds "vision" is a list
    of codes. `[prompt],vision`."""
    fields_from_example: str = ""
    """Key of each example that holds its layout, or a list of layouts, of which one is drawn by the
    line's number, as LWM draws it."""
    fields_index: Annotated[int, Field(ge=0)] | None = None
    """Which of a list of layouts to take, instead of drawing one."""
    subfield_separator: str = " "
    """What plus puts between two texts."""
    add_bos_token: bool = True
    """Start each example with bos, without loss."""
    add_eos_token: bool = True
    """End each example with eos, with loss."""
    prepend_text: str = ""
    """Text before the first field."""
    max_frames: Annotated[int, Field(ge=0)] = 0
    """Frames of a clip at most, subsampled evenly; 0 keeps all."""
    codes: LwmCodesSpec | None = None
    """The codebook that the codes come from; empty: the recipe's."""

    @model_validator(mode="after")
    def _one(self) -> LwmDataset:
        if bool(self.fields) == bool(self.fields_from_example):
            raise ValueError(
                "give fields (one layout for all) or fields_from_example (the key of each "
                "example's own), one of them"
            )
        if self.fields:
            parse_layout(self.fields, codes=self.codes is not None)
        return self


class ChatDataset(DatasetBase):
    """Conversations; the answers carry loss."""

    kind: Literal["chat"]
    """chat"""
    files: Files
    """Glob patterns of .jsonl and .parquet files, relative to the recipe, or
    package:NAME/pattern."""
    format: Literal["auto", "messages", "ultrachat"] = "auto"
    """messages: `{"messages": [{"role", "content"}, ...]}`, where content is text or a list of
    parts {"type": "text"|"image"|"video", "text"|"path"}; ultrachat: `{"data": [question, answer,
    ...]}`. auto looks at each record."""
    system: str = CHAT_SYSTEM
    """The line before a conversation that has no system message of its own."""
    user_prefix: str = USER_PREFIX
    """What comes before a question."""
    assistant_prefix: str = ASSISTANT_PREFIX
    """What comes before an answer. An answer ends in eos, and both carry loss."""
    media_root: str = ""
    """Folder of the images and videos that messages name; empty: the recipe's."""
    fps: Positive = 4.0
    """Frames taken per second of a message's video."""
    max_frames: Size | None = None
    """Frames of a video at most, subsampled evenly."""
    longer: Longer = "drop"
    """What a stage does with a conversation longer than its context: drop leaves it out and counts
    it, split cuts it into rows, refuse stops with an error."""


class GeneratorSpec(Spec):
    """Who asks and answers a question about a chunk of text."""

    url: str = ""
    """Base URL of an OpenAI-compatible endpoint, such as http://host:8000/v1; empty: the built-in
    extractive generator, which needs no server and asks for facts that stand in the chunk."""
    model: str = ""
    """The endpoint's model."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if the endpoint wants one."""
    concurrency: Size = 8
    """Requests in flight for each worker."""
    retries: Annotated[int, Field(ge=0)] = 5
    """Tries after the first, with growing pauses, where trying again can help."""
    timeout: Seconds = Field(default=60.0, validate_default=False)
    """Deadline of one request."""
    temperature: Share = 0.0
    """Sampling temperature."""

    @model_validator(mode="after")
    def _model_named(self) -> GeneratorSpec:
        if not self.url:
            return self
        if not self.model:
            raise ValueError("an endpoint needs the name of its model; give model")
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(
                f"url {address.scheme}://{address.hostname or ''} is no endpoint; give "
                f"http://host:port/v1 or https://..."
            )
        if address.username or address.password or address.query:
            raise ValueError(
                "url holds a user, password or query; put the key into the environment variable "
                "that api_key_variable names"
            )
        return self


class LongQaDataset(DatasetBase):
    """Long documents, and questions about their parts at the end; answers alone carry loss.

    A document is cut into chunks, each chunk gets a question and an answer, and neighbouring chunks
    are joined to examples of the target length, with their questions after them as a chat.
    """

    kind: Literal["long_qa"]
    """long_qa"""
    files: Files
    """Glob patterns of text documents (txt, jsonl, parquet), relative to the recipe, or
    package:NAME/pattern."""
    text_field: str = "text"
    """Key or column of the text in jsonl and parquet."""
    target_tokens: ContextLength
    """Tokens of an example, questions included, at most."""
    chunk_tokens: Size = 1_000
    """Tokens of a chunk."""
    questions: Size | None = None
    """Questions of an example at most, spread over its chunks; empty: one a chunk."""
    generator: GeneratorSpec = GeneratorSpec()
    """Who asks and answers."""
    system: str = CHAT_SYSTEM
    """The line before the document."""
    user_prefix: str = USER_PREFIX
    """What comes before the document, which the first question follows, and before each later
    question."""
    assistant_prefix: str = ASSISTANT_PREFIX
    """What comes before an answer."""
    pack_apart: bool = True
    """Rows hold examples of this dataset alone: less than a hundredth of their tokens carry loss,
    which dense chat in the same row would drown."""

    @model_validator(mode="after")
    def _room(self) -> LongQaDataset:
        if self.chunk_tokens >= self.target_tokens:
            raise ValueError(
                f"chunk_tokens {self.chunk_tokens:,} leaves no room for a question in "
                f"target_tokens {self.target_tokens:,}; lower it, or raise target_tokens"
            )
        return self
