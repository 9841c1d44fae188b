"""What MLflow tracking must remember over restarts, and a spec as MLflow parameters."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

IDS_FILE = "mlflow.json"
# Below the least that MLflow's stores take.
PARAM_KEY_LIMIT = 250
PARAM_VALUE_LIMIT = 500
_MARK_BYTES = 4096


@dataclass(slots=True)
class TrackedRun:
    """What must outlive a restart of the tracker, for one server; saved in the run folder.

    Attributes:
        key: random identity of this run on the server, saved before the server hears of it, so
            that a crash between creating a run and saving its id is found again.
        uri: tracking URI that the ids belong to.
        experiment_id: MLflow's id of the experiment.
        parent: MLflow's id of the job's run.
        stages: MLflow's ids of the stage runs, by stage index.
        offset: bytes of the metric log that the server has acknowledged.
        mark: digest of the last of these bytes: whether a log is the one that was sent.
        attempt: last attempt that was tagged.
        params_logged: the spec is on the server.
        tokens: that the run had consumed in the last step that was sent.
        time: of the last record that was sent, seconds since the epoch.
        unregistered: ``stage_end`` records whose checkpoints are no model versions yet, each with
            the tokens consumed by then.
        ended: how the run has ended there; empty while it has not.
    """

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    uri: str = ""
    experiment_id: str = ""
    parent: str = ""
    stages: dict[str, str] = field(default_factory=dict)
    offset: int = 0
    mark: str = ""
    attempt: int = 0
    params_logged: bool = False
    tokens: int = 0
    time: float = 0.0
    unregistered: list[dict[str, Any]] = field(default_factory=list)
    ended: str = ""

    @classmethod
    def load(cls, folder: Path, uri: str) -> TrackedRun:
        """Read what an earlier tracker saved for a server; a new one if there is none.

        Args:
            folder: the run folder.
            uri: the tracking URI in use now; another server knows none of the saved ids.
        """
        for saved in _read_all(folder):
            if saved.get("uri") == uri:
                try:
                    return cls(**saved)
                except TypeError as error:
                    logger.warning("%s: %s; its metrics are sent anew", folder / IDS_FILE, error)
        return cls(uri=uri)

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all, beside what there is for other servers."""
        others = [saved for saved in _read_all(folder) if saved.get("uri") != self.uri]
        path = folder / IDS_FILE
        scratch = path.with_suffix(".json.tmp")
        scratch.write_text(json.dumps([*others, asdict(self)], indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)

    def forget_server(self) -> None:
        """Begin anew on a server that has nothing of this run; it keeps the identity."""
        fresh = TrackedRun(key=self.key, uri=self.uri)
        for name in TrackedRun.__slots__:
            setattr(self, name, getattr(fresh, name))

    def matches(self, log: Path) -> bool:
        """Whether a log still begins with what was sent.

        The one of a run that was taken over from a lost machine may lack that machine's last
        lines, and have others in their place.
        """
        return self.offset == 0 or not self.mark or self.mark == mark_of(log, self.offset)


def mark_of(log: Path, offset: int) -> str:
    """Digest of the bytes before an offset; of a file that is shorter, the empty string."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, offset - _MARK_BYTES))
            data = file.read(min(offset, _MARK_BYTES))
    except FileNotFoundError:
        return ""
    return hashlib.sha256(data).hexdigest()[:16] if len(data) == min(offset, _MARK_BYTES) else ""


def _read_all(folder: Path) -> list[dict[str, Any]]:
    path = folder / IDS_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        logger.warning("%s is unreadable (%s); its metrics go to a new MLflow run", path, error)
        return []
    # Earlier versions knew one server only.
    found = saved if isinstance(saved, list) else [saved]
    return [one for one in found if isinstance(one, dict)]


def flatten(value: object, prefix: str = "") -> dict[str, str]:
    """Turn nested data into ``a.b.0.c`` keys and text values, cut to lengths that servers take."""
    if isinstance(value, dict):
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(item, dict | list) for item in value):
        children = [(str(index), child) for index, child in enumerate(value)]
    else:
        return {prefix[-PARAM_KEY_LIMIT:]: str(value)[:PARAM_VALUE_LIMIT]} if prefix else {}
    flat: dict[str, str] = {}
    for key, child in children:
        flat |= flatten(child, f"{prefix}.{key}" if prefix else key)
    return flat
