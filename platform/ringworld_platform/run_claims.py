"""What a run has in its store besides checkpoints, and whether the store takes anything at all.

On S3 several machines may share a store, and each has a folder of runs of its own: so a run's id is
claimed in the store, by an object that only one of them can write. On ``file://`` the run's state,
which lies in the same folder, does that job.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ringworld_jobs.any_job import Job, load_any_job
from ringworld_jobs.problem import JobSpecError
from ringworld_platform.errors import PlatformError, StoreRefused
from ringworld_platform.run_records import CHECKPOINTS_FOLDER, SPEC_FILE, STATE_FILE
from ringworld_platform.run_state import JobRecord
from ringworld_workers.store.base import Store, StoreError
from ringworld_workers.store.opening import open_store

CLAIM_FILE = "run.json"
_FORMAT = {"format": "ringworld-run", "version": 1}


def run_url(spec: Job, run_id: str) -> str:
    """Where a run's checkpoints and their manifests lie: its folder or prefix in the store."""
    return f"{spec.checkpoint.store.rstrip('/')}/{run_id}"


def checkpoints_url(spec: Job, run_id: str) -> str:
    """The root that checkpoint code opens."""
    return f"{run_url(spec, run_id)}/{CHECKPOINTS_FOLDER}"


def on_s3(spec: Job) -> bool:
    """Whether the job's checkpoints go to S3."""
    return spec.checkpoint.store.startswith("s3://")


def check_store(spec: Job) -> None:
    """Write, read and remove a small object in the job's store, from this very process.

    Raises:
        StoreRefused: it cannot be used; one sentence with the store and the reason.
    """
    url = spec.checkpoint.store
    try:
        open_store(url).check_writable()
    except StoreError as error:
        raise StoreRefused(f"checkpoint.store {url} cannot be used: {error.reason}") from error


def spec_kept_in(run_folder: Path) -> Job | None:
    """A run's resolved spec; None where it cannot be read, which is said where the run begins."""
    try:
        return load_any_job(run_folder / SPEC_FILE, check_files=False)
    except JobSpecError:
        return None


class RunClaims:
    """The run ids of one store on S3."""

    def __init__(self, spec: Job) -> None:
        """Take the job whose store it is; nothing is read or written yet."""
        self._url = spec.checkpoint.store
        self._store: Store = open_store(self._url)

    @classmethod
    def of(cls, spec: Job) -> RunClaims | None:
        """The claims of a job's store; None where that is a folder, which needs none."""
        return cls(spec) if on_s3(spec) else None

    def highest(self, job: str) -> int:
        """The highest number among the ids of a job's runs, 0 where it has none."""
        numbered = re.compile(rf"{re.escape(job)}-(\d+)")
        with self._plain():
            found = [numbered.fullmatch(name) for name in self._store.folders()]
        return max((int(match[1]) for match in found if match), default=0)

    def take(self, record: JobRecord) -> bool:
        """Claim the record's id for its uid; False where another run has it."""
        claim = {
            **_FORMAT,
            "uid": record.uid,
            "job": record.job,
            "spec_digest": record.spec_digest,
            "created": record.submitted,
            "host": socket.gethostname(),
        }
        with self._plain():
            key = f"{record.run_id}/{CLAIM_FILE}"
            return self._store.put_if_absent(key, json.dumps(claim, indent=1).encode())

    def keep_spec(self, run_id: str, spec_yaml: str) -> None:
        """Put the resolved spec beside the claim: whoever finds the checkpoints can read it."""
        with self._plain():
            self._store.put(f"{run_id}/{SPEC_FILE}", [spec_yaml.encode()])

    def give_back(self, run_id: str) -> None:
        """Free an id that was just claimed for a run that never came to be."""
        with self._plain():
            self._store.delete(f"{run_id}/{STATE_FILE}")
            self._store.delete(f"{run_id}/{SPEC_FILE}")
            self._store.delete(f"{run_id}/{CLAIM_FILE}")

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """A store's refusal as an error that commands print as it is."""
        try:
            yield
        except StoreError as error:
            raise PlatformError(f"checkpoint.store {self._url}: {error}") from error
