"""The chain of stages: what each inherits, and what fields must agree on across the job.

A stage takes from ``defaults`` what it does not say itself, key by key through nested mappings.
Three things are taken whole: a stage's `mixture` replaces that of `defaults`, and `steps` and
`tokens` replace each other. From the stage before it inherits only weights (and, with
``optimizer_state: inherit``, optimizer moments), never settings.
"""

from __future__ import annotations

import copy
from typing import Any

from ringworld_jobs.check_evaluate import check_evaluations
from ringworld_jobs.document import Document
from ringworld_jobs.memory import check_memory
from ringworld_jobs.mesh import MeshError, resolve_mesh
from ringworld_jobs.problem import NO_VALUE, KeyPath, kind_of, nearest
from ringworld_jobs.recipe import RecipeSpec
from ringworld_jobs.sources import check_mixtures
from ringworld_jobs.spec import JobSpec, SequenceParallelSpec, StageSpec
from ringworld_jobs.units import format_tokens
from ringworld_jobs.validate import Checked
from ringworld_model.config import PRESETS, check_head_split

TAKEN_WHOLE = frozenset({"mixture"})
EITHER_OR = {"steps": "tokens", "tokens": "steps"}


def merge_defaults(document: Document) -> None:
    """Merge the file's `defaults` into each of its stages, and take the block out.

    ``document.sources`` then tells for every merged value where in `defaults` it was written.
    """
    data = document.data
    if not isinstance(data, dict) or "defaults" not in data:
        return
    defaults = data["defaults"]
    stages = data.get("stages")
    if defaults is None or isinstance(defaults, dict):
        for index, stage in enumerate(stages if isinstance(stages, list) else []):
            if isinstance(stage, dict):
                _merge(document, stage, defaults or {}, ("stages", index), ("defaults",))
    else:
        document.report(
            ("defaults",), f"expected a mapping of stage fields, got {kind_of(defaults)}"
        )
    document.data = {key: value for key, value in data.items() if key != "defaults"}


def _merge(
    document: Document,
    target: dict[str, Any],
    defaults: dict[str, Any],
    path: KeyPath,
    origin: KeyPath,
) -> None:
    written = set(target)
    for key, value in defaults.items():
        if EITHER_OR.get(key) in written:
            continue
        if key not in target:
            target[key] = copy.deepcopy(value)
            document.sources[(*path, key)] = (*origin, key)
        elif key not in TAKEN_WHOLE and isinstance(target[key], dict) and isinstance(value, dict):
            _merge(document, target[key], value, (*path, key), (*origin, key))


def check_curriculum(checked: Checked[JobSpec], recipe: Checked[RecipeSpec] | None) -> None:
    """Report what no field can know alone; looks only at parts that are sound by themselves.

    Args:
        checked: the validated job; problems go into its document.
        recipe: its data recipe, validated; None where the job names none or it was not found.
    """
    if checked.spec is None:
        return
    possible = _check_model(checked, recipe)
    _check_names(checked)
    _check_first(checked)
    check_mixtures(checked, recipe)
    for index, stage in enumerate(checked.spec.stages):
        here: KeyPath = ("stages", index)
        _check_batch(checked, stage, here)
        if possible:
            _check_heads(checked, stage, here)
        _check_learning_rate(checked, stage, here)
        _check_loss(checked, stage, here)
        _check_precision(checked, stage, here)
        check_memory(checked, stage, here)
        if checked.sound((*here, "context_length")):
            place = (*here, "evaluate")
            check_evaluations(checked, stage.evaluate, stage.context_length, place)


def _check_model(checked: Checked[JobSpec], recipe: Checked[RecipeSpec] | None) -> bool:
    """Whether the model's shape is known and possible."""
    assert checked.spec is not None
    model, report = checked.spec.model, checked.document.report
    if not checked.sound(("model",)):
        return False
    if model.preset not in PRESETS:
        report(
            ("model", "preset"),
            f"no such preset; there are {', '.join(PRESETS)}",
            hint=nearest(model.preset, PRESETS),
        )
        return False
    try:
        model.config()
    except ValueError as error:
        name = str(error).partition("=")[0].removeprefix("model.")
        report(("model", name) if name in type(model).model_fields else ("model",), str(error))
        return False
    if recipe is None or recipe.spec is None:
        return True
    training = recipe.spec.tokenizer.train
    size = model.text_vocab_size
    if training and size is not None and size < training.vocabulary_size:
        if recipe.sound(("tokenizer",)):
            report(
                ("model", "text_vocab_size"),
                f"the recipe's tokenizer has {training.vocabulary_size} pieces "
                f"({recipe.document.file}); give at least as many rows, or leave the field out",
            )
    codebook = recipe.spec.codebook
    codes = model.vision.codebook_size
    known = codebook is not None and not codebook.path and recipe.sound(("codebook",))
    if codebook and known and codes and codes < codebook.codebook_size:
        report(
            ("model", "vision", "codebook_size"),
            f"the recipe's codebook has {codebook.codebook_size} codes ({recipe.document.file}); "
            f"give at least as many, or leave the field out",
        )
    return True


def _check_names(checked: Checked[JobSpec]) -> None:
    assert checked.spec is not None
    first: dict[str, int] = {}
    for index, stage in enumerate(checked.spec.stages):
        path: KeyPath = ("stages", index, "name")
        if not checked.sound(path):
            continue
        if stage.name in first:
            checked.document.report(
                path, f"stages[{first[stage.name]}] has this name too; stage names are unique"
            )
        first.setdefault(stage.name, index)


def _check_first(checked: Checked[JobSpec]) -> None:
    """The first stage inherits an optimizer's state only from another run."""
    assert checked.spec is not None
    path: KeyPath = ("stages", 0, "optimizer_state")
    if checked.spec.stages[0].optimizer_state == "fresh":
        return
    source = checked.spec.model.init_from
    if not checked.sound(path, ("model", "init_from")) or (source or "").startswith("run:"):
        return
    kind = (source or "").partition(":")[0]
    given = f"{kind}: holds weights only" if source else "model.init_from names no run"
    checked.document.report(
        path,
        f"the first stage has none before it to inherit from, and {given}; write optimizer_state: "
        "fresh in this stage, or start from a run: model.init_from: run:RUN",
    )


def _check_batch(checked: Checked[JobSpec], stage: StageSpec, here: KeyPath) -> None:
    assert checked.spec is not None
    context, batch = stage.context_length, stage.global_batch_tokens
    if not checked.sound((*here, "context_length"), (*here, "global_batch_tokens")):
        return
    if batch % context:
        options = [format_tokens(n * context) for n in (batch // context, batch // context + 1)]
        checked.document.report(
            (*here, "global_batch_tokens"),
            f"{batch:,} tokens are not a whole number of rows of {context:,} (context_length "
            f"{format_tokens(context)}); write {' or '.join(options[batch < context :])}",
        )
        return
    fields = [(*here, "mesh"), (*here, "micro_batch_size"), ("resources",)]
    if checked.sound(*fields):
        try:
            resolve_mesh(stage, checked.spec.resources)
        except MeshError as error:
            checked.document.report((*here, *error.field.split(".")), str(error))


def _check_heads(checked: Checked[JobSpec], stage: StageSpec, here: KeyPath) -> None:
    assert checked.spec is not None
    asked, path = stage.mesh.sequence_parallel, (*here, "mesh", "sequence_parallel")
    if not isinstance(asked, SequenceParallelSpec) or not checked.sound(path):
        return
    model = checked.spec.model.config()
    try:
        check_head_split(model.num_heads, model.num_kv_heads, asked.heads)
    except ValueError as error:
        checked.document.report((*path, "heads"), str(error))


def _check_learning_rate(checked: Checked[JobSpec], stage: StageSpec, here: KeyPath) -> None:
    rate, path = stage.learning_rate, (*here, "learning_rate")
    if not checked.sound(path):
        return
    if rate.schedule == "constant" and rate.final > 0 and not _overrules(checked.document, path):
        checked.document.report(
            (*path, "final"),
            "a constant schedule keeps its peak and never comes to final; write schedule: cosine, "
            "or take final out",
        )
    if rate.schedule == "cosine" and rate.final > rate.peak:
        checked.document.report(
            (*path, "final"),
            f"a cosine falls from peak {rate.peak:g} to final, which is higher; lower final to "
            f"{rate.peak:g} or less",
        )
    length = [(*here, name) for name in ("steps", "tokens", "context_length")]
    length.append((*here, "global_batch_tokens"))
    if checked.sound(*length) and rate.warmup_steps > stage.num_steps:
        checked.document.report(
            (*path, "warmup_steps"),
            f"stage {stage.name} has only {stage.num_steps} step"
            f"{'s' if stage.num_steps > 1 else ''}; lower warmup_steps or lengthen the stage",
        )


def _overrules(document: Document, rate: KeyPath) -> bool:
    """Whether a stage's own schedule stands over a `final` that `defaults` wrote for a cosine."""
    own = document.value((*rate, "schedule")) is not NO_VALUE
    own = own and document.origin((*rate, "schedule"))[0] != "defaults"
    return own and document.origin((*rate, "final"))[0] == "defaults"


def _check_loss(checked: Checked[JobSpec], stage: StageSpec, here: KeyPath) -> None:
    if checked.sound((*here, "loss")) and stage.loss.text == stage.loss.vision == 0:
        checked.document.report(
            (*here, "loss"), "text and vision both weigh 0, so nothing is learned; raise one"
        )


def _check_precision(checked: Checked[JobSpec], stage: StageSpec, here: KeyPath) -> None:
    if not checked.sound((*here, "precision"), (*here, "zero_stage")):
        return
    if stage.precision == "bf16" and stage.zero_stage == 0:
        checked.document.report(
            (*here, "zero_stage"),
            "bf16 keeps its fp32 master weights in ZeRO's optimizer, and zero_stage 0 has none; "
            "write zero_stage 1 (or 2, 3), or precision fp32",
        )
