"""Errors that a person can act on: each message is one sentence, fit to be printed as it is."""

from __future__ import annotations


class PlatformError(RuntimeError):
    """Base of what the platform refuses or cannot do."""


class ClusterError(PlatformError):
    """No Ray cluster could be reached, or started."""


class UnknownRunError(PlatformError):
    """No run or job of that name."""


class RunConflictError(PlatformError):
    """The run is in a state that does not allow this."""


class StoreRefused(PlatformError):
    """The store that a job's checkpoints are to go to cannot be written."""


class RunFolderError(PlatformError):
    """The run's folder cannot be written."""


class JobTooLarge(PlatformError):
    """The cluster can never hold the job."""
