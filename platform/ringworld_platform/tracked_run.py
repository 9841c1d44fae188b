"""What MLflow tracking must remember over restarts, and a spec as MLflow parameters."""

from __future__ import annotations

import json
import logging
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

IDS_FILE = "mlflow.json"
# Below the least that MLflow's stores take.
PARAM_KEY_LIMIT = 250
PARAM_VALUE_LIMIT = 500


@dataclass(slots=True)
class TrackedRun:
    """What must outlive a restart of the tracker; saved in the run folder.

    Attributes:
        key: random identity of this run on the server, saved before the server hears of it, so
            that a crash between creating a run and saving its id is found again.
        uri: tracking URI that the ids belong to.
        experiment_id: MLflow's id of the experiment.
        parent: MLflow's id of the job's run.
        stages: MLflow's ids of the stage runs, by stage index.
        offset: bytes of the metric log that the server has acknowledged.
        attempt: last attempt that was tagged.
        params_logged: the spec is on the server.
    """

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    uri: str = ""
    experiment_id: str = ""
    parent: str = ""
    stages: dict[str, str] = field(default_factory=dict)
    offset: int = 0
    attempt: int = 0
    params_logged: bool = False

    @classmethod
    def load(cls, folder: Path, uri: str) -> TrackedRun:
        """Read what an earlier tracker saved; a new one if there is none or it names another uri.

        Args:
            folder: the run folder.
            uri: the tracking URI in use now; another server knows none of the saved ids.
        """
        path = folder / IDS_FILE
        try:
            saved = cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls(uri=uri)
        except (ValueError, TypeError) as error:
            logger.warning("%s is unreadable (%s); its metrics go to a new MLflow run", path, error)
            return cls(uri=uri)
        return saved if saved.uri == uri else cls(uri=uri)

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        path = folder / IDS_FILE
        scratch = path.with_suffix(".json.tmp")
        scratch.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)


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
