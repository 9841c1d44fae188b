"""Which model a person means: a run's checkpoint, or a folder of weights; and its vocabularies."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringworld_platform.checkpoint_places import Place, find_place, read_spec_text
from ringworld_platform.errors import UnknownRunError

if TYPE_CHECKING:
    from ringworld_jobs.spec import JobSpec
    from ringworld_workers.generation.source import ModelSource

_META = "meta.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def find_model(
    place: str, runs: Path, *, tokenizer: Path | None = None, codebook: Path | None = None
) -> ModelSource:
    """The model that a command's argument means; its weights are not read.

    Args:
        place: RUN[/STAGE[/STEP]], s3://BUCKET/PREFIX/RUN[/STAGE[/STEP]], or a folder of weights in
            Hugging Face's layout, such as ``ringworld export`` writes.
        runs: folder of this machine's runs.
        tokenizer: of text; None: that of the run's data or of the folder, if it is at hand.
        codebook: of frames; None: likewise.

    Raises:
        UnknownRunError: nothing of that name is there; says what is. Or a file that is named is
            not there.
        CheckpointError, StoreError: the checkpoint cannot be read, or the store does not answer.
        WeightsError: the folder holds no model that can be read.
    """
    for option, path in (("--tokenizer", tokenizer), ("--codebook", codebook)):
        if path is not None and not path.expanduser().exists():
            raise UnknownRunError(f"{option} {path}: there is no such file or folder")
    folder = Path(place.removeprefix("hf:")).expanduser()
    if "://" not in place and (folder / "config.json").is_file():
        return _of_folder(folder, tokenizer, codebook)
    try:
        found = find_place(place, runs)
    except UnknownRunError as error:
        raise UnknownRunError(
            f"{error}. A folder of weights holds config.json and safetensors"
        ) from None
    return find_run_model(found, tokenizer=tokenizer, codebook=codebook)


def resolved_spec(place: Place) -> JobSpec:
    """A run's resolved spec, from where its checkpoints are if it is not on this machine.

    Raises:
        UnknownRunError: there is none.
        StoreError: the store failed.
    """
    from ringworld_jobs.load import load_job

    text = read_spec_text(place)
    with tempfile.TemporaryDirectory(prefix="ringworld-spec-") as folder:
        path = Path(folder) / "spec.yaml"
        path.write_bytes(text)
        return load_job(path, check_files=False)


def prepared_folder(place: Place) -> Path | None:
    """The data that a run was prepared from, where this machine has it.

    It holds the text tokenizer and, where the run has vision, the codebook.
    """
    prepared = (_state(place).get("prepared") or {}).get("dir")
    return Path(prepared) if prepared and Path(prepared).is_dir() else None


def find_run_model(
    place: Place, *, tokenizer: Path | None = None, codebook: Path | None = None
) -> ModelSource:
    """The model of a run's newest checkpoint, or of that which the place names.

    Args:
        place: of the run.
        tokenizer: see ``find_model``.
        codebook: see ``find_model``.

    Raises:
        UnknownRunError, CheckpointError, StoreError: as ``find_model``.
    """
    from ringworld_workers.checkpoint_tools.choose import choose_newest, manifest_of
    from ringworld_workers.checkpoint_tools.held_config import held_config
    from ringworld_workers.generation.source import ModelSource
    from ringworld_workers.store.opening import open_store

    store = open_store(place.url)
    ref = choose_newest(store, place.stage, place.step)
    spec = resolved_spec(place)
    config = held_config(spec, manifest_of(store, ref), ref)
    stage = spec.stages[ref.stage_index]
    data = prepared_folder(place)
    metas = list(_metas(spec, stage.mixture, data))
    about = next((meta["codebook"] for meta in metas if meta.get("codebook")), None)
    vocabulary: Mapping[str, Any] = next(
        (meta["tokenizer"] for meta in metas if meta.get("tokenizer")), {}
    )
    homes = [data] if data is not None else _homes(spec)
    return ModelSource(
        label=f"{place.run_id}/{ref.stage}/{ref.step}",
        config=config,
        rope_theta=stage.rope_theta,
        context_length=stage.context_length,
        checkpoint=ref,
        tokenizer=str(tokenizer or next(filter(_has_tokenizer, homes), "")),
        codebook=str(codebook or next(filter(_has_codebook, homes), "")),
        tokenizer_digest=str(vocabulary.get("digest", "")),
        codebook_about=about,
        chat=next((meta["chat"] for meta in metas if meta.get("chat")), None),
    )


def _of_folder(folder: Path, tokenizer: Path | None, codebook: Path | None) -> ModelSource:
    from ringworld_model.hf_config import read_config
    from ringworld_workers.generation.folder import CODEBOOK, read_about
    from ringworld_workers.generation.source import ModelSource

    found = read_config(folder)
    about = read_about(folder)
    own = folder / CODEBOOK
    return ModelSource(
        label=str(folder),
        config=found.config,
        rope_theta=found.rope_theta,
        context_length=found.max_position_embeddings,
        folder=str(folder.absolute()),
        tokenizer=str(tokenizer or (folder if _has_tokenizer(folder) else "")),
        codebook=str(codebook or (own if own.exists() else "")),
        tokenizer_digest=str((about.get("tokenizer") or {}).get("digest", "")),
        codebook_about=about.get("codebook"),
        chat=about.get("chat"),
    )


def _state(place: Place) -> Mapping[str, Any]:
    """A run's last known state, from its store where the run was on another machine."""
    from ringworld_platform.run_records import STATE_FILE, read_state
    from ringworld_workers.store.base import StoreError
    from ringworld_workers.store.opening import open_store

    if place.folder is not None:
        return read_state(place.folder)
    try:
        state = json.loads(open_store(place.run_url).get(STATE_FILE))
    except (StoreError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _metas(
    spec: JobSpec, mixture: Mapping[str, float], data: Path | None
) -> Iterator[Mapping[str, Any]]:
    """What the stage's datasets say of themselves, the largest share first; then the recipe."""
    for name in sorted(mixture, key=lambda name: -mixture[name]):
        source = spec.data.sources.get(name)
        if source is not None and source.shards is not None:
            place = Path(source.shards)
        elif data is not None:
            place = data / (name if source is None else str(source.dataset))
        else:
            continue
        yield _meta(place)
    if data is not None:
        yield _meta(data)


def _meta(folder: Path) -> Mapping[str, Any]:
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _homes(spec: JobSpec) -> list[Path]:
    """Folders beside the prepared datasets that a spec names."""
    shards = [source.shards for source in spec.data.sources.values() if source.shards]
    return [Path(place).absolute().parent for place in shards if "://" not in place]


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZERS)


def _has_codebook(folder: Path) -> bool:
    return (folder / "codebook.npz").is_file() or (folder / "codebook" / "config.json").is_file()
