"""Device and host memory of one worker, by part. The formulas are those of docs/memory.md."""

from __future__ import annotations

from dataclasses import dataclass

from ringworld_jobs.planner.hardware import Device
from ringworld_jobs.planner.workload import Workload
from ringworld_jobs.spec import JobSpec

BUCKET_ELEMENTS = 200_000_000
"""Elements of a bucket that gradients travel in, at most: the engine's setting."""
LIVE_PARAMETERS = 1_000_000_000
"""Gathered parameters that ZeRO-3 keeps, at most: DeepSpeed's default."""
FEWER_LIVE_PARAMETERS = 200_000_000
"""Likewise where parameters are offloaded: the engine's setting."""
RING_CHUNK_BYTES = 64 << 20
"""What dK of the key heads that travel together takes, at most, on a device: the ring's setting."""
CPU_RING_CHUNK_BYTES = 8 << 20
RING_SLOTS = 4
"""Pairs of K and V, in fp32, that the backward pass has on their way at one time."""
PREFETCHED_STEPS = 3
"""Steps whose rows are in host memory: two ahead and the one at hand."""
ROW_BYTES = 30
"""Of one token in a batch: two ids of 8 bytes, and segment, position, weight and modalities."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What one worker takes, in bytes.

    Attributes:
        device: by part; their sum is the peak.
        working: what the part "working" of the device is the largest of.
        ring_bytes: what travels round the ring; a part of the working layer.
        host: by part, beside the device's where that is host memory too.
    """

    device: dict[str, float]
    working: dict[str, float]
    ring_bytes: float
    host: dict[str, float]

    @property
    def device_bytes(self) -> float:
        """Peak on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        """In host memory."""
        return sum(self.host.values())

    @property
    def allocated_bytes(self) -> float:
        """What the allocator reports as its peak: without the driver's and what lies unused."""
        return self.device_bytes - self.device["driver"] - self.device["reserve"]


def memory_of(spec: JobSpec, work: Workload, device: Device) -> Memory:
    """Estimate a worker's peak memory.

    Args:
        spec: the job.
        work: the stage's workload.
        device: what it runs on.
    """
    levers = work.stage.memory
    ring = ring_bytes(work, device.is_cpu)
    working = {"layer": layer_bytes(work) + ring, "loss": loss_bytes(work)}
    kept = kept_bytes(work, copies_wait=device.overlaps)
    parts = {**states(work), "activations": kept, "working": max(working.values())}
    parts["driver"] = device.context_bytes
    parts["reserve"] = device.reserve_share * (parts["activations"] + parts["working"])
    host = {"process": device.process_bytes}
    if levers.optimizer_offload:
        host["offloaded optimizer"] = _per_worker(work, _optimizer_bytes(work) + 4)
    if levers.parameter_offload:
        host["offloaded weights"] = _per_worker(work, work.element_bytes)
    if levers.activation_offload:
        host["offloaded activations"] = offloaded_bytes(work)
    share = checkpoint_bytes(work) / work.world_size
    host["snapshot"] = min(share, spec.checkpoint.max_host_bytes or share)
    rows = work.accumulation * work.local_tokens
    host["data"] = float(PREFETCHED_STEPS * rows * ROW_BYTES)
    return Memory(parts, working, ring, host)


def states(work: Workload) -> dict[str, float]:
    """Weights, gradients, optimizer states, and what ZeRO gathers and sends them in."""
    levers, zero, number = work.stage.memory, work.zero_stage, float(work.num_parameters)
    per_weight = work.element_bytes
    weights = _per_worker(work, per_weight) if zero == 3 else number * per_weight
    gradients = _per_worker(work, 4) if zero >= 2 else number * 4
    # At stage 0 the weights themselves are the masters.
    optimizer = number * (_optimizer_bytes(work) - 4)
    if zero:
        optimizer = _per_worker(work, _optimizer_bytes(work))
    gathered = buckets = 0.0
    if zero:
        # Stage 3 sends one bucket while it fills the other.
        buckets = min(BUCKET_ELEMENTS, number) * 4 * (2 if zero == 3 else 1)
    if zero == 3:
        live = FEWER_LIVE_PARAMETERS if levers.parameter_offload else LIVE_PARAMETERS
        gathered = min(live, number) * per_weight
    if levers.optimizer_offload:
        optimizer = gradients = 0.0
    if levers.parameter_offload:
        weights = 0.0
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "gathered": gathered,
        "buckets": buckets,
    }


def kept_per_token(work: Workload) -> float:
    """Bytes that one layer keeps of a token for the backward pass."""
    model, size = work.model, work.element_bytes
    attention = size * (model.hidden_size + 2 * work.query_width + 2 * work.key_width)
    sums = 4.0 * model.num_heads
    if work.stage.memory.activation_checkpointing == "full":
        return float(size * model.hidden_size)
    if work.stage.memory.activation_checkpointing == "attention_saved":
        return attention + sums
    inner = 0 if work.stage.memory.mlp_tile_tokens else 4 * model.ffn_size
    return attention + sums + size * (5 * model.hidden_size + inner)


def kept_bytes(work: Workload, copies_wait: bool = True) -> float:
    """What all layers keep on the device for the backward pass.

    Args:
        work: the stage's workload.
        copies_wait: what is offloaded is copied beside the computation, so that two layers' may be
            on their way at one time beside the last layer's, which stays; else one's.
    """
    layers = work.model.num_layers
    if work.stage.memory.activation_offload:
        layers = min(3 if copies_wait else 2, layers)
    return layers * kept_per_token(work) * work.local_tokens


def offloaded_bytes(work: Workload) -> float:
    """What all layers but the last keep in host memory."""
    return (work.model.num_layers - 1) * kept_per_token(work) * work.local_tokens


def layer_bytes(work: Workload) -> float:
    """The most that one layer has at one time in the backward pass, beside what is kept."""
    model, size, tokens = work.model, work.element_bytes, work.local_tokens
    hidden, queries, keys = model.hidden_size, work.query_width, work.key_width
    attention = size * (7 * hidden + 3 * queries + 2 * keys) + 4 * (queries + 4 * keys)
    tile = work.stage.memory.mlp_tile_tokens
    # Of what is at work, this is counted with what the layers keep.
    kept = {
        "none": kept_per_token(work),
        "attention_saved": 2.0 * size * (queries + keys),
        "full": 0.0,
    }[work.stage.memory.activation_checkpointing]
    if tile:
        sums = 4.0 * work.mlp_parameters
        inner = 6.0 * size * model.ffn_size * min(tile, tokens)
        return max(size * hidden, attention - kept) * tokens + sums + inner
    mlp = size * (6 * hidden + 2 * queries + 2 * keys + 6 * model.ffn_size)
    return max(size * hidden, attention - kept, mlp - kept) * tokens


def ring_bytes(work: Workload, on_cpu: bool = False) -> float:
    """Keys, values and their gradients that travel; none where nothing does."""
    if work.mesh.ring_size == 1:
        return 0.0
    # With split heads a worker has a share of the heads, and all tokens of its ring place.
    heads = max(1, -(-work.model.num_kv_heads // work.mesh.heads_size))
    tokens = work.local_tokens * work.mesh.heads_size
    head = 4.0 * tokens * work.model.head_dim
    limit = CPU_RING_CHUNK_BYTES if on_cpu else RING_CHUNK_BYTES
    chunk = max(head, min(heads * head, limit))
    return RING_SLOTS * 2 * chunk


def loss_bytes(work: Workload) -> float:
    """The heads at work: logits of one tile, the gradients that are made with them, the inputs."""
    model, size, tokens = work.model, work.element_bytes, work.local_tokens
    per_logit = 4 if size == 4 else 8
    tile = min(work.stage.loss.tile_tokens, tokens)
    logits = tile * work.largest_vocabulary * per_logit
    weights = (4 + (size if size == 2 else 0)) * work.largest_vocabulary * model.hidden_size
    return float(logits + weights + 4 * size * model.hidden_size * tokens)


def checkpoint_bytes(work: Workload) -> float:
    """Bytes of a whole checkpoint: fp32 weights and the optimizer's moments."""
    return float(work.num_parameters * _optimizer_bytes(work))


def _optimizer_bytes(work: Workload) -> int:
    """Of a parameter: its fp32 master and its moments."""
    return 12 if work.has_moments else 4


def _per_worker(work: Workload, bytes_per_parameter: float) -> float:
    return work.num_parameters * bytes_per_parameter / work.world_size
