"""Every YAML in jobs/ loads, plans to the numbers written here, and reads back equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ringworld_jobs.any_job import load_any_job
from ringworld_jobs.document import read_document
from ringworld_jobs.load import load_job, load_recipe
from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.plan import plan_stages
from ringworld_jobs.resolve import resolved, resolved_yaml, spec_digest
from ringworld_jobs.spec import JobSpec

JOBS = Path(__file__).resolve().parents[2] / "jobs"

# (context, ring, rings, tokens a worker, rows a step, accumulation) of each stage.
PLANS = {
    "quickstart": [
        (2**10, 1, 2, 2**10, 2, 1),
        (2**12, 2, 1, 2**11, 1, 1),
        (2**14, 2, 1, 2**13, 1, 1),
    ],
    "lwm-text-7b": [
        (2**15, 1, 64, 2**15, 128, 2),
        (2**17, 4, 16, 2**15, 32, 2),
        (2**18, 8, 8, 2**15, 16, 2),
        (2**19, 16, 4, 2**15, 8, 2),
        (2**20, 32, 2, 2**15, 4, 2),
    ],
    "lwm-vision-7b": [
        (2**10, 1, 64, 2**10, 8192, 8),
        (2**13, 1, 64, 2**13, 1024, 8),
        (2**15, 1, 64, 2**15, 256, 4),
        (2**17, 4, 16, 2**15, 64, 4),
        (2**20, 32, 2, 2**15, 8, 4),
    ],
    "lwm-chat-text": [
        (2**17, 4, 32, 2**15, 32, 1),
        (2**18, 8, 16, 2**15, 16, 1),
        (2**19, 16, 8, 2**15, 8, 1),
        (2**20, 32, 4, 2**15, 4, 1),
    ],
    "demo": [
        (2**10, 1, 2, 2**10, 8, 2),
        (2**13, 2, 1, 2**12, 2, 2),
        (2**15, 2, 1, 2**14, 1, 1),
    ],
    "needle-demo": [
        *[(2**9, 1, 2, 2**9, 16, 1)] * 2,
        (2**11, 2, 1, 2**10, 8, 2),
        (2**13, 2, 1, 2**12, 2, 2),
    ],
}
PLANS["quickstart-s3"] = PLANS["quickstart"]


def test_the_table_covers_every_job() -> None:
    kinds = {path.stem: read_document(path).data["kind"] for path in JOBS.glob("*.yaml")}
    assert {name for name, kind in kinds.items() if kind == "train"} == set(PLANS)


@pytest.mark.parametrize("name", ["eval", "generate"])
def test_jobs_without_stages_load_and_read_back_equal(name: str, tmp_path: Path) -> None:
    spec = load_any_job(JOBS / f"{name}.yaml", check_files=name == "generate")
    assert spec.kind == name and spec.mesh_for(2**14) == MeshSize(1, 2)  # type: ignore[union-attr]
    (tmp_path / "spec.yaml").write_text(resolved_yaml(spec))
    assert load_any_job(tmp_path / "spec.yaml", check_files=False) == spec


@pytest.mark.parametrize("name", PLANS)
def test_every_job_loads_and_plans(name: str) -> None:
    spec = load_job(JOBS / f"{name}.yaml", check_files=False)
    plans = plan_stages(spec)
    assert [
        (
            plan.context_length,
            plan.sequence_parallel_size,
            plan.data_parallel_size,
            plan.local_length,
            plan.rows_per_step,
            plan.gradient_accumulation_steps,
        )
        for plan in plans
    ] == PLANS[name]
    for plan, stage in zip(plans, spec.stages, strict=True):
        assert plan.world_size == plan.sequence_parallel_size * plan.data_parallel_size
        assert plan.rows_per_step * plan.context_length == stage.global_batch_tokens
        assert plan.num_tokens == plan.num_steps * stage.global_batch_tokens
        assert plan.num_tokens >= (stage.tokens or 0)


@pytest.mark.parametrize("gpus", [8, 16, 64, 128, 512])
@pytest.mark.parametrize("name", ["lwm-text-7b", "lwm-vision-7b", "lwm-chat-text"])
def test_the_lwm_jobs_run_on_8_to_512_gpus(name: str, gpus: int) -> None:
    """Every stage has a mesh; a GPU holds 32Ki tokens of a row, or the ring spans all GPUs."""
    spec = load_job(JOBS / f"{name}.yaml", check_files=False)
    workers = spec.resources.workers.model_copy(update={"max": gpus})
    resources = spec.resources.model_copy(update={"workers": workers})
    for plan in plan_stages(spec.model_copy(update={"resources": resources})):
        assert 8 <= plan.world_size <= gpus
        assert plan.local_length <= 2**15 or plan.sequence_parallel_size == gpus
        assert plan.local_length * plan.sequence_parallel_size == plan.context_length


def test_the_lwm_jobs_have_the_paper_s_schedule() -> None:
    """Tokens, RoPE base, warm-up and learning rate of each stage, as the paper's tables say."""
    found = {
        name: [
            (
                stage.tokens,
                stage.rope_theta,
                stage.learning_rate.warmup_steps,
                stage.learning_rate.peak,
                stage.global_batch_tokens,
            )
            for stage in load_job(JOBS / f"{name}.yaml", check_files=False).stages
        ]
        for name in ("lwm-text-7b", "lwm-vision-7b")
    }
    assert found["lwm-text-7b"] == [
        (4_800_000_000, 1e6, 100, 4e-5, 2**22),
        (12_000_000_000, 1e7, 200, 4e-5, 2**22),
        (12_000_000_000, 1e7, 200, 4e-5, 2**22),
        (3_000_000_000, 2.5e7, 50, 4e-5, 2**22),
        (1_800_000_000, 5e7, 25, 4e-5, 2**22),
    ]
    assert found["lwm-vision-7b"] == [
        (363_000_000_000, 5e7, 1000, 6e-4, 2**23),
        (107_000_000_000, 5e7, 500, 6e-4, 2**23),
        (10_000_000_000, 5e7, 100, 8e-5, 2**23),
        (3_500_000_000, 5e7, 50, 8e-5, 2**23),
        (400_000_000, 5e7, 5, 8e-5, 2**23),
    ]


def test_the_lwm_jobs_have_the_size_of_the_paper() -> None:
    text = plan_stages(load_job(JOBS / "lwm-text-7b.yaml", check_files=False))
    assert text[0].num_parameters == 6_738_415_616  # Llama-2 7B
    vision = load_job(JOBS / "lwm-vision-7b.yaml", check_files=False)
    assert vision.model.config().vision_vocab_size == 8448


@pytest.mark.parametrize("path", sorted(JOBS.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    shipped = path.stem == "quickstart"
    assert load_recipe(path, check_files=shipped).name == path.stem


def test_the_quickstart_is_ready_to_run_and_shows_what_it_should() -> None:
    """Its files and packages are there; each stage changes context, RoPE base and mixture."""
    spec = load_job(JOBS / "quickstart.yaml")
    stages = spec.stages
    for before, after in zip(stages, stages[1:], strict=False):
        assert after.context_length == 4 * before.context_length
        assert after.rope_theta > before.rope_theta
        assert after.mixture.keys() != before.mixture.keys()
    for stage in stages:
        share = stage.mixture["speeches"] / sum(stage.mixture.values())
        assert share == pytest.approx(0.16)
    assert stages[-1].zero_stage == 3


@pytest.mark.parametrize("name", PLANS)
def test_a_resolved_spec_reads_back_equal(name: str, tmp_path: Path) -> None:
    spec = load_job(JOBS / f"{name}.yaml", check_files=False)
    (tmp_path / "spec.yaml").write_text(resolved_yaml(spec))
    again = load_job(tmp_path / "spec.yaml", check_files=False)
    assert again == spec
    assert spec_digest(again) == spec_digest(spec)
    assert JobSpec.model_validate(resolved(spec)) == spec


def test_awkward_values_survive_the_round_trip(tmp_path: Path) -> None:
    text = (JOBS / "quickstart.yaml").read_text()
    for old, new in {
        "name: quickstart": 'name: "1e6"',
        "every: 20 steps": "every: 0.0001s",
        "context_length: 1Ki": "context_length: 125Ki",
        "global_batch_tokens: 2Ki": "global_batch_tokens: 250Ki",
        "sequence_parallel: 1, data_parallel: auto": "sequence_parallel: {ring: 1, heads: 2}",
        "seed: 0": "seed: -3\ntracking: {mlflow: off, experiment: 'true'}",
        "recipes/quickstart.yaml": str(JOBS / "recipes" / "quickstart.yaml"),
    }.items():
        assert old in text
        text = text.replace(old, new, 1)
    (tmp_path / "odd.yaml").write_text(text)
    spec = load_job(tmp_path / "odd.yaml", check_files=False)
    assert (spec.name, spec.stages[0].context_length) == ("1e6", 128_000)
    (tmp_path / "again.yaml").write_text(resolved_yaml(spec))
    assert load_job(tmp_path / "again.yaml", check_files=False) == spec


def test_the_digest_sees_meaning_and_nothing_else(tmp_path: Path) -> None:
    job = """\
kind: train
name: a
data: {sources: {x: {shards: x}, y: {shards: "s3://one/y"}}}
stages:
- {name: s, context_length: 4Ki, rope_theta: 1e4, steps: 1, global_batch_tokens: 4Ki,
   learning_rate: {peak: 1}, mixture: {x: 1, y: 2}}
"""
    variants = {
        "same": job.replace("{x: 1, y: 2}", "{y: 2.0, x: 1.0}")
        .replace("4Ki,", "4096,")
        .replace("name: a", "# a comment\nname: 'a'"),
        "elsewhere": job,
        "other": job.replace("1e4", "1e5"),
        "bucket": job.replace("one/y", "two/y"),
    }
    (tmp_path / "job.yaml").write_text(job)
    (tmp_path / "elsewhere").mkdir()
    digests = {"": spec_digest(load_job(tmp_path / "job.yaml", check_files=False))}
    for name, text in variants.items():
        path = tmp_path / ("elsewhere/job.yaml" if name == "elsewhere" else f"{name}.yaml")
        path.write_text(text)
        digests[name] = spec_digest(load_job(path, check_files=False))
    assert digests[""] == digests["same"] == digests["elsewhere"]
    assert len(set(digests.values())) == 3


def test_generated_files_are_current() -> None:
    """Run ``python -m ringworld_jobs.schema`` when this fails."""
    command = [sys.executable, "-m", "ringworld_jobs.schema", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
