"""`init_from: run:...`: which checkpoint is meant, and is it of this model? Asked at submit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest

from ringworld_jobs.load import JobSpecError, load_job
from ringworld_jobs.plan import model_config
from ringworld_jobs.resolve import resolved_yaml, spec_digest
from ringworld_model.config import ModelConfig, preset
from ringworld_model.hf_layout import parameter_shapes
from ringworld_platform.client import absolute_paths
from ringworld_platform.run_weights import find_run, find_run_in_folder
from ringworld_workers.checkpoint.layout import (
    CHUNK_BYTES,
    MANIFEST,
    Manifest,
    OptimizerState,
    StoredObject,
    StoredRange,
    TrainState,
    folder_of,
    parameter_digest,
)
from ringworld_workers.store.base import Store
from ringworld_workers.store.opening import open_store

JOB = """
kind: train
name: next
model: MODEL
data: {sources: {x: {shards: x}}}
checkpoint: {store: "STORE"}
stages:
- {name: a, context_length: 1Ki, rope_theta: 1e6, steps: 1, global_batch_tokens: 1Ki,
   mixture: {x: 1}, learning_rate: {peak: 1e-3}STAGE}
"""
HELD = preset("debug", text_vocab_size=300, vision_codebook_size=64)
SOURCE = "{preset: debug, norm_eps: 1e-5, vision: {codebook_size: 64}}"
Write = Callable[..., Path]


def checkpoint(
    store: Store, run: str, index: int, stage: str, step: int, config: ModelConfig
) -> None:
    """A committed checkpoint, as far as a job's check looks: its manifest."""
    shapes = parameter_shapes(config)
    state = TrainState(stage, index, step, step, step, "", 1e-3, "", {}, final=True)
    key, ranges, offset = folder_of(index, stage, step), [], 0
    for name, shape in shapes.items():
        size = 4 * prod(shape)
        checksums = (0,) * ceil(size / CHUNK_BYTES)
        ranges.append(
            StoredRange(name, "param", 0, prod(shape), offset, size, "float32", checksums)
        )
        offset += size
    manifest = Manifest(
        run_id=run,
        attempt=1,
        world_size=1,
        mesh={},
        parameter_digest=parameter_digest(shapes),
        tensors=shapes,
        objects=(StoredObject(f"{key}/rank-00000-0.bin", offset, tuple(ranges)),),
        optimizer=OptimizerState("adamw", step, ()),
        state=state,
    )
    store.put(f"{run}/checkpoints/{key}/{MANIFEST}", [manifest.to_json()])


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    def write(model: str, store: str = "file://runs", stage: str = "") -> Path:
        path = tmp_path / "job.yaml"
        text = JOB.replace("MODEL", model).replace("STORE", store).replace("STAGE", stage)
        path.write_text(text)
        return path

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/meta.json").write_text("{}")
    return write


def fill(store: str, job: Write) -> None:
    """Two runs of the job `walk`; the older one has a later stage."""
    config, place = replace(HELD, norm_eps=1e-5), open_store(store)
    for run, index, stage, step in (
        ("walk-1", 0, "1k", 20),
        ("walk-1", 0, "1k", 60),
        ("walk-1", 1, "4k", 30),
        ("walk-10", 0, "1k", 40),
    ):
        checkpoint(place, run, index, stage, step, config)
    spec = resolved_yaml(load_job(job(SOURCE)))
    for run in ("walk-1", "walk-10"):
        place.put(f"{run}/spec.yaml", [spec.encode()])


def init_from(path: Path, **options: Any) -> str | None:
    return load_job(path, find_run=find_run, **options).model.init_from


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(JobSpecError) as caught:
        load_job(path, **{"find_run": find_run, **options})
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_every_form_names_one_checkpoint_for_good(
    kind: str, job: Write, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = "file://runs" if kind == "file" else request.getfixturevalue("s3_url")
    fill(store, job)
    root = f"file://{tmp_path}/runs" if kind == "file" else store
    forms = {
        "walk-1": "walk-1/checkpoints/01-4k/step-00000030",
        "walk-1/1k": "walk-1/checkpoints/00-1k/step-00000060",
        "walk-1/1k/20": "walk-1/checkpoints/00-1k/step-00000020",
        "walk": "walk-10/checkpoints/00-1k/step-00000040",
        f"{root}/walk-1/1k": "walk-1/checkpoints/00-1k/step-00000060",
    }
    if kind == "s3":  # what parts mean is the same there; each question takes its time
        forms = {form: forms[form] for form in ("walk", f"{root}/walk-1/1k")}
    for form, meant in forms.items():
        path = job(f"{{init_from: 'run:{form}'}}", store)
        spec = load_job(path, find_run=find_run)
        assert spec.model.init_from == f"run:{root}/{meant}"
        assert model_config(spec) == replace(HELD, norm_eps=1e-5)
    # The resolved spec is loaded where nobody looks for runs, and the run may be gone by then.
    again = tmp_path / "resolved.yaml"
    again.write_text(resolved_yaml(spec))
    open_store(store).delete_prefix("walk-1")
    assert load_job(again, check_files=False) == spec
    assert spec_digest(load_job(again, check_files=False)) == spec_digest(spec)
    assert absolute_paths(spec, tmp_path / "elsewhere").model.init_from == spec.model.init_from


def test_a_relative_url_is_meant_from_the_working_directory(job: Write, tmp_path: Path) -> None:
    spec = load_job(job("{preset: debug, init_from: 'run:file://old/walk-1'}"), check_files=False)
    meant = absolute_paths(spec, tmp_path / "here").model.init_from
    assert meant == f"run:file://{tmp_path}/here/old/walk-1"


@pytest.mark.parametrize(
    ("model", "stage", "words"),
    [
        ("init_from: run:wolk", "", ("walk",)),
        ("init_from: run:walk-1/4", "", ("1k, 4k",)),
        ("init_from: run:walk-1/1k/40", "", ("step 40", "20, 60")),
        (
            "num_layers: 3, init_from: run:walk-1",
            "",
            ("layers.2.attention_norm.weight is not there",),
        ),
        (
            "text_vocab_size: 512, init_from: run:walk-1",
            "",
            ("text_embed.weight is [300, 256] there and [512, 256] here",),
        ),
        ("preset: tiny, init_from: run:walk-1", "", ("[300, 256] there and [300, 128] here",)),
        (
            "num_heads: 4, num_kv_heads: 4, head_dim: 64, init_from: run:walk-1",
            "",
            ("num_heads is 2 there",),
        ),
        ("preset: debug, init_from: run:walk-1", "", ("norm_eps is 1e-05 there and 1e-06 here",)),
        (
            "vision: {codebook_size: 128}, init_from: run:walk-1",
            "",
            ("vision_embed.weight is [320, 256] there and [384, 256] here",),
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_where_it_is_written(
    job: Write, model: str, stage: str, words: tuple[str, ...]
) -> None:
    fill("file://runs", job)
    said = refusal(job(f"{{{model}}}", stage=stage))
    assert "job.yaml:4: model.init_from = 'run:" in said
    for word in words:
        assert word in said


def test_norm_eps_may_be_overruled_by_writing_it(job: Write) -> None:
    fill("file://runs", job)
    config = model_config(
        load_job(job("{norm_eps: 1e-6, init_from: run:walk-1}"), find_run=find_run)
    )
    assert config == HELD


def test_the_optimizers_state_is_inherited_from_the_same_optimizer_only(job: Write) -> None:
    fill("file://runs", job)
    path = job("{init_from: run:walk-1}", stage=", optimizer_state: inherit")
    assert init_from(path)
    path.write_text(path.read_text() + "optimizer: {name: sgd}\n")
    assert "has the state of adamw" in refusal(path)


def test_a_run_on_s3_is_not_asked_offline(job: Write) -> None:
    url = "s3://runs/x/walk-1"
    said = refusal(job(f"{{init_from: 'run:{url}'}}"), find_run=find_run_in_folder)
    assert "write model.preset" in said
    path = job(f"{{preset: debug, init_from: 'run:{url}'}}")
    assert load_job(path, find_run=find_run_in_folder).model.init_from == f"run:{url}"


def test_a_controller_finds_a_runs_model_without_torch(job: Write, tmp_path: Path) -> None:
    """What evaluates a stage asks for its model: torch would cost seconds, and 300 MB."""
    fill("file://runs", job)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ringworld_platform import controller\n"
        "from ringworld_platform.model_places import find_model\n"
        "from ringworld_workers.evaluate.job import EvaluationJob\n"
        "print(find_model('runs/walk-10', Path('runs')).label, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "walk-10/1k/40 False\n", done.stderr
