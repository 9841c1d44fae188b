"""`model.init_from`: are the weights there, and are they of this model? Reads no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ringworld_jobs.files import siblings
from ringworld_jobs.problem import nearest
from ringworld_jobs.run_place import CheckpointPlace, FindRun, check_place, checkpoint_place
from ringworld_jobs.spec import JobSpec, ModelSpec, RopeScalingSpec
from ringworld_jobs.store_url import UnsafeUrl
from ringworld_jobs.validate import Checked
from ringworld_model.config import CONFIG_FIELDS, PRESETS, SPARE_VISION_IDS, ModelConfig
from ringworld_model.hf_config import WeightsError, read_config
from ringworld_model.hf_layout import Shape, is_vision, parameter_shapes, weight_files
from ringworld_model.lwm_file import find_file, read_index
from ringworld_model.lwm_layout import places, table_sizes

KINDS = {
    "hf": "a Llama-family checkpoint in Hugging Face's layout",
    "lwm": "a parameter file of the Large World Model's JAX release",
    "run": "a checkpoint of another run, RUN[/STAGE[/STEP]]",
}
# What a folder's config.json settles. Of these, the spec may overrule those that shape no tensor.
_SETTLED = tuple(
    name
    for name in CONFIG_FIELDS
    if name not in ("vision_codebook_size", "tie_vision_embeddings", "rope_form", "init_std")
)
_OVERRULED = frozenset({"norm_eps", "rope_scaling"})
_SCALING_FIELDS = tuple(RopeScalingSpec.model_fields)
_MOST_SHOWN = 3
# Whose vision table a model gets that is like no preset: that of LWM's codebook.
_OTHER_PRESET = "llama2-7b"


@dataclass(frozen=True, slots=True)
class Source:
    """Where weights come from: ``hf:/models/llama`` is ("hf", "/models/llama").

    Attributes:
        kind: hf, lwm or run.
        place: a path, or what names a run's checkpoint.
    """

    kind: str
    place: str

    @property
    def path(self) -> Path:
        """The folder or file; not for a run."""
        return Path(self.place)

    @property
    def checkpoint(self) -> CheckpointPlace | None:
        """The run's checkpoint; None where the place is none, or is not resolved yet."""
        return checkpoint_place(self.place) if self.kind == "run" else None

    def __str__(self) -> str:
        """As the spec has it."""
        return f"{self.kind}:{self.place}"


def parse_init_from(text: str) -> Source:
    """Take `model.init_from` apart.

    Raises:
        ValueError: no such kind, or no path.
    """
    kind, separator, place = text.partition(":")
    if not separator or kind not in KINDS or not place:
        known = ", or ".join(
            f"{name}:{'PLACE' if name == 'run' else 'PATH'} for {what}"
            for name, what in KINDS.items()
        )
        raise ValueError(f"expected {known}")
    if kind == "run":
        check_place(place)
    return Source(kind, place)


def with_weights(
    checked: Checked[JobSpec],
    base: Path,
    *,
    check_files: bool,
    find_run: FindRun | None = None,
) -> Checked[JobSpec]:
    """Check the weights that a job starts from, and take from them what the spec leaves open.

    The spec that comes back names an absolute path, or one checkpoint of a run, and the shape in
    full, so that it means the same when it is loaded again, whether or not the weights are still
    there.

    Args:
        checked: the validated job; problems go into its document.
        base: folder that a relative path starts from.
        check_files: look at the weights; they are looked at anyway where nothing else gives the
            model's shape.
        find_run: looks for a run's checkpoint; without it, or where it does not ask the store,
            ``run:PLACE`` stays as it is.
    """
    spec, path = checked.spec, ("model", "init_from")
    if spec is None or spec.model.init_from is None or not checked.sound(("model",)):
        return checked
    report = checked.document.report
    try:
        source = parse_init_from(spec.model.init_from)
    except ValueError as error:
        kinds = [f"{kind}:" for kind in KINDS]
        kind = spec.model.init_from.partition(":")[0] + ":"
        hint = "" if kind in kinds else nearest(kind, kinds)
        report(path, str(error), hint=hint, secret=isinstance(error, UnsafeUrl))
        return checked
    has_preset = "preset" in spec.model.model_fields_set
    near, model = "", spec.model
    try:
        if source.kind == "run":
            if check_files or not has_preset:
                model = _settled_by_run(spec, source, find_run)
        else:
            source = replace(source, place=str((base / source.path).resolve()))
            near = "" if source.path.exists() else siblings(source.path)
            model = model.model_copy(update={"init_from": str(source)})
            if check_files or not has_preset:
                model = _settled(model, source, has_preset)
    except WeightsError as error:
        report(path, f"{error}{near}")
    except (KeyError, ValueError):
        return checked  # what is wrong with the shape by itself is said of the shape
    return replace(checked, spec=spec.model_copy(update={"model": model}))


def _settled(model: ModelSpec, source: Source, has_preset: bool) -> ModelSpec:
    """The model with its shape in full, where the weights are of that shape.

    Raises:
        WeightsError: they are not, or they cannot be used.
    """
    if source.kind == "lwm":
        return _settled_by_file(model, source.path, has_preset)
    held = read_config(source.path).config
    weight_files(source.path)
    written = {name for name in CONFIG_FIELDS if getattr(model, name, None) is not None}
    if not has_preset:
        model = model.model_copy(update={"preset": _like(held)})
        model = _filled(model, held, set(CONFIG_FIELDS) - written)
    config = model.config(text_vocab_size=held.text_vocab_size)
    codes, held_codes = model.vision.codebook_size, held.vision_codebook_size
    other = [
        f"{name} is {_shown(getattr(held, name))} there and {_shown(getattr(config, name))} here"
        for name in _SETTLED
        if getattr(held, name) != getattr(config, name)
        and not (name in _OVERRULED and name in written)
    ]
    if held_codes and codes and codes != held_codes:
        other.append(f"vision.codebook_size is {held_codes} there and {codes} here")
    if other:
        remedy = (
            f"leave preset out to take the folder's shape, or give the folder of a {model.preset}; "
            "norm_eps and rope_scaling may be written, and then overrule the folder's"
            if has_preset
            else "leave these fields out"
        )
        raise WeightsError(f"{source.path} holds another model: {'; '.join(other)}; {remedy}")
    return _with_codes(_filled(model, config, set(_SETTLED)), held_codes)


def _settled_by_file(model: ModelSpec, path: Path, has_preset: bool) -> ModelSpec:
    if not has_preset:
        raise WeightsError(
            "the file does not say the model's shape; write model.preset too, such as 7b"
        )
    file = find_file(path)
    index = read_index(file)
    rows, codes = table_sizes(index)
    model = _with_codes(model, codes)
    config = model.config(text_vocab_size=rows)
    places(config, index, file)
    return _filled(model, config, set(_SETTLED))


def settle_run(spec: JobSpec, find_run: FindRun) -> JobSpec:
    """A job's spec with the one checkpoint that its `init_from: run:...` means, and its shape.

    Args:
        spec: any; one that starts from no run, or from a checkpoint that is settled, stays.
        find_run: looks for the checkpoint.

    Raises:
        WeightsError: there is no such checkpoint, or it is of another model or optimizer.
        ValueError: what is written can name none.
    """
    source = parse_init_from(spec.model.init_from) if spec.model.init_from else None
    if source is None or source.kind != "run" or source.checkpoint is not None:
        return spec
    return spec.model_copy(update={"model": _settled_by_run(spec, source, find_run)})


def _settled_by_run(spec: JobSpec, source: Source, find_run: FindRun | None) -> ModelSpec:
    """The model with its shape in full and the checkpoint's lasting name.

    Raises:
        WeightsError: there is no such checkpoint, or it is of another model or optimizer.
    """
    model, has_preset = spec.model, "preset" in spec.model.model_fields_set
    found = find_run(source.place, spec.checkpoint.store) if find_run is not None else None
    if found is None:
        if has_preset:
            return model
        raise WeightsError(
            "the model's shape is the run's, and nothing was asked for it here; write model.preset "
            "and what differs from it too, or start the job: `run` and `submit` ask the store"
        )
    model = model.model_copy(update={"init_from": f"run:{found.place}"})
    rows, codes = table_rows(found.tensors)
    held = None
    if found.model is not None:
        held = found.model.config(text_vocab_size=rows, codebook_size=codes)
    if not has_preset:
        if held is None or found.model is None:
            raise WeightsError(
                f"{found.place.run_url} holds no spec.yaml that would give the model's shape; "
                "write model.preset and what differs from it too"
            )
        written = {name for name in CONFIG_FIELDS if getattr(model, name, None) is not None}
        model = model.model_copy(update={"preset": found.model.preset})
        model = _filled(model, held, set(CONFIG_FIELDS) - written)
    if model.vision.codebook_size is None:
        vision = model.vision.model_copy(update={"codebook_size": codes})
        model = model.model_copy(update={"vision": vision})
    config = model.config(text_vocab_size=rows)
    if other := different_shapes(parameter_shapes(config), found.tensors):
        raise WeightsError(f"{found.place} is of another model: {other}")
    if held is not None and (other := _differences(held, config, spec.model)):
        raise WeightsError(f"{found.place} is of another model: {other}")
    if spec.stages[0].optimizer_state == "inherit" and found.optimizer != spec.optimizer.name:
        raise WeightsError(
            f"{found.place} has the state of {found.optimizer}, and stages[0].optimizer_state: "
            f"inherit wants that of {spec.optimizer.name}; write optimizer_state: fresh, or "
            f"optimizer.name: {found.optimizer}"
        )
    return _filled(model, config, set(CONFIG_FIELDS))


def table_rows(tensors: Mapping[str, Shape]) -> tuple[int | None, int]:
    """Rows of a checkpoint's text table (None: it has none), and codes of its vision table."""
    text, vision = tensors.get("text_embed.weight"), tensors.get("vision_embed.weight")
    return text[0] if text else None, vision[0] - SPARE_VISION_IDS if vision else 0


def different_shapes(wanted: Mapping[str, Shape], held: Mapping[str, Shape]) -> str:
    """Where two sets of parameters differ, in words; empty where they are the same."""
    other = [
        f"{name} is {list(held[name])} there and {list(shape)} here"
        for name, shape in wanted.items()
        if name in held and tuple(held[name]) != tuple(shape)
    ]
    missing = [name for name in wanted if name not in held]
    other += [f"{name} is not there" for name in missing]
    other += [f"{name} is there only" for name in held if name not in wanted]
    more = f"; and {len(other) - _MOST_SHOWN} more" if len(other) > _MOST_SHOWN else ""
    drawn = any(is_vision(name) for name in missing)
    remedy = "; to have vision tables drawn, export the run and start from hf:FOLDER" * drawn
    return "; ".join(other[:_MOST_SHOWN]) + more + remedy


def _differences(held: ModelConfig, config: ModelConfig, written: ModelSpec) -> str:
    """What the tensors' shapes do not show, and what makes another model of them all the same."""
    names = ("num_heads", "num_kv_heads", "head_dim", "rope_form", "norm_eps", "rope_scaling")
    return "; ".join(
        f"{name} is {_shown(getattr(held, name))} there and {_shown(getattr(config, name))} here"
        for name in names
        if getattr(held, name) != getattr(config, name)
        and not (name in _OVERRULED and getattr(written, name) is not None)
    )


def _with_codes(model: ModelSpec, codebook_size: int | None) -> ModelSpec:
    """The model with the vision table that the weights have, where the spec leaves it open."""
    if not codebook_size or model.vision.codebook_size is not None:
        return model
    vision = model.vision.model_copy(update={"codebook_size": codebook_size})
    return model.model_copy(update={"vision": vision})


def _filled(model: ModelSpec, config: ModelConfig, names: set[str]) -> ModelSpec:
    """The model with these fields written out."""
    update: dict[str, Any] = {
        name: getattr(config, name) for name in names - {"vision_codebook_size", "rope_scaling"}
    }
    if "rope_scaling" in names:
        scaling = config.rope_scaling
        update["rope_scaling"] = (
            "none"
            if scaling is None
            else RopeScalingSpec(**{name: getattr(scaling, name) for name in _SCALING_FIELDS})
        )
    return model.model_copy(update=update)


def _like(config: ModelConfig) -> str:
    """The preset of these sizes; another's name where there is none: every field is written out."""
    sizes = ("hidden_size", "ffn_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in reversed(PRESETS):
        if all(getattr(PRESETS[name], size) == getattr(config, size) for size in sizes):
            return name
    return _OTHER_PRESET


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
