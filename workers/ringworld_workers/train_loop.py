"""One stage on one rank: rows -> ring -> loss -> ZeRO step -> metrics -> checkpoint.

Plain Python: it knows neither Ray nor DeepSpeed. Every rank of the gang runs this same function;
collectives stand in the same order on all of them, and only this thread issues any.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist

from ringworld_model.batch import TrainBatch
from ringworld_model.loss import LossSums, combine
from ringworld_model.transformer import WorldModel
from ringworld_workers.boundary import Boundary, agree
from ringworld_workers.checkpoint.layout import StateNotFinite
from ringworld_workers.checkpointing import StageCheckpoints
from ringworld_workers.data.loader import StageLoader, open_loader
from ringworld_workers.data.prefetch import Prefetcher
from ringworld_workers.divergence import Gang, StepAtHand, diverged, warn
from ringworld_workers.engine.base import Engine
from ringworld_workers.engine.build import build_engine
from ringworld_workers.evaluate.held_out import score_held_out
from ringworld_workers.guard import NumericGuard, refuse_nonsense, refuse_state
from ringworld_workers.initial_weights import set_initial_weights
from ringworld_workers.learning_rate import learning_rate_at
from ringworld_workers.machine import machine_record
from ringworld_workers.mesh import Mesh
from ringworld_workers.metrics import StepTimer
from ringworld_workers.micro_batch import (
    MicroBatch,
    choose_stage_backend,
    cut_micro_batch,
    plan_stage_rows,
    prepare_micro_batch,
)
from ringworld_workers.reporter import Reporter
from ringworld_workers.ring_figures import RingLog, ring_figures
from ringworld_workers.stage_job import StageJob
from ringworld_workers.step_figures import StepSums, step_figures, step_losses

log = logging.getLogger(__name__)


def run_stage(job: StageJob, mesh: Mesh, reporter: Reporter) -> dict[str, Any]:
    """Train one stage to its end, or to a stop request.

    Args:
        job: what to train; the same on every rank.
        mesh: this rank's place and its process groups.
        reporter: takes metrics (on rank 0), phases and events.

    Returns:
        ``{"status": "finished" | "stopped", "step": steps done, "checkpoint": key}``; and of a stop
        whose state could not be saved, ``"unsaved"``: why, and what a resume goes on from.

    Raises:
        ParityFailed: the stage asks for parity, and its ring does not compute what one rank does.
        WeightsError: `model.init_from` cannot be read here, or is of another model.
        TrainingDiverged: a loss, the gradient or the state is not finite, or jumps where the spec
            does not allow it; the state is not saved.
        CheckpointError: the checkpoint to start from is damaged or absent, another gang writes this
            run, or too many saves have failed.
        StoreError: the store does not answer at the beginning.
    """
    torch.manual_seed(job.spec.seed)
    stage = job.stage
    reporter.phase("setup", 0)
    started = time.monotonic()
    loader = open_loader(job, mesh)
    if stage.preflight is not None and not job.proved:
        # Here, for it brings along what builds data: a tenth of a worker's start.
        from ringworld_workers.parity.preflight import prove_ring

        # Before the engine: what the proof needs is free again when the model is built.
        prove_ring(job, mesh, reporter, loader, stage.preflight)
    with torch.device("meta"):  # the engine makes the parameters, of each no more than it keeps
        model = WorldModel(
            job.model_config,
            rope_theta=stage.rope_theta,
            activation_checkpointing=stage.memory.activation_checkpointing,
            activation_offload=stage.memory.activation_offload,
            mlp_tile_tokens=stage.memory.mlp_tile_tokens,
            loss_tile_tokens=stage.loss.tile_tokens,
        )
    engine = build_engine("deepspeed", model, job.spec.optimizer, stage, mesh)
    try:
        with StageCheckpoints(job, mesh, engine, reporter) as checkpoints:
            reporter.phase("load", 0)
            start = checkpoints.restore()
            if start.key is None:
                set_initial_weights(engine, job, mesh, reporter)
            if start.bookmark is not None and not loader.open_at(start.bookmark):
                log.warning("%s was saved with other data: its order begins anew", start.key)
            run = StageRun(job, mesh, reporter, loader, engine, checkpoints)
            machine = machine_record(mesh.device)  # on all ranks at once, as they will compute
            if mesh.rank == 0:
                attention = run.attention(start.step)
                log.info(
                    "attention: %(backend)s (%(backend_reason)s); %(layout_reason)s", attention
                )
                reporter.metrics(
                    run.record(
                        "stage_start",
                        start.step,
                        num_steps=stage.num_steps,
                        resumed_from=start.key,
                        context_length=stage.context_length,
                        ring_size=mesh.ring_size,
                        heads_size=mesh.heads_size,
                        data_parallel_size=mesh.data_parallel_size,
                        setup_seconds=time.monotonic() - started,
                        **({"left_out": loader.left_out} if loader.left_out else {}),
                        **attention,
                        **machine,
                    )
                )
            return run.train(start.step, start.tokens)
    finally:
        engine.close()


class StageRun:
    """The loop over a stage's steps."""

    def __init__(
        self,
        job: StageJob,
        mesh: Mesh,
        reporter: Reporter,
        loader: StageLoader,
        engine: Engine,
        checkpoints: StageCheckpoints,
    ) -> None:
        """Take what ``run_stage`` has built."""
        self.job, self.stage, self.mesh = job, job.stage, mesh
        self.reporter, self.loader, self.engine = reporter, loader, engine
        self.checkpoints = checkpoints
        self.backend, self.backend_reason = choose_stage_backend(job, mesh)
        self.timer, self._ring_log = StepTimer(mesh.device), RingLog()
        self.shares = (self.stage.loss.text, self.stage.loss.vision)
        self.guard = NumericGuard(job.spec.recovery)
        self.gang = Gang(job, mesh, engine, loader, reporter)
        self._local: list[torch.Tensor] = []
        """Of each micro-batch of the step at hand, this rank's own sums."""

    def train(self, step: int, tokens: int) -> dict[str, Any]:
        """Run the steps from ``step`` on; ``tokens`` is what the job has consumed so far."""
        wanted = [at for at in range(step, self.stage.num_steps) if at not in self._left_out]
        try:
            with Prefetcher(self._micro_batches, wanted) as ahead:
                return self._train(ahead, step, tokens)
        except StateNotFinite as error:
            raise refuse_state(error, self.stage.name, self.job.spec.recovery) from error

    def _train(self, ahead: Prefetcher[list[MicroBatch]], step: int, tokens: int) -> dict[str, Any]:
        while step < self.stage.num_steps:
            step_started = time.perf_counter()
            self.reporter.phase("data", step + 1)
            with self.timer.phase("data"):
                # Waiting for what the background thread makes, where it is not ahead.
                taken = [] if step in self._left_out else ahead.take(step)
                batches = [batch.to(self.mesh.device) for batch in taken]
            # Apart from the wait for data, which may be long: here one waits for the other ranks.
            self.reporter.phase("boundary", step + 1)
            boundary = agree(
                batches,
                self.mesh.control_group,
                stop=self.reporter.should_stop(),
                checkpoint_due=self.mesh.rank == 0 and self.checkpoints.due(),
                uploads_pending=self.checkpoints.pending(),
            )
            stall = self._at_boundary(boundary, step, tokens)
            if boundary.stop:
                unsaved = self.checkpoints.stop(step)
                result = self._result("stopped", step)
                return result if unsaved is None else {**result, "unsaved": unsaved}
            if step in self._left_out:
                step += 1
                self._leave_out(step, tokens)
                continue
            learning_rate = learning_rate_at(self.stage.learning_rate, step, self.stage.num_steps)
            sums = self._step(batches, boundary.weight, learning_rate, step)
            step += 1
            self.checkpoints.note_step(step)
            tokens += self.stage.rows_per_step * self.stage.context_length
            losses = step_losses(sums, boundary.weight, self.shares)
            numbers = {**losses, "grad_norm": sums.grad_norm}
            self._judge(step, numbers, batches, boundary.weight, learning_rate)
            self._report_step(
                step,
                batches,
                sums,
                seconds=time.perf_counter() - step_started,
                checkpoint_stall_seconds=stall,
                **losses,
                learning_rate=learning_rate,
                tokens=tokens,
            )
        return self._end_of_stage(step, tokens)

    @cached_property
    def _left_out(self) -> frozenset[int]:
        """Steps (counted from 0) whose rows this run leaves out."""
        return frozenset(step - 1 for step in self.job.skip_steps)

    def _leave_out(self, step: int, tokens: int) -> None:
        """Count a step without training on its rows, and say so."""
        self.checkpoints.note_step(step)
        if self.mesh.rank != 0:
            return
        rows = self.loader.row_range(step - 1)
        text = (
            f"step {step} of stage {self.stage.name} is left out, with rows {rows.start} to "
            f"{rows.stop - 1}: training diverged there"
        )
        log.warning("%s", text)
        about = {"rows": [rows.start, rows.stop]}
        self.reporter.event({"kind": "rows_left_out", "text": text, "step": step, **about})
        ids = self.loader.sample_ids(step - 1)
        self.reporter.metrics(
            self.record("left_out", step, tokens=tokens, **about, left_out_ids=ids)
        )

    def _judge(
        self,
        step: int,
        numbers: dict[str, float],
        batches: Sequence[MicroBatch],
        weight: torch.Tensor,
        learning_rate: float,
    ) -> None:
        """Tell of numbers that jump, and end the stage where the spec says so. A collective.

        Raises:
            TrainingDiverged: on every rank at once, since all hold the same numbers.
        """
        finding = self.guard.judge(step, numbers)
        for name in sorted(self.guard.over()):
            if self.mesh.rank == 0:
                text = f"{name} is down to {numbers[name]:.6g} again at step {step}"
                self.reporter.event({"kind": "loss_spike", "text": text, "step": step})
        if finding is None:
            return
        history = tuple(self.guard.history)
        if finding.action == "warn":
            warn(self.gang, finding, history, step)
            return
        local = tuple(self._local)
        at = StepAtHand(step, batches, weight, self.shares, learning_rate, local)
        raise diverged(self.gang, finding, at, history)

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of the step's rows, cut for the ring; on the CPU."""
        return [
            cut_micro_batch(rows, self.stage, self.mesh, self.backend)
            for rows in self.loader.step_rows(step)
        ]

    def prepare(self, rows: TrainBatch) -> MicroBatch:
        """Plan the ring for whole rows [B, S] and cut out this rank's tokens [B, T]."""
        return prepare_micro_batch(rows, self.stage, self.mesh, self.backend)

    def _held_out(self, rows: TrainBatch) -> MicroBatch:
        # Many rows take longer than a step, and are no stall.
        self.reporter.phase("validation", self.stage.num_steps)
        return self.prepare(rows)

    def attention(self, step: int) -> dict[str, str]:
        """What computes attention, and how the first rows from ``step`` on are laid out; why."""
        step = min(step, self.stage.num_steps - 1)
        lengths = self.loader.document_lengths(step)[: self.stage.micro_batch_size]
        plan = plan_stage_rows(lengths, self.stage, self.mesh, self.backend)[0]
        return {
            "backend": self.backend,
            "backend_reason": self.backend_reason,
            "layout": plan.layout,
            "layout_reason": plan.explain(),
        }

    def _at_boundary(self, boundary: Boundary, step: int, tokens: int) -> float:
        """Commit a finished upload; take a snapshot if one is due. Returns the stall in seconds."""
        started = time.perf_counter()
        bookmark = partial(self.loader.bookmark, step)
        self.checkpoints.at_boundary(boundary, step, tokens, bookmark)
        return time.perf_counter() - started

    def _step(
        self, batches: Sequence[MicroBatch], weight: torch.Tensor, learning_rate: float, step: int
    ) -> StepSums:
        """Forward and backward over the micro-batches, then the optimizer step."""
        self._local = []
        self.engine.set_learning_rate(learning_rate)
        for batch in batches:
            self.reporter.phase("forward", step + 1, batch.ring.stats)
            with self.timer.phase("forward"):
                sums: LossSums = self.engine(batch.local, batch.ring)
                loss = combine(sums, weight, self.shares, self.engine.loss_factor)
            self.reporter.phase("backward", step + 1, batch.ring.stats)
            with self.timer.phase("backward"):
                self.engine.backward(loss)
            parts = (sums.nll.detach(), sums.correct, sums.count)
            self._local.append(torch.stack([part.double().cpu() for part in parts]))
        self.reporter.phase("optimizer", step + 1)
        with self.timer.phase("optimizer"):
            grad_norm = self.engine.step()
        ring = ring_figures(
            (batch.ring.stats for batch in batches), self.mesh.rank, self.mesh.world_size
        )
        self._ring_log.step(step + 1, ring[self.mesh.rank])
        totals = torch.stack(self._local).sum(0)
        # Rank 0's norm for all: what is judged must be the same to the last bit.
        norm = torch.tensor([grad_norm if self.mesh.rank == 0 else 0.0], dtype=torch.float64)
        together = torch.cat([totals.flatten(), norm, ring.flatten()])
        dist.all_reduce(together, group=self.mesh.control_group)
        nll, correct, num_targets = together[:6].view(3, 2)
        return StepSums(nll, correct, num_targets, float(together[6]), together[7:].view_as(ring))

    def _report_step(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        sums: StepSums,
        *,
        seconds: float,
        checkpoint_stall_seconds: float,
        **values: float,
    ) -> None:
        """Hand over the step's line of the metric log, on rank 0."""
        phases = self.timer.take()
        if self.mesh.rank != 0:
            return
        self.reporter.metrics(
            self.record(
                "step",
                step,
                **values,
                **step_figures(
                    self.job,
                    self.loader,
                    self.mesh,
                    step - 1,
                    sums,
                    plans=[plan for batch in batches for plan in batch.ring.plans],
                    phases=phases,
                    seconds=seconds,
                    checkpoint_stall_seconds=checkpoint_stall_seconds,
                ),
            )
        )

    def _end_of_stage(self, step: int, tokens: int) -> dict[str, Any]:
        """Score the held-out rows, save the stage's last checkpoint, and wait for its commit."""
        self.reporter.phase("validation", step)
        scores = score_held_out(self.engine, self.loader, self.stage, self.mesh, self._held_out)
        refuse_nonsense(scores, self.stage.name, step, self.job.spec.recovery)
        if scores and self.mesh.rank == 0:
            self.reporter.metrics(self.record("validation", step, **scores))
        self.reporter.phase("checkpoint", step)
        bookmark = self.loader.bookmark(step)
        if not self.checkpoints.save_last(step, tokens, bookmark=bookmark, metrics=scores):
            unsaved = self.checkpoints.stop(step)
            return {**self._result("stopped", step), "unsaved": unsaved}
        result = self._result("finished", step)
        if self.mesh.rank == 0:
            self.reporter.metrics(self.record("stage_end", step, checkpoint=result["checkpoint"]))
        self.reporter.phase("finished", step)
        return result

    def _result(self, status: str, step: int) -> dict[str, Any]:
        return {"status": status, "step": step, "checkpoint": self.checkpoints.committed_key}

    def record(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """A line of the metric log, with what every line carries."""
        return self.job.record(kind, step, **values)
