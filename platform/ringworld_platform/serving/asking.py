"""From a request to what the model is asked: media encoded, limits kept."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ringworld_platform.serving.api_errors import ApiError
from ringworld_platform.serving.api_types import (
    ChatRequest,
    CompletionRequest,
    ImagePart,
    InputVideoPart,
    MediaPart,
    Message,
    TextPart,
)
from ringworld_platform.serving.media import FETCH_SECONDS, Media
from ringworld_platform.serving.settings import ServeSettings

if TYPE_CHECKING:
    from ringworld_model.sampling.prompt import Prompt
    from ringworld_model.sampling.settings import SamplingSettings
    from ringworld_workers.generation.asks import Ask
    from ringworld_workers.generation.coder import Coder
    from ringworld_workers.generation.prompts import Medium

_SEED_BITS = 63
_ROLES = {"developer": "system"}
_USUAL_CHARACTERS = 16
"""Of a token at most, in what people write: a text of more a token is counted before it is read."""
_COUNTED_CHARACTERS = 1 << 18
"""That are counted at a time: an encoding takes hundreds of bytes a character."""


class Asking:
    """Makes asks of requests; its methods may take long, and are called from several threads."""

    def __init__(self, coder: Coder, settings: ServeSettings) -> None:
        """Take a model's tokenizers and the limits."""
        self._coder, self._settings = coder, settings
        seconds = min(FETCH_SECONDS, settings.media_seconds)
        self._media = Media(settings.allowed_urls, settings.max_body_bytes, seconds)

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its answer."""
        return self._coder.context_length

    def ask(
        self,
        request: ChatRequest | CompletionRequest,
        given_up: Callable[[], bool] = lambda: False,
    ) -> Ask:
        """What the model is asked.

        Args:
            request: of a client.
            given_up: whether nobody waits any more; asked while media are decoded.

        Raises:
            ApiError: a medium or the messages cannot be used, or a limit is passed.
        """
        from ringworld_workers.generation.asks import Ask
        from ringworld_workers.generation.prompts import chat_prompt, prompt_of
        from ringworld_workers.generation.source import RequestError

        self._check_texts(request.texts)
        try:
            if isinstance(request, ChatRequest):
                check = self._checked(given_up)
                prompt = chat_prompt(self._messages(request.messages, check), self._coder)
            else:
                prompt = prompt_of(request.texts, self._coder)
        except RequestError as error:
            raise ApiError(400, str(error)) from error
        most = self._most_tokens(prompt, request)
        return Ask(
            prompt=prompt,
            settings=self._sampling(request, most),
            grammar=replace(self._coder.grammar, max_frames=0),
        )

    @property
    def _most_prompt(self) -> int:
        """Tokens that a prompt may have."""
        context, limit = self._coder.context_length, self._settings.max_prompt_tokens
        return min(context, limit or context)

    def _check_texts(self, texts: Sequence[str]) -> None:
        """Refuse texts far beyond the limit before they are encoded as a whole.

        Raises:
            ApiError: they are; how long they are is not known.
        """
        most = self._most_prompt
        if sum(map(len, texts)) <= _USUAL_CHARACTERS * most:
            return
        # Where a text is cut, its tokens may be others: so it is refused at twice the limit only.
        left = 2 * most
        for text in texts:
            for first in range(0, len(text), _COUNTED_CHARACTERS):
                part = text[first : first + _COUNTED_CHARACTERS]
                left -= len(self._coder.tokenizer.encode(part))
                if left < 0:
                    raise ApiError(
                        400,
                        f"the prompt has more than {2 * most:,} tokens, and may have {most:,}; "
                        "shorten it",
                        code="context_length_exceeded",
                    )

    def _checked(self, given_up: Callable[[], bool]) -> Callable[[], None]:
        """Ends the decoding of a request's media when its time is over, or nobody waits."""
        seconds = self._settings.media_seconds
        deadline = time.monotonic() + seconds

        def check() -> None:
            if given_up() or time.monotonic() > deadline:
                raise ApiError(
                    400,
                    f"the images and videos are not decoded within {seconds:g} s; send shorter or "
                    "smaller ones, or have the server's operator raise --media-timeout",
                    code="media_timeout",
                    param="messages",
                )

        return check

    def _messages(
        self, messages: Sequence[Message], check: Callable[[], None]
    ) -> list[Mapping[str, object]]:
        """The messages, their media encoded.

        Raises:
            ApiError: a medium cannot be had, or all have more frames than the context: it is said
                at the first frame too many, for a body holds many thousands.
        """
        from ringworld_workers.generation.prompts import codes_of

        frame = self._coder.grammar.frame_tokens
        most = self._most_prompt // frame
        found: list[Mapping[str, object]] = []
        left = most
        for at, message in enumerate(messages):
            content: list[object] = []
            given = message.content
            for number, part in enumerate([given] if isinstance(given, str) else given):
                if isinstance(part, str | TextPart):
                    content.append(part if isinstance(part, str) else part.text)
                    continue
                place = f"messages.{at}.content.{number}.{part.type}"
                check()
                codes = codes_of(self._medium(part, place, left), self._coder, check)
                left -= len(codes)
                if left < 0:
                    raise ApiError(
                        400,
                        f"{place}: with it the images and videos have more than {most:,} frames. "
                        f"A frame takes {frame} tokens, and a prompt may have "
                        f"{self._most_prompt:,}; send fewer of them, or ask for "
                        "fewer num_frames",
                        code="context_length_exceeded",
                        param=place,
                    )
                content.append(codes)
            found.append({"role": _ROLES.get(message.role, message.role), "content": content})
        return found

    def _medium(self, part: MediaPart, place: str, left: int) -> Medium:
        """A medium of no more frames than it takes to see that they are too many."""
        from ringworld_workers.generation.prompts import NUM_FRAMES, Clip, Image

        if isinstance(part, ImagePart):
            return Image(self._media.read(part.image_url.url, place))
        video = part.input_video if isinstance(part, InputVideoPart) else part.video_url
        asked = video.num_frames
        if asked is None:
            asked = NUM_FRAMES if video.fps is None else left + 1
        data = self._media.read(video.url, place)
        return Clip(data, fps=video.fps, num_frames=min(asked, left + 1))

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
                param=request.limit_name,
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
