"""What became of a stage's checkpoints: counted, and told."""

from __future__ import annotations

import logging
from typing import Any

from ringworld_workers.mesh import Mesh
from ringworld_workers.reporter import Reporter
from ringworld_workers.stage_job import StageJob

log = logging.getLogger(__name__)


class SaveRecords:
    """The counts are the same on every rank; rank 0 reports."""

    def __init__(self, job: StageJob, mesh: Mesh, reporter: Reporter) -> None:
        """Count from zero."""
        self._job, self._mesh, self._reporter = job, mesh, reporter
        self.num_skipped = 0
        """Left out, because the one before was still on its way."""
        self.num_failed = 0
        self.num_failed_in_row = 0
        self.first_cause = ""
        """Why the first of those in a row failed."""

    def committed(self, outcome: dict[str, Any]) -> None:
        """A checkpoint exists.

        Args:
            outcome: what ``CheckpointWriter.commit`` says of it.
        """
        self.num_failed_in_row, self.first_cause = 0, ""
        if self._mesh.rank == 0:
            counts = {"skipped": self.num_skipped, "failed": self.num_failed}
            self._reporter.metrics(self._job.record("checkpoint", **outcome, **counts))

    def failed(self, step: int, error: Exception) -> None:
        """The checkpoint of a step could not be saved."""
        self.num_failed += 1
        self.num_failed_in_row += 1
        self.first_cause = self.first_cause or str(error)
        limit = self._job.spec.checkpoint.max_failures
        self.tell(
            "checkpoint_failed",
            f"the checkpoint of step {step} of stage {self._job.stage.name} is not saved "
            f"({self.num_failed_in_row} in a row; checkpoint.max_failures is {limit}): {error}",
            warn=True,
        )
        if self._mesh.rank == 0:
            self._reporter.metrics(
                self._job.record(
                    "checkpoint_failed",
                    step,
                    error=str(error),
                    failed=self.num_failed,
                    failed_in_row=self.num_failed_in_row,
                )
            )

    def left_out(self, step: int) -> None:
        """A checkpoint was due while the one before was on its way."""
        self.num_skipped += 1
        self.tell(
            "checkpoint",
            f"the checkpoint due at step {step} of stage {self._job.stage.name} is left out "
            f"({self.num_skipped} so far): the one before is still on its way, and "
            "checkpoint.when_busy is skip",
        )

    def tell(self, kind: str, text: str, *, warn: bool = False) -> None:
        """Write an event, and a line of rank 0's log."""
        if self._mesh.rank == 0:
            log.log(logging.WARNING if warn else logging.INFO, "%s", text)
            self._reporter.event({"kind": kind, "text": text})
