"""Settings of answers to one's own prompts: text, images or videos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from ringworld_jobs.evaluate_base import TaskSpec
from ringworld_jobs.prompts_file import PromptsError, Target, check_lines, read_prompts
from ringworld_jobs.spec_base import Positive, Share, Size, Spec
from ringworld_jobs.units import format_tokens

Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, le=1)]
IMAGE_GUIDANCE, IMAGE_TOP_K, VIDEO_TOP_K = 5.0, 1000, 100
"""As the release of LWM draws."""
DRAWN_FRAMES = 8
"""Frames of a video that says nothing else, likewise."""


class TextDrawSpec(Spec):
    """How tokens of text are drawn."""

    temperature: Share = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: Count = 0
    """Of so many likeliest tokens; 0: of all."""
    top_p: Probability = 1.0
    """Of the fewest likeliest tokens that hold this share of the probability."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Makes tokens that stand there already less likely; 1: it does not."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that were drawn already, as OpenAI's."""
    frequency_penalty: float = 0.0
    """Taken off them for each time, as OpenAI's."""


class VisionDrawSpec(Spec):
    """How codes of frames are drawn."""

    temperature: Share = 1.0
    """Divides the logits; 0 takes the likeliest code."""
    top_k: Count | None = None
    """Of so many likeliest codes; 0: of all; empty: 100 for a video, else 1000."""
    top_p: Probability = 1.0
    """Of the fewest likeliest codes that hold this share of the probability."""


class GenerateSettings(Spec):
    """What is asked, and how answers are drawn."""

    prompts: Annotated[str, Field(min_length=1)]
    """A .jsonl file, an object a line: `prompt`, and perhaps `id`, `image` or `images`, `video` or
    `videos`, and `from`, what a video begins with. Its media are relative to it. Every machine
    that works at the job reads them."""
    to: Target = "text"
    """What comes out: text, in which the model may draw; an image; or a video."""
    form: Literal["auto", "chat", "plain"] = "auto"
    """In the chat template or bare; auto: in the template where the model was trained on
    conversations."""
    media_first: bool = False
    """Media before the text, not behind it. Where {image} and {video} stand in a prompt, they go
    there."""
    frames: Size | None = None
    """Frames of a video: drawn, or taken of one that is asked about, evenly; empty: 8."""
    fps: Positive | None = None
    """Frames a second: taken of a video that is asked about (empty: `frames` of the whole), and
    shown of one that is drawn (empty: 4)."""
    answer_tokens: Size = 256
    """Tokens of an answer in text at most."""
    answer_frames: Count | None = None
    """Frames that an answer in text may draw; 0: none; empty: as many as fit."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end an answer; they are not part of it."""
    text: TextDrawSpec = TextDrawSpec()
    """How text is drawn."""
    vision: VisionDrawSpec = VisionDrawSpec()
    """How frames are drawn."""
    guidance: Share | None = None
    """How much the prompt counts in frames (classifier-free guidance); empty: 5 for an image, else
    1, which is none."""
    batch: Size = 8
    """Prompts that a ring answers at the same time. What an answer is does not depend on it."""
    max_failed: Count = 0
    """Most prompts that may be left without an answer, for a broken medium or for want of room in
    the context. The others are answered all the same."""

    def problems(self, context_length: int) -> Iterator[tuple[str, str]]:
        """See ``TaskSpec.problems``."""
        if self.to == "image" and self.frames not in (None, 1):
            yield "frames", "an image has one; leave it out, or write to: video"
        if self.to == "text" and self.answer_tokens >= context_length:
            yield (
                "answer_tokens",
                f"{self.answer_tokens:,} tokens leave no room for a prompt in a context of "
                f"{format_tokens(context_length)}; ask for fewer",
            )

    def file_problems(self, base: Path) -> Iterator[tuple[str, str]]:
        """See ``TaskSpec.file_problems``."""
        path = base / self.prompts
        try:
            check_lines(read_prompts(path), self.to, path)
        except PromptsError as error:
            yield "prompts", str(error)

    def absolute(self, base: Path) -> Self:
        """See ``TaskSpec.absolute``."""
        return self.model_copy(update={"prompts": str((base / self.prompts).resolve())})


class GenerateTask(GenerateSettings, TaskSpec):
    """Answers to one's own prompts, kept as answers.jsonl and files beside it."""
