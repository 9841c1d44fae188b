"""Handing a job to a cluster through its dashboard: from any machine that reaches that port.

The job file and our own packages go along. On the head, `ringworld submit` is run with them; the
controller that it makes, and all workers, have the same packages.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ringworld_jobs.any_job import Job
from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_platform.cluster import JOB_NAME
from ringworld_platform.errors import ClusterError, PlatformError

LOOK_SECONDS = 0.5
AGENT_SECONDS = 60.0
PATIENCE_SECONDS = 300.0
"""Nodes unpack what is shipped, and a controller starts; training is not waited for."""
# From the home folder: the one that Ray unpacks into goes with the command. Which cluster it is,
# Ray says by RAY_ADDRESS.
_ENTRYPOINT = 'job="$PWD/job.yaml"; cd && python -m ringworld_platform submit "$job"'


class NotForElsewhere(PlatformError):
    """The job names what only this machine has."""


def submit(spec: Job, job: Path, url: str, say: Callable[[str], None]) -> int:
    """Have the head submit a job; returns once it has.

    Args:
        spec: of the job, read and checked.
        job: its file.
        url: of the dashboard, ``http://HOST:PORT``.
        say: takes what the command on the head prints.

    Returns:
        0 if the cluster has taken the job; else 1, and it was said why.

    Raises:
        NotForElsewhere: the job names files of this machine.
        ClusterError: no dashboard answers there, or it wants another token.
    """
    refuse_local(spec, job)
    from ray.job_submission import JobStatus

    from ringworld_platform.shipping import runtime_env

    client = _client(url)
    with tempfile.TemporaryDirectory(prefix="ringworld-submit-") as folder:
        (Path(folder) / "job.yaml").write_bytes(job.read_bytes())
        environment = {**runtime_env(), "working_dir": folder}
        made = _hand_over(client, environment, f"submit {spec.name}", url)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (status := client.get_job_status(made)).is_terminal():
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{made} has not submitted the job within {PATIENCE_SECONDS:g} s; "
                f"`ray job logs {made} --address {url}` may say why"
            )
        time.sleep(LOOK_SECONDS)
    # Ray says how it runs the command, and then the command what it has to say.
    printed = str(client.get_job_logs(made)).rpartition(_ENTRYPOINT)[2].strip()
    say(printed or str(client.get_job_info(made).message))
    return 0 if status == JobStatus.SUCCEEDED else 1


def refuse_local(spec: Job, job: Path) -> None:
    """Refuse what only this machine has.

    Raises:
        NotForElsewhere: names the field, its value and what to write instead.
    """
    store = spec.checkpoint.store
    if not store.startswith("s3://"):
        raise NotForElsewhere(
            f"checkpoint.store = {store!r} is a folder, and would be one of the head's own; "
            "write s3://BUCKET/PREFIX"
        )
    if spec.data.recipe is not None:
        raise NotForElsewhere(
            f"data.recipe = {spec.data.recipe!r} is a file of this machine; build it first "
            "(`ringworld data build`), copy the shards to a bucket, and name them: "
            "data.sources.NAME.shards: s3://BUCKET/PREFIX"
        )
    if isinstance(spec, GenerateSpec) and spec.out and not _is_place(spec.out):
        raise NotForElsewhere(
            f"out = {spec.out!r} is a folder of this machine; write s3://BUCKET/PREFIX, or leave "
            "it out: answers are in checkpoint.store then"
        )
    here = job.resolve().parent
    for field, value in _texts(spec.model_dump(mode="json"), ""):
        if "://" in value or not Path(value).is_relative_to(here):
            continue
        bucket = field.endswith(".shards") or field == "model"
        instead = "copy it to a bucket and write s3://BUCKET/PREFIX, or" if bucket else "write"
        raise NotForElsewhere(
            f"{field} = {value!r} is of this machine; {instead} an absolute path that all nodes "
            "have"
        )


def _is_place(out: str) -> bool:
    return out.startswith("s3://") or Path(out).is_absolute()


def _texts(value: Any, field: str) -> Iterator[tuple[str, str]]:
    """Every text of a spec, with the field that holds it."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, dict):
        for name, held in value.items():
            yield from _texts(held, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list):
        for number, held in enumerate(value):
            yield from _texts(held, f"{field}[{number}]")


def is_dashboard(address: str | None) -> bool:
    """Whether an address is a dashboard's, rather than a head's."""
    return address is not None and urlsplit(address).scheme in ("http", "https")


def _hand_over(client: Any, environment: dict[str, Any], name: str, url: str) -> str:
    """Upload what goes along and have the command started; returns its id."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return str(
                client.submit_job(
                    entrypoint=_ENTRYPOINT,
                    runtime_env=dict(environment),
                    metadata={JOB_NAME: name},
                )
            )
        except (RuntimeError, ConnectionError, OSError) as error:
            # A head that has just started, or is busy, has a dashboard before it can run anything.
            if "No available agent" not in str(error):
                raise ClusterError(f"{url} does not take the job: {_first_line(error)}") from error
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{url} does not take the job: the head's dashboard agent does not run; its "
                    "port, 52365, may be taken by another Ray there: start the head with "
                    "--dashboard-agent-listen-port"
                ) from error
        time.sleep(LOOK_SECONDS)


def _client(url: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    from ringworld_platform.cluster import offer_token, quiet_ray

    offer_token()
    try:
        client = JobSubmissionClient(url)
    except (RuntimeError, ConnectionError, OSError) as error:
        raise ClusterError(
            f"no dashboard of Ray takes jobs at {url}: {_first_line(error)}; is the tunnel open, "
            "and is the token in ~/.ray/auth_token the cluster's?"
        ) from error
    quiet_ray()  # which the client has just made speak
    return client


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
