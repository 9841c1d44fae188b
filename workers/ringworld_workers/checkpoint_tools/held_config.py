"""The shape of the model that a checkpoint holds. No torch here."""

from __future__ import annotations

from dataclasses import replace

from ringworld_jobs.spec import JobSpec
from ringworld_model.config import SPARE_VISION_IDS, ModelConfig
from ringworld_model.hf_layout import parameter_shapes
from ringworld_workers.checkpoint.layout import CheckpointError, CheckpointRef, Manifest


def held_config(spec: JobSpec, manifest: Manifest, ref: CheckpointRef) -> ModelConfig:
    """The shape of a checkpoint's model: the spec's, with tables as large as the checkpoint's.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    held = manifest.tensors
    config = replace(
        spec.model.config(),
        text_vocab_size=held.get("text_embed.weight", (1,))[0],
        vision_codebook_size=held.get("vision_embed.weight", (SPARE_VISION_IDS,))[0]
        - SPARE_VISION_IDS,
    )
    wanted = parameter_shapes(config)
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            raise CheckpointError(
                f"checkpoint {ref.key} is of another model than its spec: parameter {name} is "
                f"{held.get(name, 'absent')} in it and {wanted.get(name, 'absent')} in the spec's"
            )
    return config
