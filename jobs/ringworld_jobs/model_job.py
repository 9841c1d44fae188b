"""What jobs that ask a model that is there already share: which model, and on what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from ringworld_jobs.evaluate_spec import EvaluateSpec
from ringworld_jobs.mesh import LOCAL_TOKENS, MeshSize
from ringworld_jobs.spec import (
    CheckpointSpec,
    MeshSpec,
    RecoverySpec,
    ResourcesSpec,
    SequenceParallelSpec,
    StageSpec,
    TrackingSpec,
)
from ringworld_jobs.spec_base import Name, Spec
from ringworld_jobs.units import ContextLength


class ModelJob(Spec, ABC):
    """A job without stages, on one model; its kind says what is asked."""

    kind: str
    """What the file is."""
    name: Name
    """Name of the job; its runs are name-1, name-2, ..."""
    seed: int = 0
    """Seed of all that is drawn."""
    model: Annotated[str, Field(min_length=1)]
    """Which model: RUN, RUN/STAGE or RUN/STAGE/STEP of a run, where RUN is its id, a path or
    s3://BUCKET/PREFIX/RUN; or a folder of weights in Hugging Face's layout. Of a run that is still
    at work, the newest checkpoint at this moment."""
    tokenizer: str | None = None
    """File or folder of its text tokenizer, where that is not found by itself."""
    codebook: str | None = None
    """File or folder of its codebook of frames, likewise."""
    context_length: ContextLength | None = None
    """Longest row that is asked for; empty: what the model was trained for."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of weights and computation."""
    mesh: MeshSpec = MeshSpec()
    """Layout of the workers: rings take what is asked in turn, and every worker has the whole
    model. Heads are not split."""
    resources: ResourcesSpec = ResourcesSpec()
    """What the job asks of the cluster."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """Its store is where answers and logs are kept; the rest says nothing here."""
    tracking: TrackingSpec = TrackingSpec()
    """Where MLflow keeps the run."""
    recovery: RecoverySpec = RecoverySpec()
    """What happens when a worker fails. Answers that there are, are not asked for again."""

    @property
    def stages(self) -> list[StageSpec]:
        """It trains none."""
        return []

    @property
    @abstractmethod
    def evaluations(self) -> EvaluateSpec:
        """What is asked, by task."""

    def mesh_for(self, context_length: int) -> MeshSize:
        """The mesh of its gang: a ring that leaves each worker at most 32Ki tokens of a row, and as
        many rings as resources.workers.max holds, where `mesh` does not say otherwise.

        Args:
            context_length: longest row that is asked for.
        """
        most, asked = self.resources.workers.max, self.mesh.sequence_parallel
        rings = self.mesh.data_parallel
        if isinstance(asked, SequenceParallelSpec):
            size = asked.ring * asked.heads
        elif asked == "auto":
            left = most if rings == "auto" else max(1, most // rings)
            size = min(-(-context_length // LOCAL_TOKENS), left)
        else:
            size = asked
        return MeshSize(size, max(1, most // size) if rings == "auto" else rings)
