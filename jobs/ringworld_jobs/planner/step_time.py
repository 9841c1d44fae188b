"""How long one optimizer step takes, and what of it: work over rate, transfers over bandwidth.

What is sent is *hidden* as far as there is computation to run beside it, and *exposed* beyond.
"""

from __future__ import annotations

from dataclasses import dataclass

from ringworld_jobs.planner.hardware import Device
from ringworld_jobs.planner.memory import LIVE_PARAMETERS, kept_per_token
from ringworld_jobs.planner.workload import Workload

TRANSFER_EFFICIENCY = 0.8
"""Share of a link's nominal bandwidth that large messages reach."""
MESSAGE_SECONDS = 20e-6
"""What one exchange costs however small it is."""
OPTIMIZER_BYTES = 32
"""Read and written of a parameter: master, gradient, moments; the weight."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What travels in one step, from one worker's view.

    Attributes:
        bytes_sent: in the step.
        seconds: on the link.
        exposed_seconds: what no computation hides.
        link: what it travels over: ``node`` or ``network``; empty where nothing does.
    """

    bytes_sent: float = 0.0
    seconds: float = 0.0
    exposed_seconds: float = 0.0
    link: str = ""

    @property
    def hidden_seconds(self) -> float:
        """What computation hides."""
        return self.seconds - self.exposed_seconds


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of the ring in one layer: does the rotation hide?

    Attributes:
        bytes_sent: keys and values; in the backward pass their gradients too.
        transfer_seconds: of these.
        compute_seconds: of the attention that runs meanwhile.
    """

    bytes_sent: float
    transfer_seconds: float
    compute_seconds: float

    @property
    def exposed_seconds(self) -> float:
        """Waiting at its end."""
        return max(0.0, self.transfer_seconds - self.compute_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, checkpoints left out.

    Attributes:
        layers: matrix products and what lies between them, recomputation included.
        attention: the attention kernels, recomputation included.
        heads: the vocabulary heads and the loss.
        ring: the rotation of keys and values.
        forward_hop: one of its steps in the forward pass; None without a ring.
        backward_hop: likewise in the backward pass.
        split_heads: the exchange of workers that split attention heads.
        zero: gathering weights, summing gradients.
        offload: activations on their way to host memory and back.
        optimizer: the update.
    """

    layers: float
    attention: float
    heads: float
    ring: Transfer
    forward_hop: Hop | None
    backward_hop: Hop | None
    split_heads: Transfer
    zero: Transfer
    offload: Transfer
    optimizer: float

    @property
    def compute(self) -> float:
        """Computation."""
        return self.layers + self.attention + self.heads

    @property
    def exposed(self) -> float:
        """Transfers that nothing hides."""
        parts = (self.ring, self.split_heads, self.zero, self.offload)
        return sum(part.exposed_seconds for part in parts)

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.exposed + self.optimizer


def step_time(work: Workload, device: Device) -> StepTime:
    """Estimate one optimizer step.

    Args:
        work: the stage's workload.
        device: what each worker runs on.
    """
    turns, again = work.accumulation, work.stage.memory.activation_checkpointing
    peak = device.peak(work.stage.precision)
    matrix_rate = peak * device.matmul_efficiency
    passes = 3 if again == "none" else 4
    matrices = passes * work.matrix_flops
    if work.stage.memory.mlp_tile_tokens and again == "none":
        # The backward pass makes gate and up anew.
        matrices += 4.0 / 3 * work.mlp_parameters * work.model.num_layers * work.local_tokens
    layers = matrices / matrix_rate
    if not device.is_cpu:
        layers += elementwise_bytes(work) / device.memory_bandwidth
    layers = max(layers, work.model.num_layers * device.layer_seconds)
    forwards = 2 if again == "full" else 1
    forward = work.attention_flops / (peak * device.forward_efficiency)
    # Five products, where the forward pass has two: the scores are computed again.
    backward = 2.5 * work.attention_flops / (peak * device.backward_efficiency)
    attention = forwards * forward + backward
    ring, hops = _ring(work, device, forwards, forward, backward)
    compute = turns * (layers + attention + work.head_flops / matrix_rate)
    offload = _offload(work, device, compute)
    busy = ring.seconds - ring.exposed_seconds
    return StepTime(
        layers=turns * layers,
        attention=turns * attention,
        heads=turns * work.head_flops / matrix_rate,
        ring=ring,
        forward_hop=hops[0],
        backward_hop=hops[1],
        split_heads=_split_heads(work, device, forwards),
        zero=_zero(work, device, max(0.0, compute - busy)),
        offload=offload,
        optimizer=_optimizer(work, device),
    )


def elementwise_bytes(work: Workload) -> float:
    """Read and written between the matrix products of one micro-batch: norms, RoPE, SwiGLU, sums.

    Forward, backward twice as much, and the forward pass again where it is recomputed.
    """
    model = work.model
    width = 12 * model.hidden_size + 3 * (work.query_width + work.key_width) + 5 * model.ffn_size
    passes = 3 if work.stage.memory.activation_checkpointing == "none" else 4
    return float(passes * model.num_layers * work.local_tokens * width * work.element_bytes)


def link_of(work: Workload, device: Device, group: int) -> tuple[str, float]:
    """The slowest link between neighbours in a group of that many consecutive workers.

    Returns:
        ``node`` or ``network``, and the bytes a second that it reaches.
    """
    if group <= device.devices_per_node:
        return "node", device.link_bandwidth * TRANSFER_EFFICIENCY
    return "network", device.network_bandwidth * TRANSFER_EFFICIENCY


def _ring(
    work: Workload, device: Device, forwards: int, forward: float, backward: float
) -> tuple[Transfer, tuple[Hop | None, Hop | None]]:
    """The rotation of one step, and one hop of either pass.

    ``forward`` and ``backward`` are a micro-batch's seconds in the attention kernel.
    """
    size, num_layers = work.mesh.ring_size, work.model.num_layers
    if size == 1:
        return Transfer(), (None, None)
    link, bandwidth = link_of(work, device, work.mesh.sequence_parallel_size)
    # A worker turns its share of the key heads, of all tokens of its place.
    values = work.local_tokens * _turned_width(work)
    sent = (2.0 * values * work.element_bytes, 2.0 * values * (work.element_bytes + 4))

    def hop(num_bytes: float, seconds: float) -> Hop:
        transfer = num_bytes / bandwidth + MESSAGE_SECONDS
        beside = seconds / num_layers / size if device.overlaps else 0.0
        return Hop(num_bytes, transfer, beside)

    hops = hop(sent[0], forward), hop(sent[1], backward)
    count = work.accumulation * num_layers * (size - 1)
    times = (forwards, 1)
    return (
        Transfer(
            count * sum(n * h.bytes_sent for n, h in zip(times, hops, strict=True)),
            count * sum(n * h.transfer_seconds for n, h in zip(times, hops, strict=True)),
            count * sum(n * h.exposed_seconds for n, h in zip(times, hops, strict=True)),
            link,
        ),
        hops,
    )


def _turned_width(work: Workload) -> float:
    """Width of the key heads that a worker turns, times the tokens per token of its own."""
    heads = work.mesh.heads_size
    share = max(1, -(-work.model.num_kv_heads // heads))
    return share * work.model.head_dim * heads


def _split_heads(work: Workload, device: Device, forwards: int) -> Transfer:
    """Workers of one ring place trade tokens for heads, and back; nothing runs meanwhile."""
    heads = work.mesh.heads_size
    if heads == 1:
        return Transfer()
    link, bandwidth = link_of(work, device, heads)
    width = 2 * (work.query_width + work.key_width)  # q, k, v out; the result back
    once = work.local_tokens * width * work.element_bytes * (heads - 1) / heads
    sent = work.accumulation * work.model.num_layers * (forwards + 2) * once
    seconds = sent / bandwidth
    return Transfer(sent, seconds, seconds, link)


def _zero(work: Workload, device: Device, beside: float) -> Transfer:
    """What ZeRO sends in one step; stage 3 sends beside ``beside`` seconds of computation."""
    world, number = work.world_size, float(work.num_parameters)
    if world == 1:
        return Transfer()
    weights, gradients = number * work.element_bytes, number * 4.0
    turns = work.accumulation
    if work.zero_stage == 0:
        total = 2 * gradients
    elif work.zero_stage == 1:
        total = gradients + weights
    elif work.zero_stage == 2:
        total = turns * gradients + weights
    else:
        # Gathered for the forward pass, and again for the backward pass unless all still are there.
        gathers = 1 if number <= LIVE_PARAMETERS else 2
        total = turns * (gathers * weights + gradients)
    sent = total * (world - 1) / world
    link, bandwidth = "node", device.link_bandwidth
    if world > device.devices_per_node:
        # Each node's devices share the way out: every byte crosses it once.
        link = "network"
        bandwidth = min(bandwidth, device.network_bandwidth * device.devices_per_node)
    seconds = sent / (bandwidth * TRANSFER_EFFICIENCY)
    hides = work.zero_stage == 3 and device.overlaps
    return Transfer(sent, seconds, max(0.0, seconds - beside) if hides else seconds, link)


def _offload(work: Workload, device: Device, compute: float) -> Transfer:
    """Activations leave in the forward pass and come back in the backward pass."""
    if not work.stage.memory.activation_offload or device.is_cpu:
        return Transfer()
    layers = work.model.num_layers - 1
    sent = 2.0 * work.accumulation * layers * kept_per_token(work) * work.local_tokens
    seconds = sent / (device.bus_bandwidth * TRANSFER_EFFICIENCY)
    # Out within the forward pass, a third of the computation or less; the rest has time enough.
    return Transfer(sent, seconds, max(0.0, seconds / 2 - compute / 4), "bus")


def _optimizer(work: Workload, device: Device) -> float:
    share = work.num_parameters / (work.world_size if work.zero_stage else 1)
    seconds = OPTIMIZER_BYTES * share / device.memory_bandwidth
    if work.stage.memory.optimizer_offload and not device.is_cpu:
        moved = share * (4 + work.element_bytes)
        bus = moved / (device.bus_bandwidth * TRANSFER_EFFICIENCY)
        seconds = OPTIMIZER_BYTES * share / device.host_bandwidth + bus
    return seconds
