"""What a job comes to before it starts: each stage's mesh, batch, length and model size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ringworld_jobs.load import load_recipe
from ringworld_jobs.mesh import MeshError, MeshSize, allowed_meshes, resolve_mesh
from ringworld_jobs.recipe import RecipeSpec
from ringworld_jobs.spec import JobSpec
from ringworld_model.config import ModelConfig, can_split_heads

__all__ = ["MeshError", "StagePlan", "model_config", "plan_stages", "resolve_mesh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage in numbers.

    Attributes:
        index: place in the curriculum, from 0.
        name: the stage's name.
        context_length: tokens of a whole row.
        rope_theta: base of the rotary embedding.
        ring_size: places of a ring.
        heads_size: workers of one place, which split the attention heads; 1 in a plain ring.
        sequence_parallel_size: workers that share one sequence: ring_size * heads_size.
        data_parallel_size: rings.
        world_size: workers, the product of the axes.
        local_length: tokens of one row on one worker, before the layout pads them to its blocks.
        rows_per_step: rows of one optimizer step over all workers.
        micro_batch_size: rows that a ring computes at once.
        gradient_accumulation_steps: micro-batches that each ring computes for one step.
        num_steps: optimizer steps.
        num_tokens: tokens of the stage, padding included.
        num_parameters: trainable parameters of the model.
        smaller_meshes: what it may go on with where workers are lacking, the largest first.
    """

    index: int
    name: str
    context_length: int
    rope_theta: float
    ring_size: int
    heads_size: int
    sequence_parallel_size: int
    data_parallel_size: int
    world_size: int
    local_length: int
    rows_per_step: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    num_steps: int
    num_tokens: int
    num_parameters: int
    smaller_meshes: tuple[MeshSize, ...] = ()


def plan_stages(spec: JobSpec, recipe: RecipeSpec | None = None) -> list[StagePlan]:
    """Plan every stage of a job; reads at most the job's data recipe.

    Args:
        spec: the job, as ``load_job`` returns it.
        recipe: the job's data recipe; read from `data.recipe` where it is not given and exists.

    Raises:
        MeshError: a stage that fits no mesh; ``load_job`` refuses such a job.
        JobSpecError: the recipe is invalid.
    """
    model = model_config(spec, recipe)
    num_parameters = model.num_parameters()
    may_split = partial(can_split_heads, model.num_heads, model.num_kv_heads)
    plans = []
    for index, stage in enumerate(spec.stages):
        mesh, *smaller = allowed_meshes(stage, spec.resources, may_split=may_split)
        rows = stage.rows_per_step
        plans.append(
            StagePlan(
                index=index,
                name=stage.name,
                context_length=stage.context_length,
                rope_theta=stage.rope_theta,
                ring_size=mesh.ring_size,
                heads_size=mesh.heads_size,
                sequence_parallel_size=mesh.sequence_parallel_size,
                data_parallel_size=mesh.data_parallel_size,
                world_size=mesh.world_size,
                local_length=-(-stage.context_length // mesh.sequence_parallel_size),
                rows_per_step=rows,
                micro_batch_size=stage.micro_batch_size,
                gradient_accumulation_steps=rows
                // (mesh.data_parallel_size * stage.micro_batch_size),
                num_steps=stage.num_steps,
                num_tokens=stage.num_steps * rows * stage.context_length,
                num_parameters=num_parameters,
                smaller_meshes=tuple(smaller),
            )
        )
    return plans


def model_config(spec: JobSpec, recipe: RecipeSpec | None = None) -> ModelConfig:
    """The model's shape as far as it is known before the data is built.

    A tokenizer that the recipe trains counts with its full vocabulary; one that is read from a
    file, and prepared datasets, leave the preset's size until they are read.

    Args:
        spec: the job.
        recipe: its data recipe; read from `data.recipe` where it is not given and exists.

    Raises:
        JobSpecError: the recipe is invalid.
    """
    if recipe is None and spec.data.recipe is not None and Path(spec.data.recipe).is_file():
        recipe = load_recipe(spec.data.recipe, check_files=False)
    if recipe is None:
        return spec.model.config()
    training, codebook = recipe.tokenizer.train, recipe.codebook
    return spec.model.config(
        text_vocab_size=training.vocabulary_size if training else None,
        codebook_size=codebook.codebook_size if codebook and not codebook.path else None,
    )
