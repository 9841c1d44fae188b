"""Folders that Hugging Face datasets' save_to_disk wrote, read without that library."""

from __future__ import annotations

import json
from typing import Any

from ringworld_workers.data.files import DataError, InputFile

STATE_FILE = "state.json"
"""In the folder of one set; names its Arrow files in order."""
SPLITS_FILE = "dataset_dict.json"
"""In a folder of several sets; names their folders."""


def is_set(folder: InputFile) -> bool:
    """Whether save_to_disk wrote it, as one set or as several."""
    return any((folder.path / name).is_file() for name in (STATE_FILE, SPLITS_FILE))


def arrow_files(folder: InputFile) -> list[InputFile]:
    """The Arrow files of a set, or of all sets of a folder, in order.

    Raises:
        DataError: it is no such folder, its index is damaged, or a file that it names is missing.
    """
    if (folder.path / SPLITS_FILE).is_file():
        names = _strings(folder, SPLITS_FILE, _read(folder, SPLITS_FILE).get("splits"))
        return [file for name in names for file in arrow_files(_inside(folder, name))]
    if not (folder.path / STATE_FILE).is_file():
        raise DataError(
            f"{folder.label}: holds no {STATE_FILE}; name a folder that save_to_disk wrote"
        )
    state = _read(folder, STATE_FILE)
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder.label}: a selection that was not written out; call flatten_indices() before "
            f"save_to_disk"
        )
    entries = state.get("_data_files")
    if isinstance(entries, list):
        entries = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    files = [_inside(folder, name) for name in _strings(folder, STATE_FILE, entries)]
    for file in files:
        if not file.path.is_file():
            raise DataError(f"{file.label}: named in {STATE_FILE}, but not there; copy all files")
    return files


def _read(folder: InputFile, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder.path / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{folder.label}/{name}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{folder.label}/{name}: not a JSON object")
    return content


def _strings(folder: InputFile, name: str, values: Any) -> list[str]:
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise DataError(f"{folder.label}/{name}: names no data; was save_to_disk cut off?")
    return values


def _inside(folder: InputFile, name: str) -> InputFile:
    """A file of the folder: a name that leads out of it is refused."""
    path = folder.path / name
    if not path.resolve().is_relative_to(folder.path.resolve()):
        raise DataError(f"{folder.label}: names {name!r}, which is not inside the folder")
    return InputFile(path, f"{folder.label}/{name}")
