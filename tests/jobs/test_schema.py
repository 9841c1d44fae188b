"""The editors' schemas accept what load accepts and mark what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ringworld_jobs.codebook import CodebookJob
from ringworld_jobs.document import read_document
from ringworld_jobs.load import load_codebook, load_job, load_recipe
from ringworld_jobs.recipe import RecipeSpec
from ringworld_jobs.reference import (
    CODEBOOK_EXAMPLE,
    EXAMPLE,
    RECIPE_EXAMPLE,
    codebook_page,
    job_page,
    recipe_page,
)
from ringworld_jobs.schema import (
    codebook_schema,
    data_schema,
    eval_schema,
    generate_schema,
    job_schema,
    main,
)
from ringworld_jobs.spec import StageSpec

JOBS = Path(__file__).resolve().parents[2] / "jobs"
Validator = jsonschema.Draft202012Validator


@pytest.mark.parametrize(
    "schema",
    [job_schema(), eval_schema(), generate_schema(), data_schema(), codebook_schema()],
    ids=["job", "eval", "generate", "data", "codebook"],
)
def test_schemas_are_schemas_with_a_description_for_every_field(schema: dict[str, Any]) -> None:
    Validator.check_schema(schema)
    for model in [schema, *schema["$defs"].values()]:
        for name, field in model.get("properties", {}).items():
            assert field.get("description") or "$ref" in field, name


@pytest.mark.parametrize("path", sorted(JOBS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_in_jobs_is_valid_in_an_editor(path: Path) -> None:
    schemas = {
        "train": job_schema,
        "eval": eval_schema,
        "generate": generate_schema,
        "data": data_schema,
        "codebook": codebook_schema,
    }
    data = read_document(path).data
    assert not list(Validator(schemas[data["kind"]]()).iter_errors(data))


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "sed", 1),
        (("stages", 0), "contxt_length", "4Ki"),
        (("defaults",), "zero_stag", 3),
        (("defaults",), "name", "x"),
        (("defaults", "learning_rate"), "warmup", 3),
        (("model",), "preset", "tny"),
        (("resources", "workers"), "max", 0),
    ],
)
def test_mistakes_are_marked(place: tuple[Any, ...], key: str, value: Any) -> None:
    data = read_document(JOBS / "quickstart.yaml").data
    target = data
    for part in place:
        target = target[part]
    target[key] = value
    errors = list(Validator(job_schema()).iter_errors(data))
    assert [(*error.absolute_path,) in (place, (*place, key)) for error in errors] == [True]


def test_the_example_of_the_reference_page_loads(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(EXAMPLE)
    assert [s.name for s in load_job(tmp_path / "job.yaml", check_files=False).stages] == [
        "8k",
        "64k",
    ]
    page = job_page()
    assert EXAMPLE in page
    for name in StageSpec.model_fields:
        assert f"| `{name}` |" in page


def test_the_example_of_the_recipe_page_loads(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE_EXAMPLE)
    assert list(load_recipe(tmp_path / "recipe.yaml", check_files=False).datasets) == [
        "texts",
        "clips",
    ]
    page = recipe_page()
    assert RECIPE_EXAMPLE in page
    for name in RecipeSpec.model_fields:
        assert f"| `{name}` |" in page


def test_the_example_of_the_codebook_page_loads(tmp_path: Path) -> None:
    (tmp_path / "codebook.yaml").write_text(CODEBOOK_EXAMPLE)
    assert load_codebook(tmp_path / "codebook.yaml", check_files=False).held_out == ["garden"]
    page = codebook_page()
    assert CODEBOOK_EXAMPLE in page
    for name in CodebookJob.model_fields:
        assert f"| `{name}` |" in page


def test_the_generator_writes_and_then_finds_its_files_current(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--root", str(tmp_path)]
    assert main([*arguments, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    assert json.loads((tmp_path / "docs/schema/job.schema.json").read_text()) == job_schema()
