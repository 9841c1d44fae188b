"""The resolved spec: every default written out, fit to be printed, stored and loaded again."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePath
from typing import Any

import yaml

from ringworld_jobs.document import RESOLVERS
from ringworld_jobs.model_job import ModelJob
from ringworld_jobs.spec import JobSpec


class _Dumper(yaml.SafeDumper):
    """Quotes what our reader would not take for text (1e6), and only that."""

    yaml_implicit_resolvers = RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True


def resolved(spec: JobSpec | ModelJob) -> dict[str, Any]:
    """The spec as plain data with every default filled in; fields without a value are left out."""
    return spec.model_dump(mode="json", exclude_none=True)


def resolved_yaml(spec: JobSpec | ModelJob) -> str:
    """The resolved spec as YAML; ``load_any_job`` reads an equal spec from it."""
    return yaml.dump(resolved(spec), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def spec_digest(spec: JobSpec | ModelJob) -> str:
    """SHA-256 (hex) of the resolved spec: two specs that mean the same have the same one.

    Comments, key order and units do not matter, nor does the folder that data stands in: of
    `model.init_from` and the paths under `data`, which ``load_job`` makes absolute, only the last
    name counts. A URL counts whole, and so does a run's checkpoint.
    """
    data = resolved(spec)
    if isinstance(spec, JobSpec) and "init_from" in data["model"]:
        kind, _, path = data["model"]["init_from"].partition(":")
        if kind != "run":
            data["model"]["init_from"] = f"{kind}:{PurePath(path).name}"
    prepared = data.get("data", {})
    if "recipe" in prepared:
        prepared["recipe"] = PurePath(prepared["recipe"]).name
    for source in prepared.get("sources", {}).values():
        if "shards" in source and "://" not in source["shards"]:
            source["shards"] = PurePath(source["shards"]).name
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
