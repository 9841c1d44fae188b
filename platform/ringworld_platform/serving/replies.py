"""Answers in OpenAI's shapes, whole or piece by piece."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from typing import Any, Literal

from ringworld_platform.serving.api_types import ChatRequest, CompletionRequest

Finish = Literal["stop", "length"]


class Reply(ABC):
    """One answer on its way.

    Attributes:
        request: as it was asked.
        prompt_tokens: of the prompt.
        answer_tokens: so far.
        tells_usage: each piece has ``usage``, and the last one says it.
    """

    request: type[ChatRequest] | type[CompletionRequest]
    _id: str
    _object: str
    _piece: str

    def __init__(self, model: str) -> None:
        """Begin.

        Args:
            model: its name.
        """
        self.prompt_tokens = self.answer_tokens = 0
        self.tells_usage = False
        self._model, self._created = model, int(time.time())
        self._number = f"{self._id}-{uuid.uuid4().hex}"

    @property
    def usage(self) -> dict[str, int]:
        """Tokens that were read and written."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.answer_tokens,
            "total_tokens": self.prompt_tokens + self.answer_tokens,
        }

    def whole(self, text: str, finish: Finish) -> dict[str, Any]:
        """All of the answer."""
        choice = {**self._whole(text), "index": 0, "logprobs": None, "finish_reason": finish}
        return {**self._frame(self._object), "choices": [choice], "usage": self.usage}

    def first(self) -> dict[str, Any] | None:
        """What stands before the first piece; None: nothing."""
        return None

    def piece(self, text: str, finish: Finish | None = None) -> dict[str, Any]:
        """A piece of the answer; the last has ``finish``."""
        return self._chunk(self._part(text), finish)

    def last(self) -> dict[str, Any]:
        """The usage, behind the last piece."""
        return {**self._frame(self._piece), "choices": [], "usage": self.usage}

    def _chunk(self, part: dict[str, Any], finish: Finish | None) -> dict[str, Any]:
        choice = {**part, "index": 0, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self.tells_usage else {}
        return {**self._frame(self._piece), "choices": [choice], **usage}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._number,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }

    @abstractmethod
    def _whole(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _part(self, text: str) -> dict[str, Any]: ...


class ChatReply(Reply):
    """Of ``/v1/chat/completions``."""

    request = ChatRequest
    _id, _object, _piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> dict[str, Any]:
        """Who speaks."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None)

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


class CompletionReply(Reply):
    """Of ``/v1/completions``."""

    request = CompletionRequest
    _id, _object, _piece = "cmpl", "text_completion", "text_completion"

    def _whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _part(self, text: str) -> dict[str, Any]:
        return {"text": text}
