"""YAML read with the line of every key and value, and without YAML 1.1's surprises.

Values are plain: text, numbers, true and false, lists and mappings with text keys. ``off``, ``on``,
``yes`` and ``no`` are text, ``1e6`` is a number, ``010`` is ten, ``1:30`` and dates are text.
A key given twice is a problem, and so is a tag that would build an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ringworld_jobs.problem import (
    NO_VALUE,
    KeyPath,
    Problem,
    format_path,
    format_value,
    nearest,
)

MAX_VALUES = 20_000
"""A job spec has hundreds of values; aliases of aliases can make billions of them."""

MAX_NEIGHBOURS = 8
"""Files of a folder that a message names."""

LONGEST_NUMBER = 300
"""Characters; a longer scalar is text, whatever it looks like."""

# What PyYAML calls the parts of a file, in the words of its reader.
_TOKENS = {
    "scalar": "a value",
    "block end": "the end of the block",
    "block mapping start": "an indented mapping",
    "block sequence start": "an indented list",
    "block entry": "'- '",
    "stream end": "the end of the file",
    "document start": "'---'",
    "document end": "'...'",
    "alias": "an alias (*name)",
    "anchor": "an anchor (&name)",
    "tag": "a tag (!name)",
    "key": "'key'",
    "value": "':'",
}
_PARSER_WORDS = re.compile(rf"'?<({'|'.join(_TOKENS)})>'?")

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_FORMS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "merge": r"<<",
}
RESOLVERS = {None: [(_TAG + kind, re.compile(f"(?:{form})$")) for kind, form in _FORMS.items()]}
"""Which plain scalars are not text, in PyYAML's form; the order matters (int before float)."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = RESOLVERS


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file, counted from 1; ``Mark(0, 0)`` is the file as a whole."""

    line: int
    column: int


@dataclass(slots=True)
class Document:
    """One YAML file: its data, where each value stands, and what is wrong with it so far."""

    file: str
    data: Any = None
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    sources: dict[KeyPath, KeyPath] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    secret_paths: set[KeyPath] = field(default_factory=set)

    def origin(self, path: KeyPath) -> KeyPath:
        """The path that a value was written at: one merged from ``defaults`` stands there."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.sources:
                return self.sources[path[:length]] + path[length:]
        return path

    def mark(self, path: KeyPath) -> Mark:
        """Where the value at ``path`` stands, or the nearest part around it that does."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.marks:
                return self.marks[path[:length]]
        return Mark(0, 0)

    def value(self, path: KeyPath) -> Any:
        """The value at ``path``, or NO_VALUE."""
        node = self.data
        for part in path:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return NO_VALUE
        return node

    def report(self, path: KeyPath, message: str, *, hint: str = "", secret: bool = False) -> None:
        """Add a problem with the value at ``path``.

        Args:
            path: where, in the data as it now is.
            message: what is wrong, the limit, the remedy.
            hint: the valid name that was probably meant.
            secret: the value must never be shown; whatever else is wrong there is not said.
        """
        origin = self.origin(path)
        if any(origin[: len(hidden)] == hidden for hidden in self.secret_paths):
            return
        if secret:
            self.secret_paths.add(origin)
        mark = self.mark(origin)
        shown = "" if secret or not path else format_value(self.value(path))
        self.problems.append(
            Problem(self.file, mark.line, mark.column, format_path(origin), shown, message, hint)
        )


def read_document(path: Path) -> Document:
    """Read one YAML file; whatever is wrong with it is in the document's problems.

    Args:
        path: the file.

    Returns:
        The document; ``data`` is a dict, or None where nothing can be made of the file.
    """
    document = Document(str(path))
    text = _read_text(path, document)
    if text is None:
        return document
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            document.report((), "the file is empty; a job spec starts with `kind: train`")
            return document
        data = _Reader(document, loader).read(node, (), ())
    except yaml.MarkedYAMLError as error:
        _report_syntax(document, error)
    except yaml.YAMLError as error:
        document.report((), f"not YAML: {str(error).splitlines()[0]}")
    except RecursionError:
        document.report((), "nested too deeply to be read")
    else:
        if isinstance(data, dict):
            document.data = data
        elif not document.problems:
            kind = "a list" if isinstance(data, list) else "a single value"
            document.report(
                (), f"the file is {kind}; it needs a mapping at the top, such as `kind: train`"
            )
    return document


def _read_text(path: Path, document: Document) -> str | None:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = _neighbours(path)
        document.report((), f"no such file{near}")
    except IsADirectoryError:
        document.report((), f"this is a folder; give a YAML file{_neighbours(path / 'x')}")
    except UnicodeDecodeError as error:
        document.report((), f"not UTF-8 text (byte {error.start}); save the file as UTF-8")
    except OSError as error:
        document.report((), f"cannot be read: {error.strerror}")
    return None


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    found = sorted(
        other.name
        for other in path.parent.iterdir()
        if other.suffix in (".yaml", ".yml") and not other.name.startswith(".")
    )
    if not found:
        return ""
    meant = nearest(path.stem, [Path(name).stem for name in found])
    if meant:
        name = next(name for name in found if Path(name).stem == meant)
        return f"; did you mean {path.parent / name}?"
    more = f" and {len(found) - MAX_NEIGHBOURS} more" if len(found) > MAX_NEIGHBOURS else ""
    return f"; {path.parent}/ holds {', '.join(found[:MAX_NEIGHBOURS])}{more}"


def _report_syntax(document: Document, error: yaml.MarkedYAMLError) -> None:
    mark = error.problem_mark or error.context_mark
    if mark is not None:
        document.marks[()] = Mark(mark.line + 1, mark.column + 1)
    found = str(error.problem or error.context)
    message = "YAML syntax: " + _PARSER_WORDS.sub(lambda m: _TOKENS[m[1]], found)
    if error.context and error.problem:
        message += f" ({error.context}"
        start = error.context_mark
        message += f", which starts on line {start.line + 1})" if start is not None else ")"
    if error.context and error.context.startswith("while parsing a flow"):
        message += "; close its bracket, or put a comma between its parts"
    if "'\\t'" in message:
        message += "; indent with spaces, not tabs"
    elif "mapping values are not allowed" in message:
        message += "; indent the lines of one mapping alike, and quote text that holds ': '"
    elif "expected a single document" in message:
        message += "; one file is one spec: remove the `---` line"
    document.report((), message)


class _Reader:
    """Turns YAML nodes into plain data and notes where each of them stands."""

    def __init__(self, document: Document, loader: yaml.SafeLoader) -> None:
        self.document = document
        self.loader = loader
        self.num_values = 0

    def read(self, node: Node, path: KeyPath, parents: tuple[Node, ...]) -> Any:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_VALUES} values", node.start_mark
            )
        if any(node is parent for parent in parents):
            raise yaml.composer.ComposerError(
                None, None, "an alias inside its own anchor", node.start_mark
            )
        if path not in self.document.marks or isinstance(node, ScalarNode):
            self.document.marks[path] = _mark(node)
        if not isinstance(node, ScalarNode) and node.tag not in (_TAG + "map", _TAG + "seq"):
            raise _refused_tag(node)
        if isinstance(node, MappingNode):
            return self._mapping(node, path, (*parents, node))
        if isinstance(node, SequenceNode):
            inner = (*parents, node)
            return [self.read(item, (*path, i), inner) for i, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node)

    def _mapping(
        self, node: MappingNode, path: KeyPath, parents: tuple[Node, ...]
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: list[Node] = []
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a name, not a list or a mapping", key.start_mark
                )
            if key.tag == _MERGE:
                merged += value.value if isinstance(value, SequenceNode) else [value]
                continue
            name = str(key.value)
            child = (*path, name)
            mark = _mark(key)
            if name in lines:
                kept = self.document.marks[child]
                self.document.marks[child] = mark
                self.document.report(
                    child, f"the key is given twice, first on line {lines[name]}; keep one"
                )
                self.document.marks[child] = kept
                continue
            lines[name] = mark.line
            self.document.marks[child] = mark
            # An empty value has no place of its own: the key's is kept.
            result[name] = self.read(value, child, parents)
            if isinstance(value, ScalarNode) and not value.value:
                self.document.marks[child] = mark
        for name, (child_node, mark) in self._merged(merged):
            if name not in result:
                self.document.marks[(*path, name)] = mark
                result[name] = self.read(child_node, (*path, name), parents)
        return result

    def _merged(self, nodes: list[Node]) -> Iterator[tuple[str, tuple[Node, Mark]]]:
        for node in nodes:
            if not isinstance(node, MappingNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "<<: takes a mapping or a list of mappings", node.start_mark
                )
            for key, value in node.value:
                if key.tag == _MERGE:
                    yield from self._merged([value])
                else:
                    yield str(key.value), (value, _mark(key))

    def _scalar(self, node: ScalarNode) -> Any:
        text = str(node.value)
        if len(text) > LONGEST_NUMBER:
            return text
        match node.tag.removeprefix(_TAG):
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text.replace("_", ""), 16 if text.startswith("0x") else 10)
            case "float":
                plain = text.replace("_", "").lower()
                # YAML writes .inf and .nan where Python writes inf and nan.
                return float(plain.replace(".inf", "inf").replace(".nan", "nan"))
            case "str" | "merge" | "timestamp":
                return text
        raise _refused_tag(node)


def _refused_tag(node: Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(
        None, None, f"the tag {node.tag} is not allowed; write plain values", node.start_mark
    )


def _mark(node: Node) -> Mark:
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)
