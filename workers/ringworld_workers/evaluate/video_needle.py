"""Marked frames in a long clip: does the model see which colour is where?"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringworld_jobs.evaluate_needles import VideoNeedleTask
from ringworld_model.sampling.prompt import Prompt
from ringworld_workers.data.chat_template import Turn
from ringworld_workers.data.files import DataError, resolve
from ringworld_workers.data.media import sample_media
from ringworld_workers.data.sampling import Sampling
from ringworld_workers.evaluate.asking import Asker
from ringworld_workers.evaluate.needle import mean
from ringworld_workers.evaluate.scoring import names
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record, Subject
from ringworld_workers.generation.prompts import spans_of

COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 170, 40),
    "blue": (25, 45, 220),
    "yellow": (245, 225, 20),
    "purple": (140, 30, 170),
    "orange": (245, 130, 10),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
}
"""What marked frames show, whole; nothing of it is in the grey patterns."""

Codes = npt.NDArray[np.int32]


class VideoNeedle:
    """Lengths of clips x depths x what is asked x rounds."""

    name = "video_needle"

    def __init__(self, settings: VideoNeedleTask, subject: Subject) -> None:
        """Look what the model can see.

        Raises:
            RequestError: it has no vision, or its codebook is not at hand.
            ValueError: a clip is longer than the context, or too short to be marked.
        """
        self._settings, self._subject = settings, subject
        self._loaded = subject.loaded
        self._codebook = subject.loaded.need_codebook("evaluate.video_needle")
        self._seed = subject.seed if settings.seed is None else settings.seed
        self._frames = self._clip_lengths()

    def items(self) -> Sequence[Item]:
        """One for each clip and what is asked of it."""
        settings = self._settings
        made = []
        for frames, depth, ask, round_ in itertools.product(
            self._frames, settings.depth_list(), settings.ask, range(settings.rounds)
        ):
            name = f"{frames}-{depth:g}-{ask}-{round_}"
            draw = random.Random(f"{self._seed} video_needle {name}")
            colours = draw.sample(list(COLOURS), settings.marked)
            asked = round(depth / 100 * (frames - 1))
            others = [place for place in range(frames) if place != asked]
            places = [asked, *draw.sample(others, settings.marked - 1)]
            facts: dict[str, Any] = {"frames": frames, "depth": depth, "ask": ask, "round": round_}
            # Counted from 1, as people count.
            facts |= {
                "marked": {colour: at + 1 for colour, at in zip(colours, places, strict=True)}
            }
            expected = colours[0] if ask == "colour" else str(asked + 1)
            made.append(Item(name, {**facts, "expected": expected}))
        return made

    def run(self, items: Sequence[Item], ring: EvaluationRing) -> Iterator[Record]:
        """See ``Task.run``.

        The score is 1 where the answer holds the colour or number as a whole word, else 0.
        """
        limit = self._subject.context_length
        asker = Asker(ring, limit, self._settings.answer_tokens, 2 * limit)
        asked = (((item, prompt), prompt) for item in items for prompt in [self._prompt(item)])
        for (item, prompt), answer in asker.ask_all(asked):
            yield {
                "id": item.id,
                "question": self._question(item),
                "answer": answer.text,
                "score": names(answer.text, item.facts["expected"]),
                "prompt_tokens": len(prompt),
                "answer_tokens": answer.tokens,
            }

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """``accuracy``, that of each question (``accuracy_of_colour``) and of each clip length."""
        figures = {"accuracy": mean([record["score"] for record in records])}
        for key, name in (("ask", "accuracy_of_{}"), ("frames", "accuracy_at_{}_frames")):
            for value in sorted({record[key] for record in records}):
                scores = [record["score"] for record in records if record[key] == value]
                figures[name.format(value)] = mean(scores)
        return figures

    def _question(self, item: Item) -> str:
        """What is asked, of the first marked frame."""
        colour, position = next(iter(item.facts["marked"].items()))
        if item.facts["ask"] == "colour":
            return self._settings.colour_question.replace("{position}", str(position))
        return self._settings.position_question.replace("{colour}", colour)

    def _prompt(self, item: Item) -> Prompt:
        """The question and the clip, in the paper's order."""
        codes = self._background[: item.facts["frames"]].copy()
        for colour, position in item.facts["marked"].items():
            codes[position - 1] = self._marks[colour]
        turn = Turn("user", (self._question(item), codes))
        return Prompt.of(*spans_of(self._loaded.template.prompt([turn]), self._loaded))

    def _clip_lengths(self) -> list[int]:
        settings = self._settings
        stride = self._loaded.codes_per_frame + 1
        words = max(
            len(self._loaded.tokenizer.encode(text))
            for text in (settings.colour_question, settings.position_question)
        )
        template = self._loaded.template
        words += len(
            self._loaded.tokenizer.encode(
                f"{template.system} {template.user_prefix} \n {template.assistant_prefix}"
            )
        )
        words += len(self._loaded.start_ids) + len(self._loaded.end_ids) + _SPARE
        most = (self._subject.context_length - settings.answer_tokens - words) // stride
        if most < settings.marked:
            raise ValueError(
                f"evaluate.video_needle: {self._subject.context_length:,} tokens of context hold "
                f"{max(0, most)} frames of {stride} tokens beside the question, and "
                f"{settings.marked} are marked; ask a model of a longer context, or mark fewer"
            )
        if settings.frames == "auto":
            return sorted({max(settings.marked, most // part) for part in (4, 2, 1)})
        for frames in settings.frames:
            if not settings.marked <= frames <= most:
                raise ValueError(
                    f"evaluate.video_needle.frames: {frames} frames; give {settings.marked} "
                    f"(frames that are marked) to {most} (what the context of "
                    f"{self._subject.context_length:,} tokens holds)"
                )
        return sorted(set(settings.frames))

    @cached_property
    def _marks(self) -> dict[str, Codes]:
        size = self._codebook.frame_size
        pixels = np.empty((len(COLOURS), size, size, 3), np.uint8)
        pixels[:] = np.array(list(COLOURS.values()), np.uint8)[:, None, None]
        return dict(zip(COLOURS, self._codebook.encode(pixels), strict=True))

    @cached_property
    def _background(self) -> Codes:
        """Codes of the longest clip's frames, int32 [F, C]."""
        count, size = max(self._frames), self._codebook.frame_size
        name = self._settings.background
        if name is None:
            return self._codebook.encode(grey_patterns(count, size, self._seed))
        try:
            (file, *_) = resolve(name, Path())
            sampled = sample_media(file.path, Sampling(self._settings.fps), size)
            pixels = np.stack([frame.pixels for frame in itertools.islice(sampled, count)])
        except DataError as error:
            raise DataError(f"evaluate.video_needle.background: {name}: {error}") from error
        codes = self._codebook.encode(pixels)
        return codes[np.arange(count) % len(codes)]


_SPARE = 8
"""Tokens: a position has more digits than its placeholder, and pieces join in other ways."""


def grey_patterns(count: int, size: int, seed: int) -> npt.NDArray[np.uint8]:
    """Bands of grey that drift and turn, unlike in any two neighbouring frames.

    Returns:
        uint8 [count, size, size, 3].
    """
    draw = np.random.default_rng(seed)
    at = np.linspace(-1, 1, size)
    across, down = np.meshgrid(at, at)
    angles = np.cumsum(draw.uniform(0.02, 0.2, count))
    shifts = np.cumsum(draw.uniform(0.1, 0.5, count))
    waves = [
        np.sin(4 * (across * np.cos(angle) + down * np.sin(angle)) + shift)
        for angle, shift in zip(angles, shifts, strict=True)
    ]
    levels = (128 + 70 * np.stack(waves)).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=3)
