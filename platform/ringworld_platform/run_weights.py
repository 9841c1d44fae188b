"""`model.init_from: run:...`: which checkpoint of which run that is, by asking its store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from ringworld_jobs.run_place import CheckpointPlace, FoundWeights
from ringworld_jobs.spec_model import ModelSpec
from ringworld_jobs.store_url import parse_store
from ringworld_model.hf_config import WeightsError
from ringworld_platform.errors import PlatformError
from ringworld_platform.run_records import SPEC_FILE
from ringworld_workers.store.base import NotFound, StoreError

if TYPE_CHECKING:
    from ringworld_workers.store.base import Store


def find_run(place: str, own_store: str) -> FoundWeights:
    """Look a run's checkpoint up, in a folder or on S3. For ``load_job``.

    Args:
        place: RUN[/STAGE[/STEP]], of the job's own store unless it is a url.
        own_store: the job's ``checkpoint.store``.

    Raises:
        WeightsError: nothing of that name is there, or the store does not answer.
    """
    from ringworld_platform.checkpoint_places import find_place
    from ringworld_workers.checkpoint.layout import CheckpointError
    from ringworld_workers.checkpoint_tools.choose import choose_newest, manifest_of
    from ringworld_workers.store.opening import open_store

    try:
        found = find_place(_url(place, own_store), Path("runs"))
        store = open_store(found.url)
        ref = choose_newest(store, found.stage, found.step)
        manifest = manifest_of(store, ref)
        model = _model_of(open_store(found.run_url))
    except (PlatformError, StoreError, CheckpointError) as error:
        raise WeightsError(str(error)) from error
    at = CheckpointPlace(found.run_url, ref.stage_index, ref.stage, ref.step)
    if at.checkpoints_url != found.url:
        raise WeightsError(
            f"{found.url} is no run's folder; a run has its checkpoints in RUN/checkpoints"
        )
    return FoundWeights(at, manifest.tensors, manifest.optimizer.name, model)


def find_run_in_folder(place: str, own_store: str) -> FoundWeights | None:
    """As ``find_run``; None where the run lies on S3, which is not asked."""
    try:
        if parse_store(_url(place, own_store)).scheme != "file":
            return None
    except ValueError:  # said of the store itself
        return None
    return find_run(place, own_store)


def _url(place: str, own_store: str) -> str:
    return place if "://" in place else f"{own_store.rstrip('/')}/{place}"


def _model_of(run: Store) -> ModelSpec | None:
    """The model of a run's own spec; None where the spec is not there."""
    try:
        data = run.get(SPEC_FILE)
    except NotFound:
        return None
    try:
        return ModelSpec.model_validate(yaml.safe_load(data)["model"])
    except (yaml.YAMLError, ValidationError, LookupError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise WeightsError(f"{run.url}/{SPEC_FILE} cannot be read: {first}") from error
