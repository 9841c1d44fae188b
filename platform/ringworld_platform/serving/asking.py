"""From a request to what the model is asked: media encoded, limits kept."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ringworld_platform.serving.api_errors import ApiError
from ringworld_platform.serving.api_types import (
    ChatRequest,
    CompletionRequest,
    ImagePart,
    InputVideoPart,
    Message,
    TextPart,
    VideoUrl,
)
from ringworld_platform.serving.media import Media
from ringworld_platform.serving.settings import ServeSettings

if TYPE_CHECKING:
    from ringworld_model.sampling.prompt import Prompt
    from ringworld_model.sampling.settings import SamplingSettings
    from ringworld_workers.generation.asks import Ask
    from ringworld_workers.generation.coder import Coder
    from ringworld_workers.generation.prompts import Clip, Part

_SEED_BITS = 63
_ROLES = {"developer": "system"}


class Asking:
    """Makes asks of requests; its methods may take long, and are called from several threads."""

    def __init__(self, coder: Coder, settings: ServeSettings) -> None:
        """Take a model's tokenizers and the limits."""
        self._coder, self._settings = coder, settings
        self._media = Media(settings.allowed_urls, settings.max_body_bytes)

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its answer."""
        return self._coder.context_length

    def ask(self, request: ChatRequest | CompletionRequest) -> Ask:
        """What the model is asked.

        Raises:
            ApiError: a medium or the messages cannot be used, or a limit is passed.
        """
        from ringworld_workers.generation.asks import Ask
        from ringworld_workers.generation.prompts import chat_prompt, prompt_of
        from ringworld_workers.generation.source import RequestError

        try:
            if isinstance(request, ChatRequest):
                prompt = chat_prompt(
                    [self._message(at, each) for at, each in enumerate(request.messages)],
                    self._coder,
                )
            else:
                given = request.prompt
                prompt = prompt_of([given if isinstance(given, str) else given[0]], self._coder)
        except RequestError as error:
            raise ApiError(400, str(error)) from error
        most = self._most_tokens(prompt, request)
        return Ask(
            prompt=prompt,
            settings=self._sampling(request, most),
            grammar=replace(self._coder.grammar, max_frames=0),
        )

    def _message(self, at: int, message: Message) -> Mapping[str, object]:
        role = _ROLES.get(message.role, message.role)
        if isinstance(message.content, str):
            return {"role": role, "content": message.content}
        parts: list[Part] = []
        for number, part in enumerate(message.content):
            place = f"messages.{at}.content.{number}"
            if isinstance(part, TextPart):
                parts.append(part.text)
            elif isinstance(part, ImagePart):
                from ringworld_workers.generation.prompts import Image

                parts.append(Image(self._media.read(part.image_url.url, f"{place}.image_url")))
            elif isinstance(part, InputVideoPart):
                parts.append(self._clip(part.input_video, f"{place}.input_video"))
            else:
                parts.append(self._clip(part.video_url, f"{place}.video_url"))
        return {"role": role, "content": parts}

    def _clip(self, video: VideoUrl, place: str) -> Clip:
        from ringworld_workers.generation.prompts import Clip

        frame = self._coder.grammar.frame_tokens
        most = self._coder.context_length // frame
        if video.num_frames is not None and video.num_frames > most:
            raise ApiError(
                400,
                f"{place}.num_frames={video.num_frames:,}: a frame takes {frame} tokens, and "
                f"{self._settings.name} was trained for {self._coder.context_length:,}; ask for "
                f"{most:,} at most",
                code="context_length_exceeded",
                param=place,
            )
        frames = video.num_frames
        if video.fps is not None and frames is None:
            # One more than can be used is refused by its length, before thousands are encoded.
            frames = most + 1
        return Clip(self._media.read(video.url, place), fps=video.fps, num_frames=frames)

    def _most_tokens(self, prompt: Prompt, request: ChatRequest | CompletionRequest) -> int:
        """Tokens that the answer may have.

        Raises:
            ApiError: the prompt is too long, or more is asked for than there is.
        """
        limits, context = self._settings, self._coder.context_length
        limit, asked = limits.max_prompt_tokens, request.most_tokens
        if limit is not None and len(prompt) > limit:
            raise ApiError(
                400,
                f"the prompt has {len(prompt):,} tokens, and this server takes {limit:,}; "
                "shorten it, or take fewer frames",
                code="context_length_exceeded",
            )
        left = context - len(prompt)
        if left < 1 or (asked is not None and asked > left):
            wanted = "" if asked is None else f", and {asked:,} are asked for"
            raise ApiError(
                400,
                f"the prompt has {len(prompt):,} tokens{wanted}; {limits.name} was trained for "
                f"{context:,}, answer included. Shorten the prompt, take fewer frames, or ask for "
                "fewer tokens",
                code="context_length_exceeded",
            )
        if asked is not None and asked > limits.max_answer_tokens:
            raise ApiError(
                400,
                f"{asked:,} tokens are asked for, and this server writes "
                f"{limits.max_answer_tokens:,} at most",
                param="max_tokens",
            )
        return min(left, asked or limits.max_answer_tokens)

    def _sampling(self, request: ChatRequest | CompletionRequest, most: int) -> SamplingSettings:
        from ringworld_model.sampling.settings import DrawSettings, SamplingSettings

        names = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        given = {name: getattr(request, name) for name in names}
        seed = request.seed if request.seed is not None else secrets.randbits(_SEED_BITS)
        try:
            return SamplingSettings(
                text=DrawSettings(**{k: v for k, v in given.items() if v is not None}),
                max_new_tokens=most,
                stop_ids=(self._coder.tokenizer.eos_id,),
                stop=request.stops,
                seed=seed % (1 << _SEED_BITS),
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from error
