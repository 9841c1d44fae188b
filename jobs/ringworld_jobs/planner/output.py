"""What ``ringworld plan --json`` prints. Bytes, seconds, and names that stay.

docs/schema/plan.schema.json is generated from these models.
"""

from __future__ import annotations

from collections.abc import Mapping

from ringworld_jobs.planner.estimate import JobEstimate, StageEstimate
from ringworld_jobs.planner.levers import Remedy, shortage
from ringworld_jobs.planner.step_time import Hop, Transfer
from ringworld_jobs.spec_base import Spec


class TransferOutput(Spec):
    """What one worker sends in a step."""

    bytes_sent: float
    """Bytes that a worker sends in a step."""
    hidden_seconds: float
    """Time on the link while something is computed."""
    exposed_seconds: float
    """Time that is waited for."""
    link: str
    """node, network or bus: the slowest link on the way; empty where nothing is sent."""


class HopOutput(Spec):
    """One step of the ring in one layer."""

    bytes_sent: float
    """Keys and values; in the backward pass their gradients too."""
    transfer_seconds: float
    """Time on the link."""
    compute_seconds: float
    """Time of the attention that runs meanwhile."""
    exposed_seconds: float
    """What of the transfer is waited for."""


class MeshOutput(Spec):
    """The layout of a stage's workers."""

    ring: int
    """Places of a ring."""
    heads: int
    """Workers of a place, which split the attention heads."""
    data_parallel: int
    """Rings."""
    workers: int
    """Their product."""
    wanted_workers: int
    """Workers of the mesh that the spec asks for; more than `workers` where there are too few."""
    reason: str
    """Why these sizes."""


class TimeOutput(Spec):
    """One optimizer step."""

    step_seconds: float
    """The whole step, its share of the checkpoints' stall included."""
    layers_seconds: float
    """The layers' matrix products and what lies between them, recomputation included."""
    attention_seconds: float
    """The attention kernels, recomputation included."""
    heads_seconds: float
    """The vocabulary heads and the loss."""
    optimizer_seconds: float
    """The update."""
    checkpoint_stall_seconds: float
    """A step's share of what checkpoints hold up."""
    ring: TransferOutput
    """Keys and values going round."""
    forward_hop: HopOutput | None
    """One step of the ring in the forward pass; null without a ring."""
    backward_hop: HopOutput | None
    """Likewise in the backward pass."""
    split_heads: TransferOutput
    """Workers of one place trading tokens for heads."""
    zero: TransferOutput
    """Gathering weights and summing gradients."""
    offload: TransferOutput
    """Activations on their way to host memory and back."""


class CheckpointOutput(Spec):
    """The checkpoints of a stage."""

    num_bytes: float
    """Of a whole one, over all workers."""
    stall_seconds: float
    """What training waits for each."""
    save_seconds: float
    """Until it is committed, in the background."""
    load_seconds: float
    """To start from one."""


class RemedyOutput(Spec):
    """The cheapest changes with which a stage fits, tried out by estimating it again."""

    yaml: list[str]
    """What to write into the job, by line."""
    devices: int
    """Devices that it takes then."""
    device_bytes: float
    """Device memory of a worker then."""
    step_seconds: float
    """Time of a step then."""


class StageOutput(Spec):
    """One stage."""

    name: str
    """Name of the stage."""
    context_length: int
    """Tokens of a row."""
    mesh: MeshOutput
    """The layout of the workers, and why."""
    device_bytes: dict[str, float]
    """Device memory of a worker at its peak, by part; on CPU it is host memory too."""
    working_bytes: dict[str, float]
    """What the part `working` is the larger of: a layer in the backward pass with the ring's
    buffers, or the heads with a tile of logits."""
    ring_buffer_bytes: float
    """Keys, values and gradients that travel: a part of `working_bytes.layer`."""
    host_bytes: dict[str, float]
    """Host memory of a worker, by part."""
    device_limit_bytes: float
    """Memory of a device."""
    host_limit_bytes: float
    """A worker's share of its node's memory."""
    fits: bool
    """Whether both are enough."""
    shortage: str
    """What does not fit; empty where all does."""
    remedy: RemedyOutput | None
    """What would make it fit; null where it fits, or where nothing that was tried does."""
    time: TimeOutput
    """One optimizer step."""
    tokens_per_second: float
    """Of all workers, padding included."""
    mfu: float
    """Model FLOPs over the peak of all devices; only visible pairs count."""
    num_steps: int
    """Optimizer steps."""
    stage_seconds: float
    """All of them."""
    device_hours: float
    """Those times the workers."""
    price: float | None
    """Those times the rate; null without --price."""
    checkpoint: CheckpointOutput
    """The stage's checkpoints."""


class PlanOutput(Spec):
    """A job on given hardware."""

    job: str
    """Name of the job."""
    num_parameters: int
    """Trainable parameters of the model."""
    device: str
    """What each worker runs on."""
    devices: int
    """How many there are."""
    devices_per_node: int
    """Of these, on one node."""
    origin: str
    """Where the hardware comes from: --gpus, a cluster, this machine, or an assumption."""
    fits: bool
    """Whether every stage fits."""
    total_seconds: float
    """All stages, one after the other."""
    device_hours: float
    """Of all stages."""
    price: float | None
    """Of all stages; null without --price."""
    stages: list[StageOutput]
    """The stages, in order."""


def plan_output(
    job: str,
    estimate: JobEstimate,
    remedies: Mapping[int, Remedy | None],
    price: float | None = None,
) -> PlanOutput:
    """A job's estimate as plain data.

    Args:
        job: its name.
        estimate: of all stages.
        remedies: of the stages that do not fit, by index.
        price: of one device for an hour.
    """
    hardware = estimate.hardware
    return PlanOutput(
        job=job,
        num_parameters=estimate.stages[0].work.num_parameters,
        device=hardware.device.name,
        devices=hardware.count,
        devices_per_node=hardware.device.devices_per_node,
        origin=hardware.origin,
        fits=all(stage.fits for stage in estimate.stages),
        total_seconds=estimate.seconds,
        device_hours=estimate.device_hours,
        price=None if price is None else price * estimate.device_hours,
        stages=[_stage(stage, remedies.get(stage.index), price) for stage in estimate.stages],
    )


def _stage(stage: StageEstimate, remedy: Remedy | None, price: float | None) -> StageOutput:
    time, saving = stage.time, stage.saving
    return StageOutput(
        name=stage.name,
        context_length=stage.work.stage.context_length,
        mesh=MeshOutput(
            ring=stage.mesh.ring_size,
            heads=stage.mesh.heads_size,
            data_parallel=stage.mesh.data_parallel_size,
            workers=stage.mesh.world_size,
            wanted_workers=stage.wanted.world_size,
            reason=stage.reason,
        ),
        device_bytes=stage.memory.device,
        working_bytes=stage.memory.working,
        ring_buffer_bytes=stage.memory.ring_bytes,
        host_bytes=stage.memory.host,
        device_limit_bytes=stage.device.memory_bytes,
        host_limit_bytes=stage.device.host_bytes,
        fits=stage.fits,
        shortage=shortage(stage),
        remedy=None if remedy is None else _remedy(remedy),
        time=TimeOutput(
            step_seconds=stage.step_seconds,
            layers_seconds=time.layers,
            attention_seconds=time.attention,
            heads_seconds=time.heads,
            optimizer_seconds=time.optimizer,
            checkpoint_stall_seconds=saving.stall_per_step_seconds,
            ring=_transfer(time.ring),
            forward_hop=_hop(time.forward_hop),
            backward_hop=_hop(time.backward_hop),
            split_heads=_transfer(time.split_heads),
            zero=_transfer(time.zero),
            offload=_transfer(time.offload),
        ),
        tokens_per_second=stage.tokens_per_second,
        mfu=stage.mfu,
        num_steps=stage.work.stage.num_steps,
        stage_seconds=stage.stage_seconds,
        device_hours=stage.device_hours,
        price=None if price is None else price * stage.device_hours,
        checkpoint=CheckpointOutput(
            num_bytes=saving.num_bytes,
            stall_seconds=saving.stall_seconds,
            save_seconds=saving.save_seconds,
            load_seconds=saving.load_seconds,
        ),
    )


def _remedy(remedy: Remedy) -> RemedyOutput:
    return RemedyOutput(
        yaml=list(remedy.yaml),
        devices=remedy.count,
        device_bytes=remedy.after.memory.device_bytes,
        step_seconds=remedy.after.step_seconds,
    )


def _transfer(transfer: Transfer) -> TransferOutput:
    return TransferOutput(
        bytes_sent=transfer.bytes_sent,
        hidden_seconds=transfer.hidden_seconds,
        exposed_seconds=transfer.exposed_seconds,
        link=transfer.link,
    )


def _hop(hop: Hop | None) -> HopOutput | None:
    if hop is None:
        return None
    return HopOutput(
        bytes_sent=hop.bytes_sent,
        transfer_seconds=hop.transfer_seconds,
        compute_seconds=hop.compute_seconds,
        exposed_seconds=hop.exposed_seconds,
    )
