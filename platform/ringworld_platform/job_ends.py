"""How a run's work ends before it is done: what its thread raises to get out of where it is."""

from __future__ import annotations


class JobStopped(Exception):
    """The user asked the job to stop, and it has; the text says if its state was not saved."""


class JobPreempted(Exception):
    """The run has made way for another; it goes on when there is room again."""


class JobReleased(Exception):
    """The controller is going away; another one will go on."""


class JobFailed(Exception):
    """The job cannot go on; the message is the one line for the user."""
