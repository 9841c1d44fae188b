"""From a YAML file to a job spec, recipe or codebook job: all problems at once, or a valid spec."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ringworld_jobs.check_evaluate import check_eval_job, check_generate_job
from ringworld_jobs.codebook import CodebookJob
from ringworld_jobs.credentials import refuse_secrets
from ringworld_jobs.curriculum import check_curriculum, merge_defaults
from ringworld_jobs.document import Document, read_document
from ringworld_jobs.eval_spec import EvalSpec
from ringworld_jobs.evaluate_spec import EvaluateSpec
from ringworld_jobs.files import (
    check_codebook_files,
    check_evaluation_files,
    check_recipe_files,
    check_sources,
    check_store,
    check_tracking,
)
from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_jobs.model_job import ModelJob
from ringworld_jobs.problem import JobSpecError, KeyPath, Problem, nearest
from ringworld_jobs.recipe import (
    LwmDataset,
    MediaTextDataset,
    RecipeSpec,
    VideoTextDataset,
)
from ringworld_jobs.run_place import FindRun
from ringworld_jobs.spec import JobSpec
from ringworld_jobs.spec_data import DataSpec
from ringworld_jobs.validate import Checked, T, validate
from ringworld_jobs.weights import with_weights

__all__ = [
    "JobSpecError",
    "Problem",
    "eval_of",
    "load_codebook",
    "load_eval",
    "load_generate",
    "load_job",
    "load_recipe",
]

_KINDS = {
    "train": "a job spec (kind: train)",
    "eval": "a job of evaluations (kind: eval)",
    "generate": "a job of prompts (kind: generate)",
    "data": "a data recipe (kind: data)",
    "codebook": "a codebook job (kind: codebook)",
}
_COMMANDS = {
    "train": "ringworld run",
    "eval": "ringworld run",
    "generate": "ringworld run",
    "data": "ringworld data build",
    "codebook": "ringworld data train-codebook",
}


def load_job(
    path: Path | str, *, check_files: bool = True, find_run: FindRun | None = None
) -> JobSpec:
    """Load and check a job spec.

    Relative `model.init_from`, `data.recipe` and `data.sources.*.shards` come back absolute, so
    that the spec means the same wherever it is loaded again; `data.cache` and `checkpoint.store`
    stay relative to the working directory.

    Args:
        path: the YAML file.
        check_files: also check what the spec points to: data, packages, the store's folder.
        find_run: looks for the checkpoint that `model.init_from: run:...` means; without it that
            stays as it is.

    Returns:
        The spec, `defaults` merged into every stage.

    Raises:
        JobSpecError: everything that is wrong, with lines, limits and remedies.
    """
    path = Path(path)
    document = read_document(path)
    _check_kind(document, "train")
    refuse_secrets(document)
    _check_unused_defaults(document)
    merge_defaults(document)
    checked = with_weights(
        validate(JobSpec, document), path.parent, check_files=check_files, find_run=find_run
    )
    problems: list[Problem] = []
    recipe = _recipe_of(checked, path.parent, check_files, problems)
    check_curriculum(checked, recipe)
    check_store(checked, check_files=check_files)
    check_tracking(checked)
    if check_files:
        check_sources(checked, path.parent)
        for index, stage in enumerate(checked.spec.stages if checked.spec else ()):
            here: KeyPath = ("stages", index, "evaluate")
            check_evaluation_files(checked, stage.evaluate, path.parent, here)
    problems = document.problems + problems
    if problems or checked.spec is None:
        raise JobSpecError(problems)
    return _absolute(checked.spec, path.parent)


def load_eval(path: Path | str, *, check_files: bool = True) -> EvalSpec:
    """Load and check a job of evaluations; relative paths come back absolute as in ``load_job``.

    Args:
        path: the YAML file.
        check_files: also check what the spec points to. The model is looked for when the job is
            handed in.

    Raises:
        JobSpecError: everything that is wrong, with lines, limits and remedies.
    """
    path = Path(path)
    document = read_document(path)
    _check_kind(document, "eval")
    return _eval(document, path.parent, check_files)


def eval_of(values: dict[str, Any], name: str) -> EvalSpec:
    """Check a job of evaluations that no file holds; its paths are under the working directory.

    Args:
        values: as a file would hold them.
        name: where they come from, for messages.

    Raises:
        JobSpecError: everything that is wrong.
    """
    return _eval(Document(name, values), Path.cwd(), check_files=True)


def _eval(document: Document, base: Path, check_files: bool) -> EvalSpec:
    refuse_secrets(document)
    checked = validate(EvalSpec, document)
    problems: list[Problem] = []
    _recipe_of(checked, base, check_files, problems)
    check_eval_job(checked)
    check_store(checked, check_files=check_files)
    check_tracking(checked)
    if check_files:
        check_sources(checked, base)
        if checked.spec is not None:
            check_evaluation_files(checked, checked.spec.evaluate, base, ("evaluate",))
    problems = document.problems + problems
    if problems or checked.spec is None:
        raise JobSpecError(problems)
    return _absolute_eval(checked.spec, base)


def load_generate(path: Path | str, *, check_files: bool = True) -> GenerateSpec:
    """Load and check a job of prompts; relative paths come back absolute as in ``load_job``, `out`
    stays relative to the working directory.

    Args:
        path: the YAML file.
        check_files: also check the prompts and what else the spec points to. The model is looked
            for when the job is handed in.

    Raises:
        JobSpecError: everything that is wrong, with lines, limits and remedies.
    """
    base = Path(path).parent
    checked = _checked(Path(path), "generate", GenerateSpec)
    check_generate_job(checked, base, check_files=check_files)
    check_store(checked, check_files=check_files)
    check_tracking(checked)
    spec = _sound(checked).absolute(base)
    return spec.model_copy(update=_absolute_model(spec, base))


def load_recipe(path: Path | str, *, check_files: bool = True) -> RecipeSpec:
    """Load and check a data recipe.

    Args:
        path: the YAML file.
        check_files: also check that its files are there and its packages installed.

    Raises:
        JobSpecError: everything that is wrong, with lines, limits and remedies.
    """
    return _sound(_read_recipe(Path(path), check_files))


def load_codebook(path: Path | str, *, check_files: bool = True) -> CodebookJob:
    """Load and check a codebook job.

    Args:
        path: the YAML file.
        check_files: also check that its files are there and its packages installed.

    Raises:
        JobSpecError: everything that is wrong, with lines, limits and remedies.
    """
    checked = _checked(Path(path), "codebook", CodebookJob)
    _check_clips(checked)
    if check_files:
        check_codebook_files(checked, Path(path).parent)
    return _sound(checked)


def _read_recipe(path: Path, check_files: bool) -> Checked[RecipeSpec]:
    checked = _checked(path, "data", RecipeSpec)
    _check_references(checked)
    if check_files:
        check_recipe_files(checked, path.parent)
    return checked


def _checked(path: Path, kind: str, model: type[T]) -> Checked[T]:
    """A file of one kind, its fields validated."""
    document = read_document(path)
    _check_kind(document, kind)
    refuse_secrets(document)
    return validate(model, document)


def _sound(checked: Checked[T]) -> T:
    """The spec, where nothing was reported."""
    if checked.document.problems or checked.spec is None:
        raise JobSpecError(checked.document.problems)
    return checked.spec


def _check_kind(document: Document, kind: str) -> None:
    """Say so at once where a file of another kind is given, a recipe for a job for instance."""
    found = document.data.get("kind") if isinstance(document.data, dict) else None
    if isinstance(found, str) and found != kind and found in _KINDS:
        document.report(
            ("kind",),
            f"this is {_KINDS[found]}, and {_KINDS[kind]} is needed; "
            f"for this one there is `{_COMMANDS[found]}`",
        )
        document.data = None


def _check_clips(checked: Checked[CodebookJob]) -> None:
    """A codebook has something to learn from, and something else to be measured on."""
    spec, report = checked.spec, checked.document.report
    if spec is None or not checked.sound(("videos",), ("images",), ("held_out",)):
        return
    if not spec.videos and not spec.images:
        report(("videos",), "nothing to learn from; name videos or images")
        return
    if not spec.held_out and not any(video.held_out for video in spec.videos.values()):
        report(
            ("held_out",),
            "nothing is held out, so nothing could be measured; name a whole video or pattern of "
            "images here, or a stretch under videos.NAME.held_out",
        )
    for index, name in enumerate(spec.held_out):
        if name not in spec.videos and not spec.images:
            known = ", ".join(spec.videos)
            place = ("held_out", index)
            report(
                place,
                f"no such entry under `videos`; there are {known}",
                hint=nearest(name, spec.videos),
            )
    if not spec.images and all(name in spec.held_out for name in spec.videos):
        report(("held_out",), "every video is held out, so nothing is left to learn from")


def _check_unused_defaults(document: Document) -> None:
    """Check a `defaults` block that no stage takes, because there is none yet or none readable."""
    data = document.data
    if not isinstance(data, dict) or not isinstance(data.get("defaults"), dict):
        return
    stages = data.get("stages")
    if isinstance(stages, list) and any(isinstance(stage, dict) for stage in stages):
        return
    trial = {"kind": "train", "stages": [{}], "defaults": data["defaults"]}
    alone = Document(document.file, trial, document.marks, secret_paths=document.secret_paths)
    merge_defaults(alone)
    validate(JobSpec, alone)
    document.problems += [p for p in alone.problems if p.path.startswith("defaults.")]


def _check_references(checked: Checked[RecipeSpec]) -> None:
    """Datasets of video need a codebook, and name videos of the recipe."""
    spec, report = checked.spec, checked.document.report
    if spec is None or not checked.sound(("datasets",)):
        return
    for name, dataset in spec.datasets.items():
        if isinstance(dataset, LwmDataset) and spec.codebook is None and dataset.codes is None:
            if "vision" in dataset.fields and checked.sound(("codebook",)):
                report(
                    ("datasets", name, "codes"),
                    "missing; fields names vision codes, so say which codebook they come from",
                )
        if not isinstance(dataset, VideoTextDataset | MediaTextDataset):
            continue
        if spec.codebook is None and checked.sound(("codebook",)):
            report(("datasets", name), "a dataset of video needs a codebook; add `codebook: {}`")
        if isinstance(dataset, MediaTextDataset):
            continue
        for index, video in enumerate(dataset.videos):
            if video not in spec.videos and checked.sound(("videos",)):
                known = ", ".join(spec.videos) or "none"
                report(
                    ("datasets", name, "videos", index),
                    f"no such entry under `videos`; there are {known}",
                    hint=nearest(video, spec.videos),
                )


def _recipe_of(
    checked: Checked[JobSpec] | Checked[EvalSpec],
    base: Path,
    check_files: bool,
    problems: list[Problem],
) -> Checked[RecipeSpec] | None:
    """The job's recipe, with its own problems added to ``problems``."""
    place: KeyPath = ("data", "recipe")
    if checked.spec is None or checked.spec.data.recipe is None or not checked.sound(place):
        return None
    path = base / checked.spec.data.recipe
    if not path.is_file():
        if check_files:
            near = _near_files(path)
            checked.document.report(place, f"no such file: {path}{near}")
        return None
    recipe = _read_recipe(path, check_files)
    problems += recipe.document.problems
    return recipe


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    names = [other.name for other in path.parent.glob("[!.]*.y*ml")]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)
    return f"; {path.parent} holds {near[0]}" if near else ""


def _absolute(spec: JobSpec, base: Path) -> JobSpec:
    stages = [
        stage.model_copy(update={"evaluate": stage.evaluate.absolute(base)})
        if isinstance(stage.evaluate, EvaluateSpec)
        else stage
        for stage in spec.stages
    ]
    return spec.model_copy(update={"data": _absolute_data(spec.data, base), "stages": stages})


def _absolute_eval(spec: EvalSpec, base: Path) -> EvalSpec:
    changed: dict[str, Any] = {"data": _absolute_data(spec.data, base)}
    if isinstance(spec.evaluate, EvaluateSpec):
        changed["evaluate"] = spec.evaluate.absolute(base)
    return spec.model_copy(update={**changed, **_absolute_model(spec, base)})


def _absolute_model(spec: ModelJob, base: Path) -> dict[str, Any]:
    """The fields of its model that name files, absolute."""
    changed: dict[str, Any] = {}
    for name in ("tokenizer", "codebook"):
        if value := getattr(spec, name):
            changed[name] = str((base / value).resolve())
    # A name may be a run's: only what says that it is a path, or is one, is taken for one.
    if spec.model.startswith(".") or (base / spec.model / "config.json").is_file():
        changed["model"] = str((base / spec.model).resolve())
    return changed


def _absolute_data(spec: DataSpec, base: Path) -> DataSpec:
    data: dict[str, Any] = {}
    if spec.recipe is not None:
        data["recipe"] = str((base / spec.recipe).resolve())
    if spec.sources:
        data["sources"] = {
            name: source
            if source.shards is None or "://" in source.shards
            else source.model_copy(update={"shards": str((base / source.shards).resolve())})
            for name, source in spec.sources.items()
        }
    return spec.model_copy(update=data)
