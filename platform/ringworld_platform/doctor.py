"""What this machine can do for a job: versions, devices, memory, disk, kernels; and what is amiss.

It imports no torch itself: what only torch knows is asked in a process of its own, so that a broken
installation is a finding and not a crash.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringworld_platform.formatting import bytes_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ringworld_jobs.spec import JobSpec, StageSpec

PACKAGES = ("torch", "ray", "deepspeed", "mlflow", "av", "pyarrow", "tokenizers")
PYTHON_NEEDED = (3, 11)
PROBE_SECONDS = 120
MEMORY_PER_WORKER_BYTES = 1 << 30
"""What a worker takes before it holds a model: the interpreter, torch and DeepSpeed."""
FREE_DISK_BYTES = 2 << 30
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""fp32 weights and both moments."""

# Prints one JSON object: devices as torch sees them, what optional kernels there are, and for each
# question the backend and the layout that it would be given, and why.
_PROBE = """
import json, sys
import torch
from ringworld_model.ring import choose_backend, plan_ring
from ringworld_model.ring.backend import explain_kernel, optional_kernels
asked = json.loads(sys.argv[1])
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
answers = []
for question in asked:
    head_dim, ring = question["head_dim"], question["ring"]
    try:
        backend, why = choose_backend(
            question["device"], question["dtype"], question["backend"], head_dim
        )
        if backend == "flash":
            dtype = getattr(torch, question["dtype"])
            why += "; " + explain_kernel(backend, torch.device("cuda", 0), dtype, head_dim or 128)
        if ring:
            ring["document_lengths"] = [ring["context_length"]]
            why += "; one long document: " + plan_ring(**ring, backend=backend).explain()
        answers.append([backend, why, None])
    except ValueError as error:
        answers.append([None, None, str(error)])
found = {"gpus": devices, "answers": answers, "kernels": optional_kernels()}
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    Attributes:
        subject: what was looked at.
        value: what was found.
        problem: what is wrong and the remedy; empty when all is well.
        needed: a problem keeps jobs from running; else it is only worth knowing.
    """

    subject: str
    value: str
    problem: str = ""
    needed: bool = True


@dataclass(slots=True)
class Checkup:
    """All findings, in order."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        """What keeps jobs from running."""
        return [finding for finding in self.findings if finding.problem and finding.needed]


def examine(spec: JobSpec | None = None, address: str | None = None) -> Checkup:
    """Look at this machine, and at what a job needs of it.

    Args:
        spec: the job; without one the kernels are shown for both dtypes.
        address: a cluster to try to reach.
    """
    checkup = Checkup([_python(), *(_package(name) for name in PACKAGES)])
    questions = _questions(spec)
    probe, failure = _probe(questions, spec.resources.accelerator if spec else "auto")
    gpus = list(probe.get("gpus", []))
    checkup.findings.append(_devices(gpus, failure, spec))
    checkup.findings += [_cores(spec), _memory(spec), _store(spec)]
    for question, answer in zip(questions, probe.get("answers", []), strict=False):
        backend, why, problem = answer
        text = f"{backend}: {why}" if backend else "none"
        checkup.findings.append(Finding(f"attention, {question.where}", text, problem or ""))
    if kernels := probe.get("kernels"):
        words = (f"{name} {version or 'absent'}" for name, version in kernels.items())
        checkup.findings.append(Finding("optional kernels", ", ".join(words)))
    checkup.findings.append(_cluster(address))
    return checkup


def render(checkup: Checkup) -> RenderableType:
    """The findings as a table, then the problems with their remedies."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in checkup.findings:
        mark, style = ("ok", "green") if not finding.problem else ("note", "yellow")
        if finding.problem and finding.needed:
            mark, style = "!!", "bold red"
        table.add_row(Text(mark, style=style), finding.subject, Text(finding.value))
    lines: list[RenderableType] = [table, Text()]
    for finding in checkup.findings:
        if finding.problem:
            style = "red" if finding.needed else "yellow"
            lines.append(Text(f"{finding.subject}: {finding.problem}", style=style))
    if not checkup.problems:
        lines.append(Text("ready", style="bold green"))
    return Group(*lines)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    needed = ".".join(map(str, PYTHON_NEEDED))
    old = sys.version_info < PYTHON_NEEDED
    return Finding("python", version, f"{needed} or newer is needed" if old else "")


def _package(name: str) -> Finding:
    """Asked of the installation's records, because importing them all takes many seconds."""
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed; run `make setup`")


@dataclass(frozen=True, slots=True)
class _Question:
    """What to ask of ``choose_backend`` and ``plan_ring``.

    Attributes:
        where: which stage, or which precision.
        dtype: torch's name of it.
        backend: the one asked for, or auto.
        head_dim: of the model; None without a job.
        ring: arguments of ``plan_ring``; None without a job, or where its mesh does not fit.
    """

    where: str
    dtype: str
    backend: str = "auto"
    head_dim: int | None = None
    ring: dict[str, Any] | None = None


def _questions(spec: JobSpec | None) -> list[_Question]:
    """One for each stage; without a job, for each precision."""
    names = {"fp32": "float32", "bf16": "bfloat16"}
    if spec is None:
        return [_Question(precision, dtype) for precision, dtype in names.items()]
    from ringworld_jobs.plan import MeshError, model_config, resolve_mesh

    def question(stage: StageSpec) -> _Question:
        try:
            mesh = resolve_mesh(stage, spec.resources)
            ring = {
                "context_length": stage.context_length,
                "ring_size": mesh.ring_size,
                "heads_size": mesh.heads_size,
                "layout": stage.attention.layout,
            }
        except MeshError:  # Said where the job is checked.
            ring = None
        return _Question(
            f"stage {stage.name} ({stage.precision})",
            names[stage.precision],
            stage.attention.backend,
            model_config(spec).head_dim,
            ring,
        )

    return [question(stage) for stage in spec.stages]


def _probe(questions: Sequence[_Question], accelerator: str) -> tuple[dict[str, Any], str]:
    """Ask torch in a process of its own; returns its answers, or why there are none."""
    device = {"cpu": "cpu", "gpu": "cuda"}.get(accelerator) or ("cuda" if _has_gpu() else "cpu")
    asked = json.dumps([{**asdict(question), "device": device} for question in questions])
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, asked],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {}, f"torch did not answer within {PROBE_SECONDS} s"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {}, f"torch cannot be used: {lines[-1] if lines else 'no message'}"
    return json.loads(done.stdout.strip().splitlines()[-1]), ""


def _has_gpu() -> bool:
    """Whether the driver shows a GPU; torch is not needed to see that."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def _devices(gpus: list[str], failure: str, spec: JobSpec | None) -> Finding:
    text = ", ".join(gpus) if gpus else "no GPU; jobs train on the CPU"
    wanted = spec is not None and spec.resources.accelerator == "gpu"
    if failure:
        return Finding("devices", "unknown", failure + "; run `make setup`")
    if wanted and not gpus:
        remedy = "the job asks for GPUs; set resources.accelerator: cpu or use a cluster"
        return Finding("devices", text, remedy)
    return Finding("devices", text)


def _cores(spec: JobSpec | None) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{cores} cores"
    if spec is None:
        return Finding("cpu", text)
    resources = spec.resources
    least, most = resources.workers.min or 1, resources.workers.max
    each = resources.cpus_per_worker
    problem = ""
    if least * each > (cores or 1):
        problem = (
            f"the job needs {least} workers x {each} = {least * each} cores; lower "
            "resources.workers.min, or add machines and `ringworld submit --address`"
        )
    return Finding("cpu", f"{text}; the job takes {least * each} to {most * each}", problem)


def _memory(spec: JobSpec | None) -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{bytes_text(memory.available)} free of {bytes_text(memory.total)}"
    needed = (spec.resources.workers.max if spec else 1) * MEMORY_PER_WORKER_BYTES
    problem = ""
    if memory.available < needed:
        problem = f"workers need about {bytes_text(needed)} before the model; end other programs"
    return Finding("memory", text, problem, needed=False)


def _store(spec: JobSpec | None) -> Finding:
    """Whether checkpoints can be written where they are to go."""
    from ringworld_platform.errors import StoreRefused
    from ringworld_platform.run_claims import check_store, on_s3

    if spec is None or not on_s3(spec):
        return _disk(spec)
    url = spec.checkpoint.store
    try:
        check_store(spec)
    except StoreRefused as error:
        return Finding("store", url, str(error))
    return Finding("store", f"{url}: a small object was written, read and removed")


def _disk(spec: JobSpec | None) -> Finding:
    store = spec.checkpoint.store if spec else "file://runs"
    folder = Path(store.removeprefix("file://")).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed, what = FREE_DISK_BYTES, "a run"
    if spec is not None:
        from ringworld_jobs.plan import model_config

        size = model_config(spec).num_parameters() * CHECKPOINT_BYTES_PER_PARAMETER
        count = spec.checkpoint.keep + len(spec.stages)
        needed, what = size * count, f"{count} checkpoints of {bytes_text(size)}"
    problem = ""
    if free < needed:
        problem = (
            f"{what} need {bytes_text(needed)}, {bytes_text(free)} are free; free space, lower "
            "checkpoint.keep or set checkpoint.store to a larger disk"
        )
    elif not os.access(folder, os.W_OK):
        problem = f"{folder} cannot be written; set checkpoint.store to a folder of yours"
    return Finding("store", f"{bytes_text(free)} free in {folder}", problem)


def _cluster(address: str | None) -> Finding:
    from ringworld_platform import cluster, head
    from ringworld_platform.errors import ClusterError

    running = head.find_running()
    if address is None and running is None and "RAY_ADDRESS" not in os.environ:
        return Finding("cluster", "none up; `ringworld run` starts its own")
    try:
        info = cluster.connect(address)
    except ClusterError as error:
        return Finding("cluster", "not reached", str(error))
    cluster.disconnect()
    return Finding("cluster", f"reached at {info.address}")
