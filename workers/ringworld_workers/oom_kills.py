"""How many processes the kernel has killed for want of memory, by its own counters.

``oom_kill`` of /proc/vmstat counts a whole machine, other containers' processes too. A memory
cgroup, which is what limits a container, counts those of its own whichever limit was hit: in
``memory.events`` (version 2, with the cgroups below it) or ``memory.oom_control`` (version 1).
Source: the kernel's admin-guide, cgroup-v2 and cgroup-v1/memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_COUNTER = "oom_kill"
_FILES = {"cgroup": "memory.oom_control", "cgroup2": "memory.events"}
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class OomKills:
    """The counters as one process sees them; None where there is none to read.

    Attributes:
        machine: processes killed on the whole machine since it started.
        cgroup: those of them that were in one memory cgroup.
        cgroup_file: where that is read; empty if nowhere.
    """

    machine: int | None = None
    cgroup: int | None = None
    cgroup_file: str = ""

    @property
    def known(self) -> bool:
        """Whether there is any."""
        return self.machine is not None or self.cgroup is not None


@dataclass(frozen=True, slots=True)
class Rise:
    """A counter that was higher later.

    Attributes:
        before: what it was.
        after: what it is.
        of_cgroup: it counts the process's own cgroup alone.
    """

    before: int
    after: int
    of_cgroup: bool


def rise(before: OomKills, after: OomKills) -> Rise | None:
    """What of two readings tells of a kill in between; None if nothing does.

    Args:
        before: read by the process that may have been killed.
        after: read later on its node. If it is of the same cgroup, that alone decides: a kill on
            the machine that its cgroup knows nothing of was another's.
    """
    counts, of_cgroup = (before.cgroup, after.cgroup), True
    if None in counts or before.cgroup_file != after.cgroup_file:
        counts, of_cgroup = (before.machine, after.machine), False
    first, last = counts
    if first is None or last is None or last <= first:
        return None
    return Rise(first, last, of_cgroup)


def read_oom_kills(cgroup_file: str | None = None, *, proc: Path = Path("/proc")) -> OomKills:
    """Read the counters here and now: a few small files that the kernel makes up.

    Args:
        cgroup_file: of the cgroup; None for that of this process.
        proc: where the system tells of itself.
    """
    files = [cgroup_file] if cgroup_file is not None else _own_files(proc)
    machine = count_in(_text(proc / "vmstat"))
    for file in files:
        if file and (count := count_in(_text(Path(file)))) is not None:
            return OomKills(machine, count, file)
    return OomKills(machine)


def count_in(text: str) -> int | None:
    """``oom_kill`` in lines of names and numbers; None where it is not (Linux before 4.13)."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == _COUNTER and value.strip().isdigit():
            return int(value)
    return None


def counter_files(cgroups: str, mounts: str) -> list[str]:
    """Where a process's memory cgroup counts, as far as the mounts show it.

    Args:
        cgroups: its ``/proc/PID/cgroup``.
        mounts: its ``/proc/PID/mountinfo``.

    Returns:
        Files that may exist: at most one of each version, for a system may have both.
    """
    paths: dict[str, str] = {}
    for line in cgroups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    found: dict[str, str] = {}
    for line in mounts.splitlines():
        mount, _, system = line.partition(" - ")
        kind, *others = system.split(" ")
        if kind not in paths or (kind == "cgroup" and "memory" not in others[-1].split(",")):
            continue
        root, place = (_plain(field) for field in mount.split(" ")[3:5])
        # A container may be shown its own part only, and yet be told its path in the whole.
        own = PurePosixPath(paths[kind])
        inside = own.relative_to(root) if own.is_relative_to(root) else PurePosixPath()
        found[kind] = str(PurePosixPath(place) / inside / _FILES[kind])
    return list(found.values())


def _own_files(proc: Path) -> list[str]:
    return counter_files(_text(proc / "self" / "cgroup"), _text(proc / "self" / "mountinfo"))


def _plain(field: str) -> str:
    """A field of mountinfo, where spaces are told as octal numbers."""
    return _ESCAPED.sub(lambda told: chr(int(told[1], 8)), field)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
