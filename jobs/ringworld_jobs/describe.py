"""The spec models in words: which names a mapping takes, and what a field expects.

Messages and the generated reference page read the same descriptions from the models themselves, so
that neither can fall behind.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, BeforeValidator, PlainSerializer, TypeAdapter
from pydantic.fields import FieldInfo

from ringworld_jobs import units
from ringworld_jobs.problem import KeyPath

Models = tuple[type[BaseModel], ...]

_UNITS = {
    units.parse_count: "a count such as 4096, 4Ki or 4.8B",
    units.parse_context_length: "a binary length such as 4Ki, 32Ki or 1Mi",
    units.parse_seconds: "a duration such as 90s or 15min",
    units.parse_interval: "an interval such as 15min or 20 steps",
}


def annotations_at(root: type[BaseModel], path: KeyPath) -> list[Any]:
    """The types that the value at ``path`` may have; empty where the path leads nowhere.

    Args:
        root: model of the whole file.
        path: keys and indices from the top of the file.
    """
    found: list[Any] = [root]
    for part in path:
        found = [inner for annotation in found for inner in _step(annotation, part)]
    return found


def _step(annotation: Any, part: str | int) -> Iterator[Any]:
    for plain in alternatives(annotation):
        origin, args = get_origin(plain), get_args(plain)
        if isinstance(plain, type) and issubclass(plain, BaseModel):
            if part in plain.model_fields:
                yield annotation_of(plain.model_fields[str(part)])
        elif origin is list and isinstance(part, int):
            yield args[0]
        elif origin is tuple and isinstance(part, int):
            yield args[min(part, len(args) - 1)]
        elif origin is dict:
            yield args[1]


def alternatives(annotation: Any) -> Iterator[Any]:
    """The plain types of an annotation: Annotated taken off, unions spread."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from alternatives(args[0])
    elif origin in (Union, types.UnionType):
        for arg in args:
            yield from alternatives(arg)
    else:
        yield annotation


def annotation_of(info: FieldInfo) -> Any:
    """A field's annotation together with the limits that pydantic keeps apart from it."""
    if not info.metadata:
        return info.annotation
    return Annotated[info.annotation, *info.metadata]


def spelled_default(info: FieldInfo) -> Any:
    """A field's default as a spec would write it: ``300s`` rather than 300.0."""
    if any(isinstance(limit, PlainSerializer) for limit in info.metadata):
        return TypeAdapter(annotation_of(info)).dump_python(info.default, mode="json")
    return info.default


def models_at(root: type[BaseModel], path: KeyPath) -> Models:
    """The models that the mapping at ``path`` may be."""
    return tuple(
        plain
        for annotation in annotations_at(root, path)
        for plain in alternatives(annotation)
        if isinstance(plain, type) and issubclass(plain, BaseModel)
    )


def names_at(root: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys that the mapping at ``path`` takes; empty where it takes any."""
    return list(dict.fromkeys(name for m in models_at(root, path) for name in m.model_fields))


def choices_at(root: type[BaseModel], path: KeyPath) -> list[str]:
    """The words that the field at ``path`` takes, such as auto, fp32 or bf16."""
    return [
        str(choice)
        for annotation in annotations_at(root, path)
        for plain in alternatives(annotation)
        if get_origin(plain) is Literal
        for choice in get_args(plain)
    ]


def takes_bool(root: type[BaseModel], path: KeyPath) -> bool:
    """Whether true or false is a value for the field at ``path``, or nothing is known of it."""
    plain = [p for a in annotations_at(root, path) for p in alternatives(a)]
    return not plain or bool in plain


def takes_text(root: type[BaseModel], path: KeyPath) -> bool:
    """Whether the field at ``path`` takes any text."""
    return str in [p for a in annotations_at(root, path) for p in alternatives(a)]


def places(root: type[BaseModel], prefix: str = "", seen: Models = ()) -> Iterator[tuple[str, str]]:
    """Every field of every model below ``root``, as (name, readable place of its mapping)."""
    if root in seen:
        return
    for name, info in root.model_fields.items():
        yield name, prefix
        below = f"{prefix}.{name}" if prefix else name
        yield from _below(info.annotation, below, (*seen, root))


def _below(annotation: Any, place: str, seen: Models) -> Iterator[tuple[str, str]]:
    for plain in alternatives(annotation):
        origin, args = get_origin(plain), get_args(plain)
        if origin is list:
            yield from _below(args[0], place + "[]", seen)
        elif origin is dict:
            yield from _below(args[1], place + ".<name>", seen)
        elif isinstance(plain, type) and issubclass(plain, BaseModel):
            yield from places(plain, place, seen)


def expects(root: type[BaseModel], path: KeyPath) -> str:
    """What the field at ``path`` takes, in words; empty where the path leads nowhere."""
    return join_or([describe(annotation) for annotation in annotations_at(root, path)])


def describe(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """A type in words, such as "a whole number of at least 1, or auto" for Size | Auto."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(args[0], (*args[1:], *limits))
    for limit in limits:
        if isinstance(limit, BeforeValidator) and limit.func in _UNITS:
            return _UNITS[limit.func]
    if origin in (Union, types.UnionType):
        return join_or([describe(arg, limits) for arg in args if arg is not type(None)])
    if origin is Literal:
        return join_or([str(choice) for choice in args])
    if origin is list:
        return f"a list of {_plural(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)} numbers, each {describe(args[0])}"
    if origin is dict:
        return f"a mapping of names to {_plural(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        names = list(annotation.model_fields)
        return "a mapping of " + ", ".join(names[:5] + ["..."] * (len(names) > 5))
    return _with_limits({int: "a whole number", float: "a number", str: "text"}, annotation, limits)


def _with_limits(words: dict[Any, str], annotation: Any, limits: Sequence[Any]) -> str:
    if annotation is bool:
        return "true or false"
    text = words.get(annotation, str(annotation))
    bounds = []
    for limit in _flat(limits):
        if isinstance(limit, annotated_types.Ge):
            bounds.append(f"of at least {limit.ge}")
        elif isinstance(limit, annotated_types.Gt):
            bounds.append(f"above {limit.gt}")
        elif isinstance(limit, annotated_types.Le):
            bounds.append(f"of at most {limit.le}")
        elif isinstance(limit, annotated_types.Lt):
            bounds.append(f"below {limit.lt}")
        elif getattr(limit, "pattern", None):
            return "a name (a-z, 0-9, dot, dash, underscore; it starts with a letter or digit)"
    return f"{text} {' and '.join(bounds)}" if bounds else text


def _flat(limits: Sequence[Any]) -> Iterator[Any]:
    for limit in limits:
        yield from _flat(limit.metadata) if isinstance(limit, FieldInfo) else [limit]


def _plural(annotation: Any) -> str:
    parts = [p for p in alternatives(annotation) if p is not type(None)]
    if all(isinstance(p, type) and issubclass(p, BaseModel) for p in parts):
        return "mappings"
    if all(get_origin(p) is Literal for p in parts):
        return describe(annotation)
    words = {str: "texts", int: "whole numbers", float: "numbers"}
    return words.get(parts[0], describe(annotation))


def join_or(choices: Sequence[str]) -> str:
    """Write choices as a sentence would: "a, b or c"."""
    unique = list(dict.fromkeys(choice for choice in choices if choice))
    if len(unique) < 2:
        return "".join(unique)
    comma = "," if " " in unique[-2] else ""
    return f"{', '.join(unique[:-1])}{comma} or {unique[-1]}"
