"""Answers to a file of prompts: text into records, pictures and clips into files of a store."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringworld_jobs.evaluate_generate import (
    IMAGE_GUIDANCE,
    IMAGE_TOP_K,
    VIDEO_TOP_K,
    GenerateSettings,
    GenerateTask,
)
from ringworld_jobs.prompts_file import PromptLine, check_lines, read_prompts
from ringworld_model.sampling.answer import Answer
from ringworld_model.sampling.settings import DrawSettings, SamplingSettings
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record, Subject
from ringworld_workers.generation.asker import Asker
from ringworld_workers.generation.asks import Ask
from ringworld_workers.generation.requests import Request
from ringworld_workers.generation.source import RequestError
from ringworld_workers.store.opening import open_store

LONGEST_TEXT_BYTES = 32 * 1024
"""Of an answer in a record, as JSON; a longer one is a file, and its beginning in the record."""
_SHOWN = 200
"""Characters of a prompt that its record has."""
_BEGINNING = 1000


class OwnPrompts:
    """The lines of the file, each asked once."""

    name = "generate"

    def __init__(self, settings: GenerateTask, subject: Subject) -> None:
        """Read the lines; media are read when it is their turn.

        Raises:
            PromptsError: the file or a line cannot be used, or a medium is not on this machine.
            RequestError: the model has no tokenizer at hand, or draws nothing and shall.
        """
        # Prompts are held against the context that is asked in, which may be a shorter one.
        source = replace(subject.loaded.source, context_length=subject.context_length)
        self._loaded = replace(subject.loaded, source=source)
        if settings.to != "text":
            self._loaded.need_codebook(f"to: {settings.to}")
        self._request = request_of(settings, subject.seed)
        self._batch, self._url = settings.batch, subject.files_url
        path = Path(settings.prompts)
        lines = read_prompts(path)
        check_lines(lines, settings.to, path)
        # With its digest: a line that was changed since a stop is another question.
        self._lines = {f"{line.id}@{line.digest}": line for line in lines}

    def items(self) -> Sequence[Item]:
        """One for each line; ``line`` orders them."""
        return [
            Item(
                name,
                {
                    "line": line.number,
                    "prompt_id": line.id,
                    "digest": line.digest,
                    "prompt": line.prompt[:_SHOWN],
                },
            )
            for name, line in self._lines.items()
        ]

    def run(self, items: Sequence[Item], ring: EvaluationRing) -> Iterator[Record]:
        """See ``Task.run``; a record has ``files``, named as in the store, or a ``problem``."""
        asker = Asker(self._loaded, ring.group)
        for first in range(0, len(items), self._batch):
            asked: list[tuple[str, PromptLine, Ask]] = []
            for item in items[first : first + self._batch]:
                line = self._lines[item.id]
                ring.progress(f"reads line {line.number}")
                try:
                    asked.append((item.id, line, self._request.ask_line(line, self._loaded)))
                except RequestError as error:
                    yield {"id": item.id, "problem": str(error)}
            if asked:
                yield from self._answers(asker, asked, ring)

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """``answered`` and ``failed`` prompts, ``tokens`` of the answers, and files ``drawn``."""
        answered = [record for record in records if "problem" not in record]
        return {
            "answered": len(answered),
            "failed": len(records) - len(answered),
            "tokens": sum(record["tokens"] for record in answered),
            "drawn": sum(
                not name.endswith(".txt") for record in answered for name in record["files"]
            ),
        }

    def _answers(
        self, asker: Asker, asked: Sequence[tuple[str, PromptLine, Ask]], ring: EvaluationRing
    ) -> Iterator[Record]:
        answers = [Answer() for _ in asked]
        tokens = 0
        events = asker.answer(
            [ask for _, _, ask in asked],
            on_chunk=lambda done, total: ring.progress(f"reads {done:,}/{total:,} tokens"),
        )
        for event in events:
            tokens += 1
            ring.progress(f"has written {tokens:,} tokens of {len(asked)} answers")
            answers[event.prompt].add(event)
            if event.end is not None:
                name, line, ask = asked[event.prompt]
                answer = answers[event.prompt]
                kept = self._kept(answer, line, ask) if ring.rank == 0 else {}
                yield {
                    "id": name,
                    "answer": answer.text,
                    "end": answer.end,
                    "prompt_tokens": len(ask.prompt),
                    "tokens": answer.tokens,
                    "files": [],
                    **kept,
                }

    def _kept(self, answer: Answer, line: PromptLine, ask: Ask) -> dict[str, Any]:
        """Put the answer's files into the store; returns what the record says of them."""
        stem = f"{line.number:05d}"

        with tempfile.TemporaryDirectory(prefix="ringworld-answer-") as folder:

            def path_of(number: int, suffix: str) -> Path:
                tail = f"-{number}" if self._request.to == "text" else ""
                return Path(folder) / f"{stem}{tail}{suffix}"

            files = []
            if self._loaded.codebook is not None:
                files = self._request.write(answer, ask, self._loaded, path_of)
            changed: dict[str, Any] = {}
            if len(json.dumps(answer.text)) > LONGEST_TEXT_BYTES:
                text = path_of(0, ".txt").with_name(f"{stem}.txt")
                text.write_text(answer.text, encoding="utf-8")
                files.append(text)
                changed["answer"] = answer.text[:_BEGINNING]
            if files:
                store = open_store(self._url)
                for file in files:
                    store.put(file.name, [file.read_bytes()])
        return {**changed, "files": [file.name for file in files]}


def request_of(settings: GenerateSettings, seed: int) -> Request:
    """What a job's settings ask of a model.

    Args:
        settings: of the job.
        seed: of its first line.
    """
    guidance, vision = settings.guidance, settings.vision.model_dump()
    if guidance is None:
        guidance = IMAGE_GUIDANCE if settings.to == "image" else 1.0
    if vision["top_k"] is None:
        vision["top_k"] = VIDEO_TOP_K if settings.to == "video" else IMAGE_TOP_K
    return Request(
        settings=SamplingSettings(
            text=DrawSettings(**settings.text.model_dump()),
            vision=DrawSettings(**vision),
            max_new_tokens=settings.answer_tokens,
            stop=tuple(settings.stop),
            seed=seed,
            guidance_scale=guidance,
        ),
        to=settings.to,
        form=settings.form,
        media_first=settings.media_first,
        frames=settings.frames,
        fps=settings.fps,
        max_frames=settings.answer_frames,
    )
