"""A job's parts: what it needs one gang for each, one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from ringworld_jobs.mesh import MeshSize
from ringworld_platform.runner_config import RunnerConfig
from ringworld_workers.stage_job import GangJob

Result = Mapping[str, Any]
"""What the stage function returned on rank 0."""
Device = Literal["cpu", "cuda"]


class Part(Protocol):
    """What one gang does of a job: trains a stage, evaluates its model. It may begin anew."""

    @property
    def name(self) -> str:
        """Of its gang, unlike for any two parts of the job."""

    @property
    def title(self) -> str:
        """What is being done, for the user: ``stage 4k``."""

    @property
    def leaving(self) -> str:
        """What a gang that was asked to stop does first: ``saves a checkpoint before ...``."""

    def function(self, config: RunnerConfig) -> str:
        """``module:function`` that each rank runs."""

    def begin(self, there: int) -> MeshSize:
        """The mesh to try now; the run's state shows it from here on.

        Args:
            there: workers that the cluster holds in all.

        Raises:
            PlatformError: the job's workers cannot form it.
        """

    def waiting(self, there: int, shortage: str) -> str:
        """The gang does not start for want of workers.

        Args:
            there: workers that the cluster holds in all.
            shortage: why, in the words of who cannot place it.

        Returns:
            What to tell the user.

        Raises:
            MeshChanged: ``begin`` gives another mesh now.
        """

    def explain(self, mesh: MeshSize) -> str | None:
        """Why it runs on another mesh than the wanted one; None if it does not."""

    def job(self, mesh: MeshSize, device: Device) -> GangJob:
        """What each rank is told, for the attempt that the run is at.

        Raises:
            PlatformError: what it needs is not there.
        """

    def stopped(self, result: Result) -> str:
        """What to say of a gang that has stopped as it was asked to, besides its step."""

    def done(self, result: Result) -> None:
        """Take note that it is done; the run's next part is another one.

        Raises:
            JobFailed: what came out ends the job.
        """
