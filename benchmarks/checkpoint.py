"""What saving and loading cost: stall, bandwidth, memory, and what the steps notice of it.

    .venv/bin/python benchmarks/checkpoint.py

Two ranks train a decoder under ZeRO-1 with AdamW, whose state is 1 GiB, and save to SeaweedFS and
to files on this machine. Plain boto3 moves the same bytes with as many processes, in turns with
ours. The server stands for another machine, so it has the lowest priority here; with two cores for
two ranks it still takes from them what on another machine it would not.
Writes benchmarks/results/checkpoint-<date>.md and .json.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from checkpoint_report import write

from ringworld_jobs.spec import CheckpointSpec, OptimizerSpec, StageSpec
from ringworld_jobs.units import parse_count
from ringworld_model.config import ModelConfig
from ringworld_model.loss import combine
from ringworld_model.packing import pack_row
from ringworld_model.ring import RingContext, plan_rows
from ringworld_model.tokens import text_example
from ringworld_model.transformer import WorldModel, init_weights
from ringworld_platform.local_s3 import LocalS3
from ringworld_workers.checkpoint.layout import CheckpointRef, TrainState
from ringworld_workers.checkpoint.range_reader import READS_AT_ONCE
from ringworld_workers.checkpoint.reader import load
from ringworld_workers.checkpoint.snapshot import share_bytes
from ringworld_workers.checkpoint.writer import CheckpointWriter
from ringworld_workers.engine.build import build_engine
from ringworld_workers.mesh import Mesh, build_mesh
from ringworld_workers.store.opening import open_store
from ringworld_workers.testing import run_distributed

RANKS = 2
BUCKET = "runs"
ELEMENT_BYTES = 4 * 3  # of a parameter: fp32 master and Adam's two moments
GET_BYTES = 64 << 20
HIDDEN, FFN = 1024, 2816


def main() -> None:
    """Start the server, measure on both stores, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=parse_count, default="1Gi", help="of state, on all ranks")
    parser.add_argument("--saves", type=int, default=3, help="of each kind")
    parser.add_argument("--rounds", type=int, default=2, help="of steps with and without a save")
    parser.add_argument("--steps", type=int, default=4, help="without a save in each round")
    parser.add_argument("--tokens", type=int, default=128, help="of a rank in each step")
    parser.add_argument("--folder", type=Path, help="of the stores; a temporary one if left out")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    # Whoever ends this program ends the server with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
        server = stack.enter_context(LocalS3(Path(place, "s3")))
        server.start(BUCKET)
        give_way(server.pid)
        os.environ |= server.environment()
        found = {}
        for url in (f"s3://{BUCKET}/run", f"file://{place}/files"):
            ranks = run_distributed(measure, RANKS, url, options, timeout=600)
            found[url.partition(":")[0]] = together(ranks)
            print(f"{url.partition(':')[0]}: measured", flush=True)
    write(options, found, RANKS, time.monotonic() - began)


def give_way(process: int) -> None:
    """Put a process behind all others, with the threads that it has or will have."""
    for thread in os.listdir(f"/proc/{process}/task"):
        os.setpriority(os.PRIO_PROCESS, int(thread), 19)
    group = Path(f"/proc/{process}/autogroup")
    if group.exists():  # where sessions share the cores evenly, a session has a priority of its own
        group.write_text("19")


def together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank 0's figures, and the memory of the rank that took most."""
    extra = [rank["memory"]["extra"] - rank["memory"]["snapshot"] for rank in ranks]
    return ranks[0] | {"memory": ranks[extra.index(max(extra))]["memory"]}


def measure(rank: int, world_size: int, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one store, on one rank."""
    trainer = Trainer(build_mesh(1, world_size), options)
    for _ in range(2):
        trainer.step()  # DeepSpeed's buffers and Adam's moments are made here
    saver = Saver(url, trainer)
    memory = saver.first()
    remote = PlainS3(url, trainer.mesh, saver.share()) if url.startswith("s3:") else None
    saves, plain_puts = [], []
    for number in range(options.saves):
        actions: list[Callable[[], None]] = [lambda: saves.append(saver.save())]
        if remote is not None:
            actions.append(lambda: plain_puts.append(timed(remote.put, trainer.mesh)))
        for action in actions if number % 2 else reversed(actions):
            action()
    loads, plain_gets = [], []
    for number in range(options.saves):
        actions = [lambda: loads.append(timed(saver.load, trainer.mesh))]
        if remote is not None:
            actions.append(lambda: plain_gets.append(timed(remote.get, trainer.mesh)))
        for action in actions if number % 2 else reversed(actions):
            action()
    quiet: list[float] = []
    busy: list[float] = []
    uploads: list[dict[str, Any]] = []
    for number in range(options.rounds):
        parts: list[Callable[[], None]] = [
            lambda: quiet.extend(trainer.timed_step() for _ in range(options.steps)),
            lambda: uploads.append(saver.save(busy)),
        ]
        for part in parts if number % 2 else reversed(parts):
            part()
    saver.writer.close()
    trainer.engine.close()
    return {
        "bytes": saver.num_bytes,
        "memory": memory,
        "saves": saves,
        "plain_put_seconds": plain_puts,
        "load_seconds": loads,
        "plain_get_seconds": plain_gets,
        "quiet_step_seconds": quiet,
        "busy_step_seconds": busy,
        "busy_saves": uploads,
    }


class Trainer:
    """A decoder of the wanted size under ZeRO-1, and real steps."""

    def __init__(self, mesh: Mesh, options: argparse.Namespace) -> None:
        """Build it; a collective."""
        self.mesh, self.tokens = mesh, options.tokens
        numel = options.bytes // ELEMENT_BYTES
        layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN
        layers = max(1, int(0.7 * numel / layer))
        vocabulary = max(256, (numel - layers * layer) // (2 * HIDDEN))
        config = ModelConfig(
            hidden_size=HIDDEN,
            ffn_size=FFN,
            num_layers=layers,
            num_heads=16,
            num_kv_heads=16,
            text_vocab_size=vocabulary,
            vision_codebook_size=0,
        )
        model = WorldModel(config, rope_theta=1e4)
        init_weights(model, 0)
        stage = StageSpec.model_validate(
            {
                "name": "a",
                "context_length": options.tokens,
                "rope_theta": 1e4,
                "steps": 1,
                "global_batch_tokens": options.tokens * mesh.world_size,
                "mixture": {"a": 1},
                "learning_rate": {"peak": 1e-4},
                "zero_stage": 1,
                "precision": "fp32",
            }
        )
        self.engine = build_engine("deepspeed", model, OptimizerSpec(), stage, mesh)
        ids = np.random.default_rng(mesh.rank).integers(0, vocabulary, options.tokens)
        self.row = pack_row([text_example(ids)], options.tokens, "token")
        self.plans = plan_rows(self.row.document_lengths, options.tokens, 1)

    def step(self) -> None:
        """Forward, backward and AdamW."""
        weight = torch.tensor([self.mesh.world_size * (self.tokens - 1.0), 0.0]).double()
        sums = self.engine(self.row, RingContext(plans=self.plans, group=None))
        self.engine.backward(combine(sums, weight, (1.0, 0.0), self.engine.loss_factor))
        self.engine.step()

    def timed_step(self) -> float:
        """Seconds of a step, which all ranks begin together."""
        return timed(self.step, self.mesh)


class Saver:
    """Saves as a stage does, and times it."""

    def __init__(self, url: str, trainer: Trainer) -> None:
        """Open the store and take the fence."""
        self.trainer, self.store = trainer, open_store(url)
        job: Any = SimpleNamespace(
            run_id="benchmark",
            run_uid="",
            attempt=1,
            stage_index=0,
            spec=SimpleNamespace(checkpoint=CheckpointSpec()),
        )
        self.writer = CheckpointWriter(self.store, trainer.mesh, job)
        self.writer.open()
        self._step = 0
        self.num_bytes = 0
        self._newest = ""

    def share(self) -> bytes:
        """This rank's part of the state, as it goes to the store."""
        ranges = self.trainer.engine.owned_ranges()
        return b"".join(owned.data.numpy().tobytes() for owned in ranges)

    def first(self) -> dict[str, int]:
        """Make the buffer ready and save, and tell what memory that took beyond what was there."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory_of("VmRSS")
        self.writer.prepare(self.trainer.engine)
        self.save()
        snapshot = share_bytes(self.trainer.engine.owned_ranges())
        return {"extra": memory_of("VmHWM") - before, "snapshot": snapshot}

    def save(self, steps: list[float] | None = None) -> dict[str, Any]:
        """One save; with ``steps``, training goes on meanwhile, and its steps' times go there."""
        self._step += 1
        state = TrainState("a", 0, self._step, 0, 0, None, 0.0, "", {}, False)
        dist.barrier(self.trainer.mesh.control_group)
        began = time.perf_counter()
        self.writer.snapshot(self.trainer.engine, state)
        while steps is not None and self._pending():
            steps.append(self.trainer.timed_step())
        outcome = self.writer.commit()
        self.num_bytes, self._newest = outcome["bytes"], outcome["key"]
        return outcome | {"wall_seconds": time.perf_counter() - began}

    def load(self) -> None:
        """Bring the engine to the newest checkpoint."""
        ref = CheckpointRef(self.store.url, "a", 0, self._step, self._newest)
        load(self.store, ref, self.trainer.engine, self.trainer.mesh, with_optimizer=True)

    def _pending(self) -> bool:
        """Whether a rank is still uploading, as the ranks of a stage agree on it."""
        flag = torch.tensor([int(self.writer.uploading())])
        dist.all_reduce(flag, group=self.trainer.mesh.control_group)
        return bool(flag)


class PlainS3:
    """boto3 as its users use it: upload_fileobj, and get_object by ranges in threads."""

    def __init__(self, url: str, mesh: Mesh, data: bytes) -> None:
        """Connect."""
        import boto3
        from boto3.s3.transfer import TransferConfig

        self._client = boto3.client("s3")
        # The other transfer client does not work with an endpoint that has a port.
        self._config = TransferConfig(preferred_transfer_client="classic")
        self._key = f"plain/rank-{mesh.rank}"
        self._data = data
        self._into = memoryview(bytearray(len(data)))

    def put(self) -> None:
        """One object, with boto3's own settings."""
        body = io.BytesIO(self._data)
        self._client.upload_fileobj(body, BUCKET, self._key, Config=self._config)

    def get(self) -> None:
        """The object by ranges, as many at once as the reader of checkpoints takes, into memory."""
        size = len(self._data)
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            list(pool.map(self._get, range(0, size, GET_BYTES)))

    def _get(self, first: int) -> None:
        into = self._into[first : first + GET_BYTES]
        wanted = f"bytes={first}-{first + len(into) - 1}"
        body = self._client.get_object(Bucket=BUCKET, Key=self._key, Range=wanted)["Body"]
        while into:
            into = into[body.readinto(into) :]


def timed(action: Callable[[], None], mesh: Mesh) -> float:
    """Seconds from when all ranks begin until all have ended."""
    dist.barrier(mesh.control_group)
    began = time.perf_counter()
    action()
    dist.barrier(mesh.control_group)
    return time.perf_counter() - began


def memory_of(name: str) -> int:
    """A figure of this process in bytes: VmRSS, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not tell {name}; this benchmark runs on Linux")


if __name__ == "__main__":
    main()
