"""The job spec: what one YAML file may say, and the type and limits of each value.

Every model refuses unknown keys. What one field cannot know alone (does the mesh fit the workers,
does the mixture name a source) is checked in ``curriculum.py``; reading files, line numbers and
messages are in ``load.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ringworld_jobs.evaluate_spec import EvaluateSpec, Evaluations, asked_for
from ringworld_jobs.spec_base import Auto, Name, Positive, Share, Size, Spec
from ringworld_jobs.spec_data import DataSpec, DocumentsSpec, ShardCacheSpec, SourceSpec
from ringworld_jobs.spec_model import ModelSpec, RopeScalingSpec, VisionSpec
from ringworld_jobs.units import Bytes, ContextLength, Every, Interval, Seconds, Tokens

__all__ = [
    "AttentionSpec",
    "Auto",
    "CheckpointSpec",
    "DataSpec",
    "DocumentsSpec",
    "JobSpec",
    "LearningRateSpec",
    "LossSpec",
    "LossSpikeSpec",
    "MemorySpec",
    "MeshSpec",
    "ModelSpec",
    "Name",
    "OptimizerSpec",
    "ParitySpec",
    "Positive",
    "RecoverySpec",
    "ResourcesSpec",
    "RopeScalingSpec",
    "SequenceParallelSpec",
    "ShardCacheSpec",
    "Share",
    "Size",
    "SourceSpec",
    "Spec",
    "StageSpec",
    "TrackingSpec",
    "VisionSpec",
    "WorkersSpec",
]


class OptimizerSpec(Spec):
    """The optimizer, the same in every stage."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd (plain, for exactness checks)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    """AdamW's decay rates."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: Share = 0.1
    """Decoupled weight decay, on matrices and tables."""
    decay_norms: bool = False
    """Decay norm weights too, as LWM's release does."""
    clip_norm: Share = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""


class WorkersSpec(Spec):
    """How many worker processes (one a device) the job may use."""

    min: Size | None = None
    """Fewest workers that a stage may run on. Where nodes are lacking, a stage shrinks down to
    this: see recovery.shrink_after. Empty: to one whole ring; a shorter ring would leave each
    worker more of the context than the mesh was chosen for, and it might run out of memory."""
    max: Size = 1
    """Most workers that a stage may take."""

    @model_validator(mode="after")
    def _ordered(self) -> WorkersSpec:
        if self.min is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; lower min or raise max")
        return self


class ResourcesSpec(Spec):
    """What the job asks of the cluster."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes a GPU per worker where the cluster has any, else CPUs."""
    workers: WorkersSpec = WorkersSpec()
    """How many workers."""
    cpus_per_worker: Size = 1
    """CPU cores reserved for each worker, and the threads that it computes with on CPU."""
    priority: int = 0
    """Higher runs first, and takes the workers of lower ones where it must: those save a
    checkpoint, wait in the line, and go on from there."""
    prewarm: Seconds | Literal["auto", "off"] = "auto"
    """When Ray's autoscaler is asked for the nodes of a stage that wants more workers than the one
    before it: so long before that one ends (`90s`, `5min`); off: only when it has ended. auto: as
    long before as nodes take to come, which is the longest of the last 5 waits for them in the
    controller's life; 2 min as long as there was none."""


class CheckpointSpec(Spec):
    """When and where the state is saved. The end of each stage is always saved."""

    store: str = "file://runs"
    """Where checkpoints go: file://PATH, where a relative PATH is under the working directory, or
    s3://BUCKET/PREFIX, with endpoint, region and credentials from where AWS's tools take them. The
    run's name is appended."""
    every: Every = Interval(seconds=900.0)
    """Time or steps between checkpoints inside a stage: `15min`, `20 steps`."""
    keep: Size = 2
    """Newest checkpoints of the run that are kept; at least two, whatever it says."""
    keep_stage_ends: bool = True
    """Keep the last checkpoint of every stage for ever; false: only as long as `keep` says."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What happens when a checkpoint is due and the one before is still on its way: wait for that,
    or leave this one out. The end of a stage and a stop always wait."""
    max_host_bytes: Bytes | None = None
    """Most host memory that a worker's snapshot takes; empty: what its share of the state needs. A
    share that is larger is saved piece by piece, an object each, while the step waits."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Saves that may fail in a row before the job fails. The last one of a stage is tried as often,
    and one for a stop may always fail: the next start goes on from the checkpoint before."""
    when_damaged: Literal["stop", "older"] = "stop"
    """What happens when the newest checkpoint is damaged: stop and say which older one there is, or
    set the damaged one aside and take the older one."""
    abort_unfinished_after: Seconds = Field(default=86400.0, validate_default=False)
    """Age at which what an interrupted save has left in the store is removed: `24h`."""


class TrackingSpec(Spec):
    """Where MLflow keeps the run."""

    mlflow: str = "auto"
    """Tracking URI; auto is a sqlite file in the run's folder; off turns MLflow off."""
    experiment: str = "ringworld"
    """MLflow experiment."""
    registered_model: Annotated[str, Field(pattern=r"^[^/:']+$", max_length=200)] = "auto"
    """Registered model in MLflow that each stage's last checkpoint becomes a version of; auto is
    the job's name; off registers none."""


class LossSpikeSpec(Spec):
    """A jump of the loss of a modality, or of the gradient norm, above what it was lately."""

    action: Literal["off", "warn", "rollback", "stop"] = "warn"
    """warn: an event when it begins and when it is over; rollback: go back to the newest
    checkpoint and leave out the rows of the spike; stop: fail, with what was found in the run's
    folder; off: do not look."""
    factor: Positive = 6.0
    """A jump is a value so many deviations above the median of the window. A deviation is 1.4826
    times the median absolute one, and at least 2 % of the median (25 % for the gradient norm)."""
    window: Annotated[int, Field(ge=8)] = 128
    """Steps that it is compared with. The first quarter of them after each start is not judged."""
    skip_steps: Size = 1
    """Steps whose rows a rollback leaves out, the last of them that of the spike."""


class RecoverySpec(Spec):
    """What happens when a worker fails, or training diverges."""

    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Restarts without progress (no new committed checkpoint in between) before the job fails."""
    stall_timeout: Seconds | Auto = "auto"
    """Workers that make no progress for so long are taken for dead: `300s`, `10min`. auto: inside a
    step, 10 x the longest of the last 20 steps, at least 30 s and at most 30 min; until a gang has
    done two steps, and while it saves, loads, validates or waits for data, that or 5 min, whichever
    is longer. `ringworld status` shows the present limit."""
    on_nan: Literal["rollback", "stop"] = "rollback"
    """What happens when a loss, the gradient norm or the state is no finite number. rollback: go
    back to the newest checkpoint and leave out the rows of that step, in this run for good; if the
    next step is none either, fail. stop: fail. What was found is in the run's folder."""
    loss_spike: LossSpikeSpec = LossSpikeSpec()
    """What counts as a jump of the loss, and what happens then."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 3
    """Rollbacks of a stage, for any reason, before the job fails."""
    store_timeout: Seconds = Field(default=3600.0, validate_default=False)
    """How long a run waits for a checkpoint store that does not answer before it fails. At the end
    of a stage, and after checkpoint.max_failures, its workers wait with their state; at a start the
    gang is built again."""
    shrink_after: Seconds = Field(default=60.0, validate_default=False)
    """A stage that the cluster is too small for waits so long for nodes before it goes on with
    fewer workers, down to resources.workers.min: `60s`, `10min`. Where an autoscaler adds nodes,
    longer than these take to come."""


class LearningRateSpec(Spec):
    """The learning rate over one stage."""

    peak: Positive
    """Rate after the warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """constant keeps the peak; cosine falls to `final` at the stage's last step."""
    final: Share = 0.0
    """Rate at the end of a cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises linearly from zero."""


class SequenceParallelSpec(Spec):
    """Two axes for one sequence: its tokens go round a ring, and at each place of the ring several
    workers split the attention heads. The workers of a place are neighbours, meant for one node."""

    ring: Size = 1
    """Places of the ring."""
    heads: Size = 1
    """Workers of each place. It divides the model's num_heads, and either divides num_kv_heads or
    is a multiple of it."""


class MeshSpec(Spec):
    """How the stage's workers are laid out; their number is the product."""

    sequence_parallel: Size | Auto | SequenceParallelSpec = "auto"
    """Workers that share one sequence: the ring size, or a mapping of ring and heads. auto: the
    smallest ring that leaves each worker at most 32Ki tokens."""
    data_parallel: Size | Auto = "auto"
    """Rings that train on different rows. auto: as many as resources.workers.max and the batch
    allow."""


class LossSpec(Spec):
    """How token losses are weighed."""

    weights: Literal["token", "example"] = "example"
    """token: every target weighs the same; example: every example does, as if unpacked and padded,
    and a document that is longer than the context counts as the rows that it fills."""
    text: Share = 0.5
    """Weight of the text loss among the modalities present."""
    vision: Share = 0.5
    """Weight of the vision loss among the modalities present."""
    tile_tokens: Annotated[int, Field(ge=16)] = 2048
    """Targets whose logits exist at one time; the whole [tokens, vocabulary] matrix never does."""


class MemorySpec(Spec):
    """What is recomputed, moved or cut into tiles to fit a longer context; docs/memory.md says when
    to take which. None changes what is computed."""

    activation_checkpointing: Literal["none", "attention_saved", "full"] = "none"
    """none keeps all; attention_saved keeps the attention's inputs and output and recomputes the
    rest, so that the backward pass does not run the ring's forward again; full keeps one tensor a
    layer."""
    activation_offload: bool = False
    """Keep what activation_checkpointing keeps in page-locked host memory until the backward pass
    needs it."""
    mlp_tile_tokens: Annotated[int, Field(ge=16)] | None = None
    """Tokens whose MLP is computed at one time; empty computes all of a worker's at once."""
    optimizer_offload: bool = False
    """Keep master weights and optimizer moments in host memory and update them on the CPU; needs
    zero_stage 1 or more."""
    parameter_offload: bool = False
    """Keep the sharded parameters in host memory too; needs zero_stage 3."""


class AttentionSpec(Spec):
    """How attention is computed over the ring."""

    layout: Literal[
        "auto", "block_cyclic", "contiguous", "zigzag", "document_zigzag", "striped"
    ] = "auto"
    """Which tokens each worker of a ring holds; auto counts the cost."""
    backend: Literal["auto", "cpu", "flash", "triton", "reference"] = "auto"
    """Kernel of one block; auto takes the fastest that the device and dtype allow, and says
    which."""


class ParitySpec(Spec):
    """How much is computed to prove a stage's ring before it trains."""

    layers: Size = 2
    """Layers of the model that is compared; those that it has, at most."""
    rows: Size = 1
    """Rows of the stage's first micro-batch, those that it has at most."""
    context_length: ContextLength = 4096
    """Longest row; longer ones are shortened, each document in proportion."""


class StageSpec(Spec):
    """One leg of the curriculum."""

    name: Name
    """Name of the stage, unique in the job."""
    context_length: ContextLength
    """Tokens of a whole row: 4Ki, 32Ki, 1Mi."""
    rope_theta: Positive
    """Base of the rotary embedding: 1e6, 5e7."""
    steps: Size | None = None
    """Length of the stage in optimizer steps; give this or tokens."""
    tokens: Tokens | None = None
    """Length of the stage in tokens, padding included: 4.8B; rounded up to whole steps."""
    global_batch_tokens: Tokens
    """Tokens of one optimizer step over all workers: a multiple of context_length."""
    micro_batch_size: Size = 1
    """Rows that a ring computes at once."""
    mesh: MeshSpec = MeshSpec()
    """Layout of the workers."""
    mixture: Annotated[dict[str, Positive], Field(min_length=1)]
    """Share of tokens from each source; they need not sum to 1. It replaces that of `defaults`."""
    packing: Literal["best_fit", "sequential"] = "best_fit"
    """How examples come into rows: best_fit keeps six rows open and puts each example where it fits
    best; sequential lays them one after another, as they are drawn. Attention never crosses from
    one example into another."""
    learning_rate: LearningRateSpec
    """The learning rate over the stage."""
    loss: LossSpec = LossSpec()
    """How token losses are weighed."""
    memory: MemorySpec = MemorySpec()
    """What is recomputed, moved or cut into tiles to fit a longer context."""
    attention: AttentionSpec = AttentionSpec()
    """How attention is computed over the ring."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute dtype; master weights are fp32 always."""
    optimizer_state: Literal["fresh", "inherit"] = "fresh"
    """fresh: the stage before gives its weights only; inherit: its optimizer moments too. In the
    first stage that is the run of `model.init_from: run:...`."""
    validation_rows: Annotated[int, Field(ge=0)] = 0
    """Held-out rows scored at the stage's end; 0 scores none."""
    parity: bool | ParitySpec = False
    """Before the first step, prove on the stage's own workers that its ring gives one worker's loss
    and gradients, else fail: true, or how much to compute."""
    evaluate: Evaluations | None = None
    """What the stage's model is asked once its last checkpoint is there: names of tasks, or a
    mapping of them to settings, where limits (`min_...`, `max_...`) may end the job."""

    @model_validator(mode="after")
    def _length(self) -> StageSpec:
        if (self.steps is None) == (self.tokens is None):
            given = f"steps {self.steps} and tokens {self.tokens}" if self.steps else "neither"
            raise ValueError(f"give steps or tokens, one of them; {given} given")
        return self

    @property
    def preflight(self) -> ParitySpec | None:
        """What to prove before the first step; None where nothing is asked for."""
        asked = self.parity
        return ParitySpec() if asked is True else asked or None

    @property
    def evaluations(self) -> EvaluateSpec:
        """What `evaluate` asks for, with every task's settings."""
        return asked_for(self.evaluate)

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all workers."""
        return max(1, self.global_batch_tokens // self.context_length)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage; a token budget is rounded up."""
        if self.steps is not None:
            return self.steps
        return -(-(self.tokens or 0) // (self.rows_per_step * self.context_length))


class JobSpec(Spec):
    """One training job: a model, its data and its curriculum of stages."""

    kind: Literal["train"]
    """What the file is: train."""
    name: Name
    """Name of the job; its runs are name-1, name-2, ..."""
    seed: int = 0
    """Seed of the weights and of the data order."""
    model: ModelSpec = ModelSpec()
    """The shape of the model."""
    data: DataSpec
    """Where training rows come from."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """The optimizer."""
    resources: ResourcesSpec = ResourcesSpec()
    """What the job asks of the cluster."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When and where the state is saved."""
    tracking: TrackingSpec = TrackingSpec()
    """Where MLflow keeps the run."""
    recovery: RecoverySpec = RecoverySpec()
    """What happens when a worker fails."""
    stages: Annotated[list[StageSpec], Field(min_length=1)]
    """The curriculum, in order. The file's `defaults` holds stage fields shared by all."""
