"""A plan in the terminal, within 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ringworld_jobs.planner.estimate import JobEstimate, StageEstimate
from ringworld_jobs.planner.levers import Remedy, shortage
from ringworld_jobs.planner.step_time import Transfer
from ringworld_jobs.units import format_tokens
from ringworld_platform.formatting import (
    bytes_text,
    duration,
    mesh_heading,
    mesh_text,
    quantity,
    step_duration,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SMALL = 0.005
"""Parts below this share of the whole are left out."""


def render(
    job: str,
    estimate: JobEstimate,
    remedies: Mapping[int, Remedy | None],
    price: float | None = None,
) -> RenderableType:
    """All of a plan.

    Args:
        job: the job's name.
        estimate: of its stages.
        remedies: of the stages that do not fit, by index.
        price: of one device for an hour.
    """
    from rich.console import Group
    from rich.text import Text

    hardware = estimate.hardware
    number = quantity(estimate.stages[0].work.num_parameters)
    origin = "" if hardware.device.is_cpu else f" ({hardware.origin})"
    title = Text.assemble((job, "bold"), f"  {number} parameters on {hardware}{origin}")
    parts: list[RenderableType] = [title, Text(), _overview(estimate, price)]
    for stage in estimate.stages:
        style = "bold" if stage.fits else "bold red"
        heading = f"{stage.name}: {stage.mesh}"
        parts += [Text(), Text(heading, style), _details(stage, remedies.get(stage.index))]
    parts += [Text(), Text(_last_line(estimate, price))]
    return Group(*parts)


def _overview(estimate: JobEstimate, price: float | None) -> Table:
    from rich.table import Table

    on_cpu = estimate.hardware.device.is_cpu
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    mesh = mesh_heading(stage.mesh.heads_size for stage in estimate.stages)
    memory = ["memory"] if on_cpu else ["device", "host"]
    hours = "hours" if on_cpu else "GPU-hours"
    headings = ["stage", "context", mesh, *memory, "step", "tokens/s", "steps", hours]
    for heading in [*headings, *["price"] * (price is not None)]:
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    for stage in estimate.stages:
        size = stage.mesh
        held = [stage.on_host_bytes] if on_cpu else [stage.memory.device_bytes, stage.on_host_bytes]
        table.add_row(
            stage.name,
            format_tokens(stage.work.stage.context_length),
            mesh_text(size.ring_size, size.heads_size, size.data_parallel_size),
            *[bytes_text(value) for value in held],
            step_duration(stage.step_seconds),
            quantity(stage.tokens_per_second),
            f"{stage.work.stage.num_steps}",
            _hours(stage.device_hours),
            *([] if price is None else [quantity(stage.device_hours * price)]),
            style=None if stage.fits else "red",
        )
    return table


def _details(stage: StageEstimate, remedy: Remedy | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=8)
    grid.add_column()
    for name, text in _lines(stage):
        grid.add_row(f"  {name}", Text(text))
    if stage.fits:
        return grid
    grid.add_row("  does not fit", Text(shortage(stage), style="red"))
    if remedy is None:
        grid.add_row("  remedy", Text("none of the levers and no number of devices that was tried"))
        return grid
    step = step_duration(remedy.after.step_seconds)
    size = bytes_text(remedy.after.memory.device_bytes)
    devices = f"on {remedy.count} devices, " if remedy.count > stage.mesh.world_size else ""
    what = f"{devices}{size} a device, {step} a step, with these in the job:"
    grid.add_row("  it fits", Text(what, style="green"))
    for line in remedy.yaml:
        grid.add_row("", Text(line, style="green"))
    return grid


def _lines(stage: StageEstimate) -> Iterator[tuple[str, str]]:
    """What is said of a stage, each with its heading."""
    memory, time, saving, device = stage.memory, stage.time, stage.saving, stage.device
    yield "mesh", stage.reason
    if device.is_cpu:
        whole = stage.on_host_bytes
        yield (
            "memory",
            f"{bytes_text(whole)} of {bytes_text(device.host_bytes)} a worker: "
            + _parts(memory.host | memory.device, whole),
        )
    else:
        yield (
            "device",
            f"{bytes_text(memory.device_bytes)} of {bytes_text(device.memory_bytes)}: "
            + _parts(memory.device, memory.device_bytes),
        )
        most = max(memory.working, key=lambda name: memory.working[name])
        yield (
            "working",
            f"a {most}, {bytes_text(memory.working[most])}"
            + (f", ring buffers {bytes_text(memory.ring_bytes)} of it" * (memory.ring_bytes > 0))
            + f"; loss with its logits tile {bytes_text(memory.working['loss'])}",
        )
        yield (
            "host",
            f"{bytes_text(memory.host_bytes)} of {bytes_text(device.host_bytes)}: "
            + _parts(memory.host, memory.host_bytes),
        )
    computed = f"attention {step_duration(time.attention)}, layers {step_duration(time.layers)}, "
    computed += f"heads {step_duration(time.heads)}, optimizer {step_duration(time.optimizer)}"
    mfu = "" if device.is_cpu else f"; MFU {stage.mfu:.0%}"
    yield "step", f"{step_duration(stage.step_seconds)}: {computed}{mfu}"
    sent = [("ring", time.ring), ("split heads", time.split_heads), ("ZeRO", time.zero)]
    told = [_transfer(name, part) for name, part in [*sent, ("offload", time.offload)] if part.link]
    if told:
        yield "sent", "; ".join(told)
    if time.forward_hop is not None and time.backward_hop is not None and device.overlaps:
        hops = (("forward", time.forward_hop), ("backward", time.backward_hop))
        said = (
            f"{name} {bytes_text(hop.bytes_sent)} in {step_duration(hop.transfer_seconds)} beside "
            f"{step_duration(hop.compute_seconds)} of attention"
            for name, hop in hops
        )
        yield "a hop", "; ".join(said)
    yield (
        "save",
        f"{bytes_text(saving.num_bytes)} in {step_duration(saving.save_seconds)}, training waits "
        f"{step_duration(saving.stall_seconds)} of it; loading takes "
        f"{step_duration(saving.load_seconds)}",
    )


def _parts(parts: Mapping[str, float], whole: float) -> str:
    """The parts that matter, the largest first."""
    shown = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{k} {bytes_text(v)}" for k, v in shown if v > _SMALL * whole)


def _transfer(name: str, part: Transfer) -> str:
    """``ring 96.0 GiB by network: 3.2s hidden, 0.1s exposed``."""
    hidden, exposed = part.hidden_seconds, part.exposed_seconds
    times = [f"{step_duration(hidden)} hidden"] * (hidden > 0)
    times += [f"{step_duration(exposed)} exposed"] * (exposed > 0)
    return f"{name} {bytes_text(part.bytes_sent)} by {part.link}: {', '.join(times)}"


def _last_line(estimate: JobEstimate, price: float | None) -> str:
    kind = "worker-hours" if estimate.hardware.device.is_cpu else "GPU-hours"
    cost = "" if price is None else f", {estimate.device_hours * price:,.0f} at {price:g} an hour"
    short = [stage.name for stage in estimate.stages if not stage.fits]
    end = f"; {', '.join(short)} cannot run as it is" if short else ""
    hours = _hours(estimate.device_hours)
    return f"{duration(estimate.seconds)} in all, {hours} {kind}{cost}{end}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
