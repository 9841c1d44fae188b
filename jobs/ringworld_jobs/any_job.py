"""Every kind of job that the controller runs: one union, and a file or plain data as one of it.

A further kind is a spec with the attributes that these share, a loader beside theirs, and its parts
in the platform's agenda.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from ringworld_jobs.document import read_document
from ringworld_jobs.eval_spec import EvalSpec
from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_jobs.load import load_eval, load_generate, load_job
from ringworld_jobs.run_place import FindRun
from ringworld_jobs.spec import JobSpec

Job = JobSpec | EvalSpec | GenerateSpec

_JOBS: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="kind")])


def parse_job(data: Any) -> Job:
    """A resolved spec from plain data.

    Raises:
        pydantic.ValidationError: it is none.
    """
    return _JOBS.validate_python(data)


def load_any_job(
    path: Path | str, *, check_files: bool = True, find_run: FindRun | None = None
) -> Job:
    """Load and check a job of any kind; see ``load_job``.

    Raises:
        JobSpecError: everything that is wrong, with lines, limits and remedies.
    """
    data = read_document(Path(path)).data
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "eval":
        return load_eval(path, check_files=check_files)
    if kind == "generate":
        return load_generate(path, check_files=check_files)
    return load_job(path, check_files=check_files, find_run=find_run)
