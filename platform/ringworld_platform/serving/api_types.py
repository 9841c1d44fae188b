"""Requests as OpenAI's clients send them. What is not served is refused, not passed over."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ringworld_jobs.problem import nearest
from ringworld_platform.serving.api_errors import ApiError

_MOST_STOPS = 16
_MOST_FAULTS = 1000
"""Of a request, that are looked through for the one to be named: a body may hold millions."""
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class _Strict(BaseModel):
    # A number in quotes is a mistake of the client's, and a seed of ``true`` another one.
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A text within a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where an image is."""

    url: str
    detail: str | None = None


class ImagePart(_Strict):
    """An image within a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(_Strict):
    """Where a video is, and which frames of it are taken."""

    url: str
    fps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    num_frames: int | None = Field(default=None, ge=1)


class VideoUrlPart(_Strict):
    """A video within a message."""

    type: Literal["video_url"]
    video_url: VideoUrl


class InputVideoPart(_Strict):
    """The same under another name."""

    type: Literal["input_video"]
    input_video: VideoUrl


MediaPart = ImagePart | VideoUrlPart | InputVideoPart
Part = Annotated[TextPart | MediaPart, Field(discriminator="type")]


class Message(_Strict):
    """One message of a conversation; ``developer`` is another name of ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]
    name: str | None = None
    # An answer that is sent back as it came: clients keep what it lacks, too.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class StreamOptions(_Strict):
    """What a stream holds beside its text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(_Strict):
    """Only text is written."""

    type: Literal["text"]


class _Sampled(_Strict):
    """What both kinds of request have."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    stop: _Stop | Annotated[list[_Stop], Field(fail_fast=True)] | None = None
    seed: int | None = None
    n: Literal[1] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    # Taken and not used: they say who asks, or how it is billed.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts.

        Raises:
            ApiError: there are too many.
        """
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(found) > _MOST_STOPS:
            raise ApiError(
                400, f"stop holds {len(found)} texts; {_MOST_STOPS} at most", param="stop"
            )
        return found

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the answer at most; None: the request does not say."""
        return self.max_tokens

    @property
    def limit_name(self) -> str:
        """The field that ``most_tokens`` is of."""
        return "max_tokens"


class ChatRequest(_Sampled):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Of the two names the new one counts."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_name(self) -> str:
        """The field that ``most_tokens`` is of."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def texts(self) -> list[str]:
        """Of all messages."""
        found: list[str] = []
        for content in (message.content for message in self.messages):
            if isinstance(content, str):
                found.append(content)
            else:
                found += [part.text for part in content if isinstance(part, TextPart)]
        return found

    @property
    def has_media(self) -> bool:
        """Whether there is an image or a video to be decoded."""
        contents = (each.content for each in self.messages if isinstance(each.content, list))
        return any(not isinstance(part, TextPart) for parts in contents for part in parts)


class CompletionRequest(_Sampled):
    """``POST /v1/completions``: one bare prompt."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None

    @property
    def texts(self) -> list[str]:
        """The prompt."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


Request = TypeVar("Request", bound=BaseModel)


def parse(kind: type[Request], body: bytes) -> Request:
    """Read a request.

    Raises:
        ApiError: it is no JSON, or has a field that is unknown, missing or wrong; names the first.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > _MOST_FAULTS:
            count = f"{error.error_count():,}"
            raise ApiError(400, f"{count} fields that are not served here, or wrong") from None
        found = error.errors(include_url=False, include_input=False, include_context=False)
    # Where a field takes several types, it is wrong as each; the one that was meant is the deepest.
    first = max(found, key=lambda each: len(each["loc"]))
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is no JSON: {first['msg']}")
    # Without the names of types that stand between the names of fields.
    keys = [str(key) for key in first["loc"]]
    place = ".".join(key for key in keys if "[" not in key and not key.endswith("str"))
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        hint = nearest(place, list(kind.model_fields))
        meant = f"; did you mean {hint!r}?" if hint else "; leave it out"
        raise ApiError(400, f"{place} is not served here{meant}", param=place)
    raise ApiError(400, f"{place}: {first['msg']}", param=place)
