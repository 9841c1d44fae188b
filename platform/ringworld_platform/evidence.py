"""What is kept of a gang's failure: ``evidence/attempt-N-KIND/`` in the run's folder.

``failure.json`` has the first cause, every rank's failure and last sign of life, and the nodes;
``stacks.txt`` the Python stacks of all ranks that could be reached; ``records.jsonl`` the last
lines of the metric log; ``log.txt`` the last lines of the odd rank. Beside it, what a rank has
found out of a step that diverged: ``attempt-N-step-S-KIND.json``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from ringworld_platform.evidence_folder import EVIDENCE_FOLDER, new_folder
from ringworld_platform.log_records import FolderLogs, LogReader, Wanted, in_plain
from ringworld_platform.recovery import Failure
from ringworld_platform.run_records import METRICS_FILE
from ringworld_platform.run_state import JobRecord
from ringworld_workers.actor import Examined, Identity
from ringworld_workers.recorder import Progress
from ringworld_workers.stacks import ProcessLook

log = logging.getLogger(__name__)

LAST_RECORDS = 20
LAST_LINES = 60
_TAIL_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What is known of one rank at its gang's end.

    Attributes:
        rank: which.
        pid: its process; None if it was never placed.
        ip: of its node.
        node: id of its node.
        phase: of its last heartbeat.
        step: of its last heartbeat.
        phase_seconds: how long ago that began.
        answered: it has told where it is.
        at: its place in the code.
        waits_in: the collective that it waits in.
        process: what its node says of a process that did not answer.
        failure: what it failed of.
    """

    rank: int
    pid: int | None = None
    ip: str = ""
    node: str = ""
    phase: str = ""
    step: int = 0
    phase_seconds: float | None = None
    answered: bool = False
    at: str = ""
    waits_in: str = ""
    process: str = ""
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a gang at its end.

    Attributes:
        ranks: all of them.
        stacks: Python stacks, by rank.
        nodes: of the cluster.
    """

    ranks: Sequence[RankFacts]
    stacks: Mapping[int, str]
    nodes: Sequence[Mapping[str, Any]]

    def step_of(self, rank: int | None) -> int:
        """The step that a rank was last heard of in; of no rank, the last that any was in."""
        steps = [facts.step for facts in self.ranks if rank is None or facts.rank == rank]
        return max(steps, default=0)


def gather(
    size: int,
    identities: Sequence[Identity],
    heartbeats: Sequence[Progress],
    answers: Mapping[int, Examined],
    looks: Mapping[int, ProcessLook],
    failures: Mapping[int, Failure],
) -> Evidence:
    """Put together what is known.

    Args:
        size: ranks of the gang.
        identities: by rank, as far as they are known.
        heartbeats: the last that was heard of each rank, by rank.
        answers: of the ranks that could be asked.
        looks: at the processes of ranks that did not answer.
        failures: of the ranks that have failed.
    """
    now = time.time()
    ranks = []
    for rank in range(size):
        found, look = answers.get(rank), looks.get(rank)
        identity = identities[rank] if rank < len(identities) else None
        beat = heartbeats[rank] if rank < len(heartbeats) else Progress()
        beat = found.progress if found is not None else beat
        ranks.append(
            RankFacts(
                rank=rank,
                pid=identity.pid if identity else None,
                ip=identity.ip if identity else "",
                node=identity.node if identity else "",
                phase=beat.phase,
                step=beat.step,
                phase_seconds=round(now - beat.since, 3) if beat.since else None,
                answered=found is not None,
                at=found.stacks.at if found else "",
                waits_in=found.stacks.waits_in if found else "",
                process=look.state if look else "",
                failure=failures[rank].text if rank in failures else "",
            )
        )
    stacks = {rank: found.stacks.text for rank, found in answers.items()}
    stacks |= {rank: look.stacks for rank, look in looks.items() if look.stacks}
    for rank, failure in failures.items():
        if failure.details:
            stacks[rank] = f"{failure.details}\n{stacks.get(rank, '')}"
    return Evidence(ranks, stacks, _nodes())


def save(
    run_folder: Path, record: JobRecord, failure: Failure, evidence: Evidence | None
) -> str | None:
    """Write the evidence of a failure into the run's folder.

    Args:
        run_folder: the run's.
        record: of the run.
        failure: the first cause.
        evidence: what else is known; None of a gang that ended in good order.

    Returns:
        The folder, relative to the run's; None if there is none.
    """
    if evidence is None:
        return None
    try:
        folder = new_folder(run_folder, record.attempt, failure.kind.value)
        _write(folder, run_folder, record, failure, evidence)
    except OSError as error:
        # A disk that is full must not turn a failure that restarts into one that does not.
        log.warning("no evidence of %s is kept: %s", failure.text, error)
        return None
    return folder.relative_to(run_folder).as_posix()


def keep(run_folder: Path, name: str, data: Mapping[str, Any]) -> str | None:
    """Write what a rank has found out into ``evidence/NAME.json``.

    Args:
        run_folder: the run's.
        name: of the file, without its ending.
        data: plain JSON.

    Returns:
        The file, relative to the run's folder; None if it could not be written.
    """
    path = run_folder / EVIDENCE_FOLDER / f"{Path(name).name}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(data, indent=1, default=str), encoding="utf-8")
    except OSError as error:
        log.warning("%s is not kept: %s", path, error)
        return None
    return path.relative_to(run_folder).as_posix()


def _write(
    folder: Path, run_folder: Path, record: JobRecord, failure: Failure, evidence: Evidence
) -> None:
    told = {
        "time": time.time(),
        "kind": failure.kind.value,
        "text": failure.text,
        "rank": failure.rank,
        "run_id": record.run_id,
        "stage": record.stage,
        "step": record.step,
        "attempt": record.attempt,
        "checkpoint": record.checkpoint,
        "ranks": [asdict(facts) for facts in evidence.ranks],
        "nodes": list(evidence.nodes),
    }
    (folder / "failure.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    # Names of files that are no UTF-8 come along in exceptions.
    (folder / "stacks.txt").write_bytes(_stacks_text(failure, evidence).encode("utf-8", "replace"))
    records = _tail(run_folder / METRICS_FILE, LAST_RECORDS)
    (folder / "records.jsonl").write_text(records, encoding="utf-8")
    if failure.rank is not None:
        reader = LogReader(FolderLogs(run_folder), "", Wanted(ranks=frozenset({failure.rank})))
        lines = "".join(f"{in_plain(record)}\n" for record in reader.tail(LAST_LINES))
        (folder / "log.txt").write_text(lines, encoding="utf-8", errors="replace")


def _stacks_text(failure: Failure, evidence: Evidence) -> str:
    parts = [failure.text]
    for facts in evidence.ranks:
        where = f"pid {facts.pid} on {facts.ip}" if facts.pid is not None else "not yet placed"
        parts.append(f"===== rank {facts.rank} ({where}), {facts.phase} of step {facts.step}")
        if not facts.answered:
            why = f": its process {facts.process}" if facts.process else ""
            parts.append(f"it did not answer{why}")
        if (stacks := evidence.stacks.get(facts.rank)) is not None:
            parts.append(stacks)
    return "\n\n".join(parts) + "\n"


def _nodes() -> list[dict[str, Any]]:
    try:
        return [
            {
                "node": node["NodeID"],
                "ip": node["NodeManagerAddress"],
                "alive": node["Alive"],
                "resources": {
                    name: amount
                    for name, amount in node["Resources"].items()
                    if not name.startswith(("node:", "bundle"))
                },
                "why_dead": node.get("DeathReasonMessage", ""),
            }
            for node in ray.nodes()
        ]
    except Exception as error:
        # A head that does not answer is a failure of its own; what else is known must not be lost.
        log.warning("no list of nodes: %s", error)
        return []


def _tail(path: Path, lines: int) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:]) + "\n"
