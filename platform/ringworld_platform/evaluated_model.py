"""The one model that a job on a model means, whatever happens to its run later."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_jobs.model_job import ModelJob
from ringworld_platform.checkpoint_places import find_place
from ringworld_platform.errors import PlatformError

AnyModelJob = TypeVar("AnyModelJob", bound=ModelJob)


def settled_model(spec: AnyModelJob, runs: Path) -> AnyModelJob:
    """The spec with its model's place in full: the checkpoint that is the newest now, or a folder.

    Args:
        spec: the job.
        runs: folder of runs, where a run's name is looked up.

    Raises:
        PlatformError: there is no such run, checkpoint or folder, or its store does not answer; or
            prompts are to be answered, and a vocabulary that this takes is not at hand.
    """
    from ringworld_workers.checkpoint.layout import CheckpointError
    from ringworld_workers.checkpoint_tools.choose import choose_newest
    from ringworld_workers.store.base import StoreError
    from ringworld_workers.store.opening import open_store

    folder = Path(spec.model.removeprefix("hf:")).expanduser()
    if "://" not in spec.model and (folder / "config.json").is_file():
        place = str(folder.resolve())
    else:
        try:
            found = find_place(spec.model, runs)
            ref = choose_newest(open_store(found.url), found.stage, found.step)
        except (PlatformError, CheckpointError, StoreError) as error:
            raise PlatformError(f"model = {spec.model!r}: {error}") from error
        place = f"{found.run_url}/{ref.stage}/{ref.step}"
    settled = spec.model_copy(update={"model": place})
    if isinstance(settled, GenerateSpec):
        _check_vocabularies(settled, runs)
    return settled


def _check_vocabularies(spec: GenerateSpec, runs: Path) -> None:
    from ringworld_model.hf_config import WeightsError
    from ringworld_platform.model_places import find_model
    from ringworld_workers.checkpoint.layout import CheckpointError
    from ringworld_workers.store.base import StoreError

    tokenizer, codebook = (Path(name) if name else None for name in (spec.tokenizer, spec.codebook))
    try:
        found = find_model(spec.model, runs, tokenizer=tokenizer, codebook=codebook)
    except (PlatformError, CheckpointError, StoreError, WeightsError) as error:
        raise PlatformError(f"model = {spec.model!r}: {error}") from error
    if not found.tokenizer:
        raise PlatformError(
            f"tokenizer: the text tokenizer of {found.label} is not at hand; name its file or "
            "folder"
        )
    for field, message in spec.problems(spec.context_length or found.context_length):
        raise PlatformError(f"{field}: {message}")
    if spec.to == "text":
        return
    if not found.config.vision_codebook_size:
        raise PlatformError(
            f"to = {spec.to!r}: {found.label} has only text; take a model that was trained with a "
            "codebook"
        )
    if not found.codebook:
        raise PlatformError(
            f"codebook: that of {found.label} is not at hand, and to: {spec.to} needs it; name its "
            "file or folder"
        )
