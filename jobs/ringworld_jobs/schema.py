"""JSON schemas for editors and the reference page, generated from the models.

``python -m ringworld_jobs.schema`` rewrites docs/schema/*.schema.json, docs/job_spec.md,
docs/eval_job.md, docs/generate_job.md, docs/data_recipe.md and docs/codebook_job.md; with
``--check`` it only says whether they are current.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringworld_jobs.codebook import CodebookJob
from ringworld_jobs.describe import spelled_default
from ringworld_jobs.eval_spec import EvalSpec
from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_jobs.planner.output import PlanOutput
from ringworld_jobs.recipe import RecipeSpec
from ringworld_jobs.reference import (
    codebook_page,
    eval_page,
    generate_page,
    job_page,
    recipe_page,
)
from ringworld_jobs.spec import CheckpointSpec, JobSpec, LearningRateSpec, RecoverySpec, Spec

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REPOSITORY = Path(__file__).resolve().parents[2]

DEFAULTS_MEANING = (
    "Stage fields shared by all stages, merged key by key into each of them. A stage's own mixture "
    "replaces this one's whole, and so do steps and tokens each other."
)


def job_schema() -> dict[str, Any]:
    """The JSON schema of a job file, `defaults` included.

    An editor sees one stage at a time and cannot know what `defaults` gives it, so only a stage's
    name is required of it here; ``load_job`` says what is missing.
    """
    schema = JobSpec.model_json_schema()
    stage = schema["$defs"]["StageSpec"]
    stage["required"] = ["name"]
    schema["$defs"][LearningRateSpec.__name__].pop("required")
    shared = {key: value for key, value in stage["properties"].items() if key != "name"}
    schema["$defs"]["StageDefaults"] = {
        "additionalProperties": False,
        "description": DEFAULTS_MEANING,
        "properties": shared,
        "title": "StageDefaults",
        "type": "object",
    }
    schema["properties"]["defaults"] = {"$ref": "#/$defs/StageDefaults"}
    return _finish(_spelled(schema), "Ringworld job spec")


def eval_schema() -> dict[str, Any]:
    """The JSON schema of an evaluation job."""
    return _finish(_spelled(EvalSpec.model_json_schema()), "Ringworld evaluation job")


def generate_schema() -> dict[str, Any]:
    """The JSON schema of a job of prompts."""
    return _finish(_spelled(GenerateSpec.model_json_schema()), "Ringworld generation job")


def data_schema() -> dict[str, Any]:
    """The JSON schema of a data recipe."""
    return _finish(RecipeSpec.model_json_schema(), "Ringworld data recipe")


def codebook_schema() -> dict[str, Any]:
    """The JSON schema of a codebook job."""
    return _finish(CodebookJob.model_json_schema(), "Ringworld codebook job")


def plan_schema() -> dict[str, Any]:
    """The JSON schema of what `ringworld plan --json` prints."""
    return _finish(PlanOutput.model_json_schema(mode="serialization"), "Ringworld plan")


def _spelled(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with defaults as a file would write them."""
    for model in (CheckpointSpec, RecoverySpec):
        for name, info in model.model_fields.items():
            if not isinstance(info.default, Spec):
                field = schema["$defs"][model.__name__]["properties"][name]
                field["default"] = spelled_default(info)
    return schema


def _finish(schema: dict[str, Any], title: str) -> dict[str, Any]:
    return {"$schema": DIALECT, **schema, "title": title}


def generated_files() -> dict[str, str]:
    """Every generated file: its path below the repository and its text."""
    return {
        "docs/schema/job.schema.json": _json(job_schema()),
        "docs/schema/eval.schema.json": _json(eval_schema()),
        "docs/schema/generate.schema.json": _json(generate_schema()),
        "docs/schema/data.schema.json": _json(data_schema()),
        "docs/schema/codebook.schema.json": _json(codebook_schema()),
        "docs/schema/plan.schema.json": _json(plan_schema()),
        "docs/job_spec.md": job_page(),
        "docs/eval_job.md": eval_page(),
        "docs/generate_job.md": generate_page(),
        "docs/data_recipe.md": recipe_page(),
        "docs/codebook_job.md": codebook_page(),
    }


def _json(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, sort_keys=False, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the generated files, or check them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ringworld_jobs.schema", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="the repository's folder")
    options = parser.parse_args(arguments)
    status = 0
    for name, text in generated_files().items():
        path = options.root / name
        if path.is_file() and path.read_text("utf-8") == text:
            continue
        if options.check:
            sys.stderr.write(f"{name} is out of date; run python -m ringworld_jobs.schema\n")
            status = 1
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            sys.stdout.write(f"wrote {path}\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
