"""One file against its models: every problem at once, each in words, none in pydantic's.

Pydantic stops at the first layer that fails: cross-field rules of a stage are not run when one of
its fields is wrong. So the data is repaired and validated again, until nothing new is found; what
had to be replaced is remembered as broken, and later checks look only at what is sound.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ringworld_jobs import describe
from ringworld_jobs.document import Document
from ringworld_jobs.problem import KeyPath, kind_of, nearest
from ringworld_jobs.spec import JobSpec, Spec

T = TypeVar("T", bound=Spec)

MAX_ROUNDS = 8

# What stands in for a required value that is missing or wrong, so that the rest can be checked.
STAND_INS: dict[str, Any] = {
    "name": "x",
    "data": {},
    "model": "x",
    "evaluate": ["validation"],
    "prompts": "x",
    "stages": [{}],
    "context_length": 1024,
    "rope_theta": 1e4,
    "global_batch_tokens": 1024,
    "mixture": {"x": 1.0},
    "learning_rate": {"peak": 1.0},
    "peak": 1.0,
    "shards": "x",
    "tokenizer": {"path": "x"},
    "train": {"vocabulary_size": 300},
    "vocabulary_size": 300,
    "datasets": {"x": {"kind": "text", "files": ["x"]}},
    "files": ["x"],
    "videos": ["x"],
    "frames_per_clip": 1,
    "path": "x",
    "text": "x",
    "start": 0.0,
    "end": 1e9,
}

# Kept where they are wrong, so that the rule "one of them" still sees which are given.
LENGTHS = {"steps": 1, "tokens": 1}


@dataclass(frozen=True, slots=True)
class Checked(Generic[T]):
    """A file after validation.

    Attributes:
        document: the file; its problems now include the schema's.
        spec: the model; where something was broken, a repaired one. None: beyond repair.
        broken: paths whose value in the file is wrong or missing; ``spec`` holds a stand-in there.
    """

    document: Document
    spec: T | None
    broken: frozenset[KeyPath]

    def sound(self, *paths: KeyPath) -> bool:
        """Whether nothing at, above or below these paths is broken."""
        return not any(
            path[: len(wrong)] == wrong or wrong[: len(path)] == path
            for path in paths
            for wrong in self.broken
        )


def validate(model: type[T], document: Document) -> Checked[T]:
    """Validate a document's data and report every problem into the document.

    Args:
        model: the model of the whole file.
        document: the file, with `defaults` merged already where it is a job.
    """
    if document.data is None:
        return Checked(document, None, frozenset({()}))
    data = copy.deepcopy(document.data)
    broken: set[KeyPath] = set()
    _refuse_bools(model, document, data, broken)
    for _ in range(MAX_ROUNDS):
        try:
            spec = model.model_validate(data)
        except ValidationError as error:
            known = frozenset(broken)
            for path, details in _by_path(error, data).items():
                if not _inside(path, known):
                    _report(model, document, path, details)
                _repair(model, data, path, details[0]["type"], broken)
        else:
            return Checked(document, spec, frozenset(broken))
    return Checked(document, None, frozenset({()}))


def _by_path(error: ValidationError, data: Any) -> dict[KeyPath, list[ErrorDetails]]:
    """Group the errors by the place in the file: a union gives one for each alternative.

    Where a value may be a number or a mapping and is a mapping, what is wrong inside it is said,
    and not that it is no number.
    """
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(_file_path(detail, data), []).append(detail)
    return {
        path: details
        for path, details in grouped.items()
        if not any(len(other) > len(path) and other[: len(path)] == path for other in grouped)
    }


def _file_path(detail: ErrorDetails, data: Any) -> KeyPath:
    """Pydantic's location without the names that it gives to a union's alternatives."""
    path: list[str | int] = []
    node = data
    loc = detail["loc"]
    for index, part in enumerate(loc):
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif isinstance(node, dict) and detail["type"] == "missing" and index == len(loc) - 1:
            pass
        else:
            continue
        path.append(part)
    return tuple(path)


def _inside(path: KeyPath, broken: frozenset[KeyPath]) -> bool:
    return any(path[: len(wrong)] == wrong for wrong in broken)


def _refuse_bools(model: type[Spec], document: Document, data: Any, broken: set[KeyPath]) -> None:
    """Report true and false where a number is expected; pydantic would read them as 1 and 0."""
    for path in [p for p, value in _leaves(data, ()) if isinstance(value, bool)]:
        if not describe.takes_bool(model, path):
            quoting = _quoting(model, path, True)
            document.report(path, f"expected {describe.expects(model, path)}{quoting}")
            _repair(model, data, path, "bool", broken)


def _leaves(node: Any, path: KeyPath) -> list[tuple[KeyPath, Any]]:
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in _leaves(value, (*path, key))]
    if isinstance(node, list):
        return [leaf for i, value in enumerate(node) for leaf in _leaves(value, (*path, i))]
    return [(path, node)]


def _repair(model: type[Spec], data: Any, path: KeyPath, kind: str, broken: set[KeyPath]) -> None:
    """Take out or replace the value at ``path`` so that the rest can be validated."""
    if not path:
        return
    if kind == "value_error" and len(path) == 2 and path[0] == "stages":
        # The one rule over a whole stage: steps or tokens.
        stage = data["stages"][path[1]]
        stage.pop("tokens", None)
        stage["steps"] = 1
        broken |= {(*path, "steps"), (*path, "tokens")}
        return
    if isinstance(path[-1], int) and path[0] != "stages":
        path = path[:-1]  # an item of a list: the whole list goes
    parent = data
    for part in path[:-1]:
        try:
            parent = parent[part]
        except (KeyError, IndexError):
            return  # the part around it was taken out a moment ago
    key: Any = path[-1]
    if kind != "extra_forbidden":
        broken.add(path)
    if isinstance(parent, list):
        parent[key] = {}
    elif kind == "missing" and key == "kind":
        parent[key] = describe.choices_at(model, path)[0]
    elif kind == "missing":
        parent[key] = copy.deepcopy(STAND_INS.get(key))
    elif key in LENGTHS and kind != "extra_forbidden":
        parent[key] = LENGTHS[key]
    else:
        parent.pop(key, None)


def _report(
    model: type[Spec], document: Document, path: KeyPath, details: list[ErrorDetails]
) -> None:
    detail = details[0]
    value = document.value(path)
    match detail["type"]:
        case "extra_forbidden":
            message, hint = unknown_key(model, path)
            document.report(path, message, hint=hint)
        case "missing":
            expected = describe.expects(model, path)
            document.report(path, f"missing; it takes {expected}")
        # A mapping that may also be a word: what is wrong inside it is said.
        case "value_error" if len(details) == 1 or isinstance(value, dict):
            document.report(path, str(detail["ctx"]["error"]))
        case "union_tag_not_found":
            document.report((*path, "kind"), f"missing; write one of {_tags(detail)}")
        case "union_tag_invalid":
            document.report(
                (*path, "kind"),
                f"expected one of {_tags(detail)}",
                hint=nearest(str(document.value((*path, "kind"))), _tags(detail).split(", ")),
            )
        case "too_short" if "[key]" not in detail["loc"]:
            document.report(path, "empty; give at least one")
        case "string_too_short":
            document.report(path, "empty; write some text")
        case "finite_number":
            document.report(path, "expected a finite number")
        case "string_pattern_mismatch":
            document.report(
                path,
                "a name is a-z, 0-9, dot, dash and underscore, starts with a letter or digit, "
                "and has at most 63 characters",
                hint=_spell_name(str(path[-1] if "[key]" in detail["loc"] else value)),
            )
        case _:
            expected = describe.expects(model, path)
            hint = ""
            if isinstance(value, str):
                hint = nearest(value, describe.choices_at(model, path))
            got = f", got {kind_of(value)}" if isinstance(value, dict | list) else ""
            document.report(
                path,
                f"expected {expected}{got}{_quoting(model, path, value)}",
                hint="" if hint == expected else hint,
            )


def _tags(detail: ErrorDetails) -> str:
    return str(detail.get("ctx", {}).get("expected_tags", "")).replace("'", "")


def _quoting(model: type[Spec], path: KeyPath, value: Any) -> str:
    if isinstance(value, bool | int | float) and describe.takes_text(model, path):
        return "; put it in quotes if it is meant as text"
    return ""


def _spell_name(text: str) -> str:
    """The valid name closest to a refused one: "My Job" gives my-job."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in text.lower())
    return kept.strip("._-")[:63]


def unknown_key(model: type[Spec], path: KeyPath) -> tuple[str, str]:
    """The message and the hint for a key that its mapping does not take.

    Args:
        model: the model of the whole file.
        path: of the unknown key.
    """
    key = str(path[-1])
    valid = describe.names_at(model, path[:-1])
    if len(path) == 1 and model is JobSpec:
        valid.append("defaults")
    message = "unknown key" if len(path) > 1 else "unknown key at the top level"
    elsewhere = [place for name, place in describe.places(model) if name == key]
    if elsewhere:
        return f"{message}; {key} belongs {describe.join_or([_at(p) for p in elsewhere])}", ""
    hint = nearest(key, valid)
    if not hint:
        everywhere = {name: place for name, place in describe.places(model)}
        far = nearest(key, everywhere)
        if far:
            message += f"; is it {far}, which belongs {_at(everywhere[far])}?"
            return f"{message} This mapping takes {', '.join(valid)}", ""
        message += f"; it takes {', '.join(valid)}"
    return message, hint


def _at(place: str) -> str:
    if not place:
        return "at the top level"
    if place.startswith("stages[]"):
        return f"in {place} or {'defaults' + place.removeprefix('stages[]')}"
    return f"in {place}"
