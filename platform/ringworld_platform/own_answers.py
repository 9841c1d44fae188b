"""Answers to a file of prompts as a user takes them: one file, in the order of the prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable

from ringworld_jobs.any_job import Job
from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_platform.run_claims import run_url
from ringworld_platform.run_records import Record
from ringworld_workers.store.opening import open_store

ANSWERS_FILE = "answers.jsonl"
ANSWERS_FOLDER = "answers"
TASK = "generate"
_KEYS = ("digest", "prompt", "answer", "end", "prompt_tokens", "tokens", "files", "problem")


def answers_url(spec: Job, run_id: str, stage: str = "") -> str:
    """Where answers and the files beside them go.

    Args:
        spec: the job, its paths absolute.
        run_id: of the run.
        stage: whose model answers; empty: the job has none.
    """
    if isinstance(spec, GenerateSpec) and spec.out is not None:
        return f"{spec.out.rstrip('/')}/{run_id}"
    tail = f"/{stage}" if stage else ""
    return f"{run_url(spec, run_id)}/{ANSWERS_FOLDER}{tail}"


def write_answers(url: str, records: Iterable[Record]) -> str:
    """Write them all, in the order of the prompts.

    Args:
        url: of ``answers_url``.
        records: of the task, in any order; of a changed line, the newest counts.

    Returns:
        The file's url.

    Raises:
        StoreError: the store does not take it.
    """
    by_line = {int(record["line"]): record for record in records}
    lines = [
        {"id": record["prompt_id"], **{key: record[key] for key in _KEYS if key in record}}
        for _, record in sorted(by_line.items())
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    open_store(url).put(ANSWERS_FILE, [text.encode()])
    return f"{url}/{ANSWERS_FILE}"
