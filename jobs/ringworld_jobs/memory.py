"""Which memory levers of a stage can be pulled together."""

from __future__ import annotations

from ringworld_jobs.mesh import MeshError, resolve_mesh
from ringworld_jobs.problem import KeyPath
from ringworld_jobs.spec import JobSpec, StageSpec
from ringworld_jobs.validate import Checked

MOST_TILES = 1024
"""Tiles of one layer on one worker. More cost time and save nothing that can be seen."""


def check_memory(checked: Checked[JobSpec], stage: StageSpec, here: KeyPath) -> None:
    """Report levers that lack what they need, and tiles that are far too small.

    Args:
        checked: the validated job; problems go into its document.
        stage: one of its stages.
        here: the stage's path.
    """
    memory, path = stage.memory, (*here, "memory")
    report = checked.document.report
    if not checked.sound(path):
        return
    if memory.activation_offload and memory.activation_checkpointing == "none":
        report(
            (*path, "activation_offload"),
            "it moves what activation_checkpointing keeps, and that is none; write "
            "activation_checkpointing: full (or attention_saved), or take activation_offload out",
        )
    if checked.sound((*here, "zero_stage")):
        if memory.optimizer_offload and stage.zero_stage == 0:
            report(
                (*path, "optimizer_offload"),
                "ZeRO moves the optimizer, and zero_stage is 0; write zero_stage: 1 (or 2, 3), or "
                "take optimizer_offload out",
            )
        if memory.parameter_offload and stage.zero_stage != 3:
            report(
                (*path, "parameter_offload"),
                f"only sharded parameters can stay in host memory, and zero_stage is "
                f"{stage.zero_stage}; write zero_stage: 3, or take parameter_offload out",
            )
    _check_tiles(checked, stage, here)


def _check_tiles(checked: Checked[JobSpec], stage: StageSpec, here: KeyPath) -> None:
    """A tile larger than the context is one tile, and right; the other way round is a slip."""
    assert checked.spec is not None
    tile = stage.memory.mlp_tile_tokens
    names = ("context_length", "global_batch_tokens", "micro_batch_size", "mesh")
    if tile is None or not checked.sound(*((*here, name) for name in names), ("resources",)):
        return
    try:
        mesh = resolve_mesh(stage, checked.spec.resources)
    except MeshError:
        return  # reported where the batch is checked
    tokens = stage.micro_batch_size * -(-stage.context_length // mesh.sequence_parallel_size)
    if tokens > tile * MOST_TILES:
        checked.document.report(
            (*here, "memory", "mlp_tile_tokens"),
            f"{tile} cuts the {tokens:,} tokens of a worker into more than {MOST_TILES:,} tiles a "
            f"layer; write {1 << (-(-tokens // MOST_TILES) - 1).bit_length()} or more (4096 is "
            "usual)",
        )
