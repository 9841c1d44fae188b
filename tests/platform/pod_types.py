"""Field names and types of Kubernetes' pods, and JSON schemas made of them that take no others.

``pod_types.json`` holds the names and types alone, read from the Python client of Kubernetes
(``kubernetes`` 37.0.2 on PyPI, Apache-2.0). To read them from another version:

    pip download --no-deps -d DIR kubernetes==VERSION
    python tests/platform/pod_types.py DIR/kubernetes-VERSION-py2.py3-none-any.whl
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
ROOT = "V1PodTemplateSpec"
_SIMPLE = {
    "StrictStr": "string",
    "StrictInt": "integer",
    "StrictBool": "boolean",
    "StrictFloat": "number",
    "datetime": "string",
}


def read(wheel: Path) -> dict[str, dict[str, Any]]:
    """Types that a pod template is made of: their fields, a star before those that must be there.

    Args:
        wheel: of the Python client.

    Returns:
        Types by name; each gives its fields' types by name: ``string``, another type's name,
        ``[x]`` for a list and ``{x}`` for a map of them, ``any``.
    """
    classes: dict[str, ast.ClassDef] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.fullmatch(r"kubernetes/client/models/\w*v1_\w+\.py", name):
                for node in ast.parse(archive.read(name)).body:
                    if isinstance(node, ast.ClassDef):
                        classes[node.name] = node
    found: dict[str, dict[str, Any]] = {}
    waiting = [ROOT]
    while waiting:
        name = waiting.pop()
        if name not in found and name in classes:
            found[name] = _fields(classes[name])
            for kind in found[name].values():
                waiting += re.findall(r"\w*V1\w+", kind)
    return dict(sorted(found.items()))


def _fields(node: ast.ClassDef) -> dict[str, str]:
    fields = {}
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        kind, name = ast.unparse(line.annotation), line.target.id
        if name.startswith("__") or "ClassVar" in kind:
            continue
        keywords = line.value.keywords if isinstance(line.value, ast.Call) else []
        given = {word.arg: word.value for word in keywords}
        alias = given.get("serialization_alias", given.get("alias"))
        if alias is not None:
            name = ast.literal_eval(alias)
        needed = "" if kind.startswith("Optional[") else "*"
        fields[needed + name] = _kind(
            kind.removeprefix("Optional[").removesuffix("]" * (not needed))
        )
    return fields


def _kind(text: str) -> str:
    listed = re.fullmatch(r"List\[(.*)\]", text)
    mapped = re.fullmatch(r"Dict\[str, (.*)\]", text)
    if listed:
        return f"[{_kind(listed[1])}]"
    if mapped:
        return f"{{{_kind(mapped[1])}}}"
    return _SIMPLE.get(text, text if "V1" in text else "any")


def schema(types: Mapping[str, Mapping[str, Any]], root: str) -> dict[str, Any]:
    """A JSON schema of a type that refuses every field which is not named.

    Args:
        types: as ``read`` gives them; a field's type may also be a list of allowed values.
        root: the type.
    """
    return {"$ref": f"#/$defs/{root}", "$defs": {n: _object(f) for n, f in types.items()}}


def _object(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name[1:] for name in fields if name.startswith("*")],
        "properties": {name.lstrip("*"): _schema(kind) for name, kind in fields.items()},
    }


def _schema(kind: Any) -> dict[str, Any]:
    if not isinstance(kind, str):
        return {"enum": list(kind)}
    if kind.startswith("["):
        return {"type": "array", "items": _schema(kind[1:-1])}
    if kind.startswith("{"):
        return {"type": "object", "additionalProperties": _schema(kind[1:-1])}
    if kind == "any":
        return {}
    if kind in _SIMPLE.values():
        return {"type": kind}
    return {"$ref": f"#/$defs/{kind}"}


if __name__ == "__main__":
    lines = [f"{json.dumps(n)}: {json.dumps(f)}" for n, f in read(Path(sys.argv[1])).items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
