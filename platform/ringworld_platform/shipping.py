"""Our own packages on their way to nodes that lack them, or hold another version.

What they need (torch, Ray, ...) is not shipped: it is part of the nodes' image.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ringworld_platform.errors import PlatformError

PACKAGES = ("ringworld_jobs", "ringworld_model", "ringworld_workers", "ringworld_platform")
MOST_BYTES = 32 << 20
"""All our code is a tenth of it; Ray keeps what is shipped in the head's memory."""
_LEFT_OUT = "__pycache__"
# Ray sets it for the command of a job that was handed to its dashboard, with what was shipped then.
_SHIPPED_ALREADY = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class UploadRefused(PlatformError):
    """More is to be shipped than our code can be."""


def runtime_env() -> dict[str, Any]:
    """What gives every process of a Ray job the packages of this one. Ray's own form.

    Empty where the job was given them already: by whoever handed this command to the cluster.

    Raises:
        UploadRefused: they hold more than code.
    """
    if _SHIPPED_ALREADY in os.environ:
        return {}
    folders = [_folder(name) for name in PACKAGES]
    _check_size(folders)
    return {"py_modules": [str(folder) for folder in folders], "excludes": [_LEFT_OUT]}


def _folder(package: str) -> Path:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UploadRefused(f"the package {package} is not installed here; reinstall ringworld")
    return Path(found.submodule_search_locations[0])


def _check_size(folders: list[Path]) -> None:
    sizes = {
        path: path.stat().st_size
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and _LEFT_OUT not in path.parts
    }
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise UploadRefused(
            f"the packages of ringworld hold {total >> 20} MiB, {sizes[largest] >> 20} MiB of them "
            f"in {largest}; at most {MOST_BYTES >> 20} MiB are shipped: move data out of them, or "
            "install ringworld on the nodes and submit from there"
        )
