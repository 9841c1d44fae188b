"""Is a manifest's JSON sound? Its types, its sizes, and whether its ranges cover every tensor once.

A manifest may come from anywhere, so nothing in it is used before it has passed: no number leads to
a read outside of an object, no shape to memory that no object fills, no name to another folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

DTYPES = {"float32": 4}
"""Bytes of an element, by the name of its type."""
_LIMIT = 2**62
_MAX_AXES = 16
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\Z")
_OBJECT = re.compile(r"(?!manifest\.)[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\Z")
_FOLDER = re.compile(r"[^/\\%\x00-\x1f\x7f.][^/\\%\x00-\x1f\x7f]{0,199}\Z")
_ROW = "[tensor, kind, start, numel, offset, length, dtype, checksums]"


def check_manifest(content: Mapping[str, Any], chunk_bytes: int) -> None:
    """Check everything but the version and the digest.

    Args:
        content: the parsed JSON.
        chunk_bytes: of a range, that one checksum is for.

    Raises:
        ValueError: says which value is wrong, and how.
        KeyError: a field is absent.
        TypeError: a value is of a type that has no such fields.
    """
    for name in ("run_uid", "parameter_digest"):
        _text(content[name], name)
    _folder(content["run_id"], "run_id")
    _whole(content["attempt"], "attempt")
    _whole(content["world_size"], "world_size")
    for name, value in _mapping(content["mesh"], "mesh").items():
        _whole(value, f"mesh.{name}")
    _check_optimizer(_mapping(content["optimizer"], "optimizer"))
    _check_state(_mapping(content["state"], "state"))
    sizes = _sizes(_mapping(content["tensors"], "tensors"))
    kinds = _names(content["kinds"], "kinds")
    if "param" not in kinds:
        _refuse("kinds has no param")
    dtypes = _names(content["dtypes"], "dtypes")
    for dtype in dtypes:
        if dtype not in DTYPES:
            _refuse(f"dtype {dtype} is unknown; there is {', '.join(DTYPES)}")
    spans: list[list[tuple[int, int]]] = [[] for _ in range(len(kinds) * len(sizes))]
    seen = set()
    for number, entry in enumerate(_list(content["objects"], "objects")):
        name = _mapping(entry, f"object {number}")["name"]
        if type(name) is not str or not _OBJECT.match(name) or name in seen:
            _refuse(f"object {number} is called {name!r:.100}, which is not a name of its own")
        seen.add(name)
        _check_object(entry, sizes, len(kinds), [DTYPES[d] for d in dtypes], chunk_bytes, spans)
    _check_cover(spans, list(sizes.items()), kinds)


def _check_object(
    entry: Mapping[str, Any],
    sizes: Mapping[str, int],
    num_kinds: int,
    widths: Sequence[int],
    chunk_bytes: int,
    spans: list[list[tuple[int, int]]],
) -> None:
    """Check one object's rows, and note in ``spans`` which elements they hold."""
    name, size = entry["name"], _whole(entry["size"], f"size of {entry['name']}")
    numels = list(sizes.values())
    places = []
    for row in _list(entry["ranges"], f"ranges of {name}"):
        if type(row) is not list or len(row) != 8 or type(row[7]) is not list:
            _refuse(f"a row of {name} is not {_ROW}: {row!r:.100}")
        for value in row[:7]:
            if type(value) is not int or not 0 <= value < _LIMIT:
                _refuse(f"a row of {name} has a value that is no size: {row[:7]!r:.200}")
        tensor, kind, start, numel, offset, length, dtype, sums = row
        if tensor >= len(numels) or kind >= num_kinds or dtype >= len(widths):
            _refuse(f"a row of {name} names what is in no table: {row[:7]}")
        if numel == 0 or start + numel > numels[tensor]:
            _refuse(f"a row of {name} goes past its tensor's {numels[tensor]} elements: {row[:7]}")
        if length != numel * widths[dtype] or offset % widths[dtype] or offset + length > size:
            _refuse(f"a row of {name} does not fit into its {size} bytes: {row[:7]}")
        if len(sums) != -(-length // chunk_bytes):
            _refuse(f"a row of {name} has {len(sums)} checksums for {length} bytes")
        for value in sums:
            if type(value) is not int or not 0 <= value < 2**32:
                _refuse(f"a row of {name} has a checksum that is none: {value!r:.100}")
        places.append((offset, offset + length))
        spans[kind * len(numels) + tensor].append((start, start + numel))
    places.sort()
    for (_, end), (begin, _) in zip(places, places[1:], strict=False):
        if begin < end:
            _refuse(f"ranges of {name} overlap at byte {begin}")


def _check_cover(
    spans: list[list[tuple[int, int]]], sizes: Sequence[tuple[str, int]], kinds: Sequence[str]
) -> None:
    """Every kind has each element of every tensor once."""
    for place, found in enumerate(spans):
        kind, (name, numel) = kinds[place // len(sizes)], sizes[place % len(sizes)]
        position = 0
        for start, stop in sorted(found):
            if start != position:
                break
            position = stop
        if position != numel:
            _refuse(f"{kind} of {name} is not covered once: a gap or overlap at element {position}")


def _check_optimizer(optimizer: Mapping[str, Any]) -> None:
    _text(optimizer["name"], "optimizer.name")
    _whole(optimizer["step"], "optimizer.step")
    for group in _list(optimizer["groups"], "optimizer.groups"):
        fields = _mapping(group, "a group of the optimizer")
        _text(fields["name"], "a group's name")
        for name in ("learning_rate", "weight_decay"):
            _number(fields[name], f"{name} of a group")


def _check_state(state: Mapping[str, Any]) -> None:
    _folder(state["stage"], "state.stage")
    for name in ("stage_index", "step", "tokens", "cursor"):
        _whole(state[name], f"state.{name}")
    _number(state["learning_rate"], "state.learning_rate")
    _text(state["spec_digest"], "state.spec_digest")
    for name, value in _mapping(state["metrics"], "state.metrics").items():
        _number(value, f"state.metrics.{name}")
    if type(state["final"]) is not bool:
        _refuse("state.final is neither true nor false")


def _sizes(tensors: Mapping[str, Any]) -> dict[str, int]:
    """Elements of each tensor, in the order of the names, which is that of their numbers."""
    sizes = {}
    for name in sorted(tensors):
        shape = _list(tensors[name], f"shape of {name!r:.100}")
        if not name or len(name) > 500 or not name.isprintable():
            _refuse(f"{name!r:.100} is no name of a tensor")
        if len(shape) > _MAX_AXES:
            _refuse(f"{name} has {len(shape)} axes; there are at most {_MAX_AXES}")
        sizes[name] = math.prod(_whole(axis, f"an axis of {name}") for axis in shape)
        if sizes[name] >= _LIMIT:
            _refuse(f"{name} has {sizes[name]} elements")
    return sizes


def _names(value: Any, name: str) -> list[str]:
    found = _list(value, name)
    for entry in found:
        if type(entry) is not str or not _NAME.match(entry):
            _refuse(f"{name} has {entry!r:.100}, which is no name")
    if len(set(found)) != len(found):
        _refuse(f"{name} has a name twice")
    return found


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if type(value) is not dict:
        _refuse(f"{name:.100} is no mapping: {value!r:.100}")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if type(value) is not list:
        _refuse(f"{name:.100} is no list: {value!r:.100}")
    return value


def _text(value: Any, name: str) -> None:
    if type(value) is not str or len(value) > 1000:
        _refuse(f"{name} is no text: {value!r:.100}")


def _folder(value: Any, name: str) -> None:
    """A folder is called so: that of the stage, and where a copy goes that of the run."""
    if type(value) is not str or not _FOLDER.match(value):
        _refuse(f"{name} is {value!r:.100}, which is no folder's name")


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        _refuse(f"{name:.200} is no size: {value!r:.100}")
    return value


def _number(value: Any, name: str) -> None:
    if type(value) not in (int, float) or not abs(value) < _LIMIT:
        _refuse(f"{name:.200} is no number: {value!r:.100}")


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)
