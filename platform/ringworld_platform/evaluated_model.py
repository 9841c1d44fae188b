"""The one model that a job of evaluations means, whatever happens to its run later."""

from __future__ import annotations

from pathlib import Path

from ringworld_jobs.eval_spec import EvalSpec
from ringworld_platform.checkpoint_places import find_place
from ringworld_platform.errors import PlatformError


def settled_model(spec: EvalSpec, runs: Path) -> EvalSpec:
    """The spec with its model's place in full: the checkpoint that is the newest now, or a folder.

    Args:
        spec: the job.
        runs: folder of runs, where a run's name is looked up.

    Raises:
        PlatformError: there is no such run, checkpoint or folder, or its store does not answer.
    """
    from ringworld_workers.checkpoint.layout import CheckpointError
    from ringworld_workers.checkpoint_tools.choose import choose_newest
    from ringworld_workers.store.base import StoreError
    from ringworld_workers.store.opening import open_store

    folder = Path(spec.model.removeprefix("hf:")).expanduser()
    if "://" not in spec.model and (folder / "config.json").is_file():
        return spec.model_copy(update={"model": str(folder.resolve())})
    try:
        place = find_place(spec.model, runs)
        ref = choose_newest(open_store(place.url), place.stage, place.step)
    except (PlatformError, CheckpointError, StoreError) as error:
        raise PlatformError(f"model = {spec.model!r}: {error}") from error
    return spec.model_copy(update={"model": f"{place.run_url}/{ref.stage}/{ref.step}"})
