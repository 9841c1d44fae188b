"""The job spec: what one YAML file may say, and the type and limits of each value.

Every model refuses unknown keys. What one field cannot know alone (does the mesh fit the workers,
does the mixture name a source) is checked in ``curriculum.py``; reading files, line numbers and
messages are in ``load.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ringworld_jobs.units import Bytes, ContextLength, Every, Interval, Seconds, Tokens
from ringworld_model.config import PRESETS, ModelConfig, RopeForm, RopeScaling, preset

Auto = Literal["auto"]
Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class Spec(BaseModel):
    """Base of every part: immutable, documented by its field docstrings, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class VisionSpec(Spec):
    """The visual vocabulary."""

    codebook_size: Annotated[int, Field(ge=0)] | None = None
    """VQ codes of the vision table; empty takes those of init_from, where it has any, else the data
    recipe's, else the preset's; 0 builds a text-only model."""


class RopeScalingSpec(Spec):
    """Llama 3's stretch of the rotary embedding. It works on the frequencies that a stage's
    rope_theta gives, whatever theta that is; a curriculum that raises theta mostly wants none."""

    factor: Annotated[float, Field(ge=1)]
    """What the frequencies of slow pairs are divided by."""
    low_freq_factor: Positive
    """Pairs that turn fewer times than this within the original length are slow."""
    high_freq_factor: Positive
    """Pairs that turn more often than this are left as they are; above low_freq_factor."""
    original_max_position_embeddings: Size
    """The original length, in tokens."""

    @model_validator(mode="after")
    def _ordered(self) -> RopeScalingSpec:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} is not below high_freq_factor "
                f"{self.high_freq_factor:g}; Llama 3 has 1 and 4"
            )
        return self


class ModelSpec(Spec):
    """The shape of the model: a preset, with any field replaced, or that of given weights."""

    preset: Annotated[str, Field(json_schema_extra={"enum": list(PRESETS)})] = "tiny"
    """A named shape: tiny, LWM's 7b, llama2-7b, llama3-8b and others. Left out beside
    `init_from: hf:...`, the folder's config.json gives the shape."""
    init_from: str | None = None
    """Weights that the first stage starts from: hf:FOLDER is a Llama-family checkpoint in Hugging
    Face's layout, lwm:FILE a parameter file of the Large World Model's JAX release (with its
    preset). Relative to this file. Empty draws the weights from `seed`, as it does vision tables
    that the checkpoint lacks."""
    hidden_size: Size | None = None
    """Width of the residual stream."""
    ffn_size: Size | None = None
    """Inner width of the SwiGLU MLP."""
    num_layers: Size | None = None
    """Decoder layers."""
    num_heads: Size | None = None
    """Query heads."""
    num_kv_heads: Size | None = None
    """Key and value heads (grouped-query attention when fewer than num_heads)."""
    head_dim: Size | None = None
    """Width of one head; empty means hidden_size / num_heads."""
    text_vocab_size: Size | None = None
    """Rows of the text table; empty takes those of init_from, else the data recipe's tokenizer
    size, else the preset's."""
    norm_eps: Positive | None = None
    """Epsilon of every RMSNorm."""
    rope_form: RopeForm | None = None
    """Which pairs RoPE rotates: half (Hugging Face) or interleaved (Meta, LWM)."""
    rope_scaling: RopeScalingSpec | Literal["none"] | None = None
    """Llama 3's stretch of RoPE, in every stage, on top of the stage's rope_theta; none turns the
    preset's (llama3.2-1b has one) or the checkpoint's off."""
    tie_text_embeddings: bool | None = None
    """Share the text table with the text head."""
    tie_vision_embeddings: bool | None = None
    """Share the vision table with the vision head."""
    init_std: Positive | None = None
    """Standard deviation of the initial weights."""
    vision: VisionSpec = VisionSpec()
    """The visual vocabulary."""

    def config(
        self, *, text_vocab_size: int | None = None, codebook_size: int | None = None
    ) -> ModelConfig:
        """The model's shape; the arguments fill in what the spec leaves to the data.

        Args:
            text_vocab_size: the tokenizer's size, used where the spec names none.
            codebook_size: the codebook's size, used where the spec names none.

        Raises:
            KeyError: unknown preset.
            ValueError: an impossible shape.
        """
        apart = {"preset", "vision", "init_from", "rope_scaling"}
        overrides = self.model_dump(exclude=apart, exclude_none=True)
        overrides.setdefault("text_vocab_size", text_vocab_size)
        codes = (
            self.vision.codebook_size if self.vision.codebook_size is not None else codebook_size
        )
        config = preset(self.preset, **overrides, vision_codebook_size=codes)
        if self.rope_scaling is None:
            return config
        scaling = None
        if self.rope_scaling != "none":
            scaling = RopeScaling(**self.rope_scaling.model_dump())
        return replace(config, rope_scaling=scaling)


class DocumentsSpec(Spec):
    """Which examples are taken, by their length."""

    min_tokens: Tokens | None = None
    """Shorter examples are left out."""
    max_tokens: Tokens | None = None
    """Examples of this length and longer ones are left out."""

    @model_validator(mode="after")
    def _ordered(self) -> DocumentsSpec:
        least, most = self.min_tokens, self.max_tokens
        if least is not None and most is not None and most <= least:
            raise ValueError(
                f"max_tokens {most:,} is not above min_tokens {least:,}; nothing would be left"
            )
        return self

    def keeps(self, length: int) -> bool:
        """Whether an example of so many tokens is kept."""
        return (self.min_tokens or 0) <= length and (
            self.max_tokens is None or length < self.max_tokens
        )


class SourceSpec(Spec):
    """Something that a mixture may draw from: a dataset that is prepared already, or the examples
    of a certain length of one."""

    shards: str | None = None
    """A prepared dataset: a folder (it holds meta.json) as `ringworld data build` wrote it,
    relative to this file, or s3://BUCKET/FOLDER, whose shards are fetched as they are needed."""
    dataset: Name | None = None
    """Instead of shards: a dataset of data.recipe, to take only some of its examples."""
    documents: DocumentsSpec = DocumentsSpec()
    """Which training examples are drawn, by their length; the others are left out. Held-out
    examples are scored whatever their length, so that stages can be compared."""

    @model_validator(mode="after")
    def _one(self) -> SourceSpec:
        if (self.shards is None) == (self.dataset is None):
            raise ValueError(
                "give shards (a prepared dataset) or dataset (one of data.recipe), one of them"
            )
        return self


class ShardCacheSpec(Spec):
    """Where the shards of remote datasets are kept on each node, shared by its workers."""

    folder: str = ".ringworld/shards"
    """A folder on the node's own disk. Relative to the working directory."""
    max_bytes: Bytes = 64 * 2**30
    """Most bytes that the folder takes; shards that were not used for longest go first. It holds
    the shards that are shuffled together, eight of each remote source, at least."""


class DataSpec(Spec):
    """Where training rows come from."""

    recipe: str | None = None
    """Data recipe (YAML) that is built before the first stage, if it is not in the cache yet; each
    of its datasets is a source. Relative to this file."""
    cache: str = ".ringworld/data"
    """Folder of prepared data, one entry a content digest. Relative to the working directory."""
    sources: dict[str, SourceSpec] = {}
    """Further sources by name: prepared datasets, and parts of datasets."""
    shard_cache: ShardCacheSpec = ShardCacheSpec()
    """Where the shards of remote datasets are kept."""

    def places(self, prepared: Mapping[str, str]) -> dict[str, str]:
        """The folder or URL of every source.

        Args:
            prepared: folder of each of the recipe's datasets.

        Raises:
            KeyError: a source is of a dataset that the recipe does not have.
        """
        return dict(prepared) | {
            name: prepared[source.dataset or ""] if source.shards is None else source.shards
            for name, source in self.sources.items()
        }


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

    min: Size = 1
    """Fewest workers that a stage may run on."""
    max: Size = 1
    """Most workers that a stage may take."""

    @model_validator(mode="after")
    def _ordered(self) -> WorkersSpec:
        if self.min > self.max:
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
    """Higher runs first."""


class CheckpointSpec(Spec):
    """When and where the state is saved. The end of each stage is always saved."""

    store: str = "file://runs"
    """Where checkpoints go: file://PATH, where a relative PATH is under the working directory. The
    run's name is appended."""
    every: Every = Interval(seconds=900.0)
    """Time or steps between checkpoints inside a stage: `15min`, `20 steps`."""
    keep: Size = 2
    """Checkpoints kept inside a stage; a stage's last is always kept."""


class TrackingSpec(Spec):
    """Where MLflow keeps the run."""

    mlflow: str = "auto"
    """Tracking URI; auto is a sqlite file in the run's folder; off turns MLflow off."""
    experiment: str = "ringworld"
    """MLflow experiment."""


class RecoverySpec(Spec):
    """What happens when a worker fails."""

    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Restarts without progress (no new committed checkpoint in between) before the job fails."""
    stall_timeout: Seconds = Field(default=300.0, validate_default=False)
    """A worker that completes no step or save for so long is taken for dead: `300s`, `10min`."""


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

    layout: Literal["auto", "block_cyclic", "contiguous", "zigzag", "striped"] = "auto"
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
    """fresh: the stage before gives its weights only; inherit: its optimizer moments too."""
    validation_rows: Annotated[int, Field(ge=0)] = 0
    """Held-out rows scored at the stage's end; 0 scores none."""
    parity: bool | ParitySpec = False
    """Before the first step, prove on the stage's own workers that its ring gives one worker's loss
    and gradients, else fail: true, or how much to compute."""

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
