"""Settings of questions from one's own files, and of the codebook's reconstruction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from ringworld_jobs.evaluate_base import TaskSpec, absolute_pattern
from ringworld_jobs.problem import KeyPath
from ringworld_jobs.spec_base import Positive, Share, Size
from ringworld_jobs.units import Tokens

Patterns = Annotated[list[str], Field(min_length=1)]


class QuestionsTask(TaskSpec):
    """Questions with known answers, from jsonl files: retrieval, question answering and multiple
    choice, over text and video."""

    files: Patterns
    """Glob patterns of .jsonl files, relative to the job, or package:NAME/pattern."""
    form: Literal["auto", "plain", "loft", "video_mme"] = "auto"
    """plain: `question`, `answers` (a list, or one text), and `context` (text) or `video` (a path)
    where there is one; loft: `qid`, `query_text` and `answers`, texts or, where passages are to be
    found, [id, 1]; video_mme: `videoID`, `question`, `options` and `answer`, a letter. auto looks
    at each record."""
    corpus: str | None = None
    """LOFT's corpus of all questions: a jsonl of `pid`, `title_text`, `passage_text`. It is given
    before each question, whole, or as much of it as fits the context, with all passages that a
    question names (in its answers, or in metadata.qrels)."""
    media_root: str = ""
    """Folder of the videos that records name, relative to the job; empty: the job's."""
    fps: Positive | None = None
    """Frames taken per second of a video; empty: `frames`, evenly."""
    frames: Size = 8
    """Frames of a video at most, spread evenly."""
    template: Literal["chat", "plain"] = "chat"
    """chat: as conversations are trained; plain: the question alone, for a model that only
    continues text."""
    instruction: str | None = None
    """What follows the question; empty: what its form asks for, such as `Respond with only the
    letter`."""
    answer_tokens: Size = 64
    """Tokens of an answer at most."""
    batch_tokens: Tokens | None = None
    """Tokens of prompts that are asked at one time, at most; empty: twice the context length."""
    min_exact: Share | None = None
    """Least share of exactly right answers that passes."""
    min_f1: Share | None = None
    """Least mean F1 of words that passes."""
    min_accuracy: Share | None = None
    """Least share of right letters in multiple choice that passes."""
    min_recall: Share | None = None
    """Least mean recall in retrieval that passes."""

    def patterns(self) -> Iterator[tuple[KeyPath, str]]:
        """See ``TaskSpec.patterns``."""
        for index, pattern in enumerate(self.files):
            yield ("files", index), pattern
        for name in ("corpus", "media_root"):
            if getattr(self, name):
                yield (name,), getattr(self, name)

    def absolute(self, base: Path) -> Self:
        """See ``TaskSpec.absolute``."""
        changes: dict[str, object] = {
            "files": [absolute_pattern(pattern, base) for pattern in self.files],
            "media_root": absolute_pattern(self.media_root, base),
        }
        if self.corpus is not None:
            changes["corpus"] = absolute_pattern(self.corpus, base)
        return self.model_copy(update=changes)


class ReconstructionTask(TaskSpec):
    """How much of images and videos the codebook keeps: the most that a model could ever draw."""

    files: Patterns
    """Glob patterns of images and videos, relative to the job, or package:NAME/pattern."""
    fps: Positive = 4.0
    """Frames taken per second of a video."""
    frames: Size = 64
    """Frames of a video at most, spread evenly."""
    min_psnr: Positive | None = None
    """Least mean PSNR, in dB, that passes."""

    def patterns(self) -> Iterator[tuple[KeyPath, str]]:
        """See ``TaskSpec.patterns``."""
        for index, pattern in enumerate(self.files):
            yield ("files", index), pattern

    def absolute(self, base: Path) -> Self:
        """See ``TaskSpec.absolute``."""
        return self.model_copy(
            update={"files": [absolute_pattern(pattern, base) for pattern in self.files]}
        )
