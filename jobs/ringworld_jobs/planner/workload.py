"""What one worker of a stage has to hold and compute, in counts that no hardware changes.

Names: E hidden size, F ffn size, H query heads and K key heads of width D, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.spec import JobSpec, StageSpec
from ringworld_model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One stage on one mesh.

    Attributes:
        stage: its spec.
        model: the model's shape.
        mesh: sizes of the axes.
        has_moments: AdamW keeps two moments; plain SGD none.
        document_tokens: mean length of a document, at most the context; what attention sees.
    """

    stage: StageSpec
    model: ModelConfig
    mesh: MeshSize
    has_moments: bool
    document_tokens: float

    @property
    def world_size(self) -> int:
        """Workers; ZeRO shards over all of them."""
        return self.mesh.world_size

    @property
    def element_bytes(self) -> int:
        """Bytes of the compute dtype."""
        return 2 if self.stage.precision == "bf16" else 4

    @property
    def zero_stage(self) -> int:
        """As the engine takes it: 0 with bf16 runs as 1."""
        if self.stage.zero_stage == 0 and self.stage.precision == "bf16":
            return 1
        return self.stage.zero_stage

    @property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return self.model.num_parameters()

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's matrices."""
        model = self.model
        projections = 2 * model.num_heads + 2 * model.num_kv_heads
        attention = model.hidden_size * model.head_dim * projections
        return attention + self.mlp_parameters

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one layer's MLP."""
        return 3 * self.model.hidden_size * self.model.ffn_size

    @property
    def largest_vocabulary(self) -> int:
        """Rows of the larger head."""
        return max(self.model.text_vocab_size, self.model.vision_vocab_size)

    @property
    def query_width(self) -> int:
        """Width of all query heads, H * D."""
        return self.model.num_heads * self.model.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads, K * D."""
        return self.model.num_kv_heads * self.model.head_dim

    @property
    def local_tokens(self) -> int:
        """Tokens of one micro-batch on one worker."""
        rows = self.stage.micro_batch_size
        return rows * -(-self.stage.context_length // self.mesh.sequence_parallel_size)

    @property
    def accumulation(self) -> int:
        """Micro-batches of one step on one ring."""
        at_once = self.mesh.data_parallel_size * self.stage.micro_batch_size
        return max(1, self.stage.rows_per_step // at_once)

    @property
    def step_tokens(self) -> int:
        """Tokens of one step over all workers, padding included."""
        return self.stage.rows_per_step * self.stage.context_length

    @property
    def row_pairs(self) -> float:
        """Query-key pairs of a row that a causal mask inside each document leaves visible."""
        return self.stage.context_length * (self.document_tokens + 1) / 2

    @property
    def micro_pairs(self) -> float:
        """Such pairs of one micro-batch on one worker, all heads; the layout balances them."""
        return self.stage.micro_batch_size * self.row_pairs / self.mesh.sequence_parallel_size

    @property
    def matrix_flops(self) -> float:
        """Forward FLOPs of one micro-batch on one worker in the layers' matrices."""
        return 2.0 * self.model.num_layers * self.layer_parameters * self.local_tokens

    @property
    def head_flops(self) -> float:
        """FLOPs, of three products, in the heads: each target passes through its modality's."""
        vocabulary = self.largest_vocabulary
        return 6.0 * self.model.hidden_size * vocabulary * self.local_tokens

    @property
    def attention_flops(self) -> float:
        """Forward FLOPs of one micro-batch on one worker in attention: two products a pair."""
        return 4.0 * self.model.num_layers * self.query_width * self.micro_pairs

    @property
    def model_flops(self) -> float:
        """FLOPs of a whole step over all workers, nothing that is recomputed counted."""
        per_worker = 3 * self.matrix_flops + self.head_flops + 3 * self.attention_flops
        return per_worker * self.accumulation * self.world_size


def workload(spec: JobSpec, index: int, model: ModelConfig, mesh: MeshSize) -> Workload:
    """A stage's workload.

    Documents are taken to fill the context, unless the spec says that all of a source are shorter:
    then a row holds several, and attention has less to do.

    Args:
        spec: the job.
        index: the stage.
        model: the model's shape, the data's vocabularies filled in where they are known.
        mesh: on which it runs.
    """
    stage = spec.stages[index]
    return Workload(
        stage=stage,
        model=model,
        mesh=mesh,
        has_moments=spec.optimizer.name == "adamw",
        document_tokens=_document_tokens(spec, stage),
    )


def _document_tokens(spec: JobSpec, stage: StageSpec) -> float:
    """By tokens, over the mixture."""
    total = sum(stage.mixture.values())
    mean = 0.0
    for name, share in stage.mixture.items():
        source = spec.data.sources.get(name)
        longest = source.documents.max_tokens if source is not None else None
        mean += share / total * min(stage.context_length, longest or stage.context_length)
    return mean
