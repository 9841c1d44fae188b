"""The sources that mixtures name: are they there, and can a stage draw an example from them?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ringworld_jobs.problem import KeyPath, nearest
from ringworld_jobs.recipe import (
    Dataset,
    LongQaDataset,
    MediaTextDataset,
    NeedlesDataset,
    RecipeSpec,
    VideoTextDataset,
)
from ringworld_jobs.spec import DocumentsSpec, JobSpec, StageSpec
from ringworld_jobs.units import format_tokens
from ringworld_jobs.validate import Checked

CAPTION_TOKENS = 16
"""What an example adds to its frames: the two vision delimiters and a short caption."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of a dataset before it is read.

    Attributes:
        example_tokens: tokens that an example needs in one row; 0 where it can be cut, or unknown.
        vision: whether it holds vision codes for certain.
        why: how example_tokens comes about, for messages.
    """

    example_tokens: int = 0
    vision: bool = False
    why: str = ""


def sources_of(spec: JobSpec, recipe: RecipeSpec | None) -> dict[str, Source]:
    """The datasets that a mixture may name."""
    datasets = recipe.datasets if recipe is not None else {}
    known = {name: _source(dataset, recipe, DocumentsSpec()) for name, dataset in datasets.items()}
    for name, part in spec.data.sources.items():
        whole = datasets.get(part.dataset or "")
        known[name] = Source() if whole is None else _source(whole, recipe, part.documents)
    return known


def _source(dataset: Dataset, recipe: RecipeSpec | None, band: DocumentsSpec) -> Source:
    """What is known of the part of a recipe's dataset that a band leaves."""
    found = Source(vision=isinstance(dataset, MediaTextDataset | VideoTextDataset))
    if dataset.longer == "split":
        return found
    # Where the codebook comes from a path, only the tokenizer there knows.
    codes = recipe.codebook.codes_per_frame if recipe and recipe.codebook else 0
    if isinstance(dataset, VideoTextDataset) and codes:
        frames = dataset.frames_per_clip
        why = f"{frames} frames x {codes + 1} tokens + {CAPTION_TOKENS} for the caption"
        found = replace(found, example_tokens=frames * (codes + 1) + CAPTION_TOKENS, why=why)
    if isinstance(dataset, LongQaDataset) and dataset.longer == "refuse":
        # They are filled up to it.
        longest = min(dataset.target_tokens, (band.max_tokens or dataset.target_tokens + 1) - 1)
        why = "up to its target_tokens, and the dataset says longer: refuse"
        found = replace(found, example_tokens=longest, why=why)
    if isinstance(dataset, NeedlesDataset):
        found = replace(found, example_tokens=dataset.make.tokens, why="its make.tokens")
    least = max(band.min_tokens or 0, dataset.documents.min_tokens or 0)
    if least > found.example_tokens:
        why = f"documents.min_tokens, and the dataset says longer: {dataset.longer}"
        found = replace(found, example_tokens=least, why=why)
    return found


def check_mixtures(checked: Checked[JobSpec], recipe: Checked[RecipeSpec] | None) -> None:
    """Report sources that are not there, that hold nothing, or that no row of a stage can hold.

    Args:
        checked: the validated job; problems go into its document.
        recipe: its data recipe, if it names one.
    """
    spec = checked.spec
    assert spec is not None
    if not checked.sound(("data",)) or (spec.data.recipe and (not recipe or not recipe.spec)):
        return
    if recipe is not None and recipe.spec is not None:
        if not recipe.sound(("datasets",)):
            return
        for name in spec.data.sources.keys() & recipe.spec.datasets.keys():
            checked.document.report(
                ("data", "sources", name),
                f"the recipe has a dataset of this name too ({recipe.document.file}); rename one",
            )
    datasets = recipe.spec.datasets if recipe is not None and recipe.spec is not None else {}
    for name, source in spec.data.sources.items():
        if source.dataset is not None and source.dataset not in datasets:
            there = f"there are {', '.join(datasets)}" if datasets else "the job names no recipe"
            checked.document.report(
                ("data", "sources", name, "dataset"),
                f"no such dataset in data.recipe; {there}",
                hint=nearest(source.dataset, datasets),
            )
        elif source.dataset is not None:
            _check_band(checked, name, source.documents, datasets[source.dataset])
    known = sources_of(spec, recipe.spec if recipe else None)
    for index, stage in enumerate(spec.stages):
        path: KeyPath = ("stages", index, "mixture")
        _check_mixture(checked, stage, path, known)


def _check_band(
    checked: Checked[JobSpec], name: str, band: DocumentsSpec, dataset: Dataset
) -> None:
    """A band leaves something of what the recipe has kept."""
    kept, path = dataset.documents, ("data", "sources", name, "documents")
    if kept.max_tokens is not None and (band.min_tokens or 0) >= kept.max_tokens:
        checked.document.report(
            (*path, "min_tokens"),
            f"nothing is left: the recipe keeps examples below {kept.max_tokens:,} tokens in this "
            "dataset (its documents.max_tokens); lower one, or raise the other",
        )
    if band.max_tokens is not None and band.max_tokens <= (kept.min_tokens or 0):
        checked.document.report(
            (*path, "max_tokens"),
            f"nothing is left: the recipe keeps examples from {kept.min_tokens:,} tokens on in "
            "this dataset (its documents.min_tokens); raise one, or lower the other",
        )


def _check_mixture(
    checked: Checked[JobSpec], stage: StageSpec, path: KeyPath, known: Mapping[str, Source]
) -> None:
    assert checked.spec is not None
    report = checked.document.report
    no_vision = checked.spec.model.vision.codebook_size == 0 and checked.sound(("model",))
    written = checked.document.value(path)
    for name in written if isinstance(written, dict) else ():
        source = known.get(name)
        if source is None:
            there = f"there are {', '.join(known)}" if known else "the job names none"
            report(
                (*path, name),
                f"no such dataset in data.recipe or data.sources; {there}",
                hint=nearest(name, known),
            )
            continue
        if source.vision and no_vision:
            report(
                ("model", "vision", "codebook_size"),
                f"a model without vision cannot train on the video of dataset {name} (stage "
                f"{stage.name}); leave the field out, or take {name} out of the mixture",
            )
        if source.example_tokens > stage.context_length and checked.sound(
            (*path[:-1], "context_length")
        ):
            fits = 1 << (source.example_tokens - 1).bit_length()
            report(
                (*path, name),
                f"an example of {name} needs {source.example_tokens:,} tokens ({source.why}) and "
                f"the context of stage {stage.name} has {stage.context_length:,}; raise "
                f"context_length to {format_tokens(fits)} or take {name} out of the mixture",
            )
