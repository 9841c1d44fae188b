"""The kernel's counters of processes killed for memory, as systems of several kinds show them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ringworld_workers.oom_kills import OomKills, count_in, counter_files, read_oom_kills, rise

VMSTAT = "nr_free_pages 3514231\nnuma_hit 77\noom_kill 3\nballoon_inflate 0\n"
EVENTS = "low 0\nhigh 12\nmax 391\noom 2\noom_kill 2\noom_group_kill 0\nsock_throttled 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (VMSTAT, 3),
        (EVENTS, 2),
        (CONTROL, 1),
        ("oom_kill_disable 0\nunder_oom 0\n", None),
        ("oom_kill many\n", None),
        ("", None),
    ],
)
def test_one_counter_is_told_from_those_named_alike(text: str, count: int | None) -> None:
    assert count_in(text) == count


@pytest.mark.parametrize(
    ("cgroups", "mounts", "files"),
    [
        (  # systemd, version 2 only
            "0::/user.slice/user-1000.slice/session-3.scope\n",
            "34 25 0:29 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
            ["/sys/fs/cgroup/user.slice/user-1000.slice/session-3.scope/memory.events"],
        ),
        (  # a container of version 2, with a view of cgroups of its own
            "0::/\n",
            "1403 1395 0:29 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n",
            ["/sys/fs/cgroup/memory.events"],
        ),
        (  # a container of version 1: it is told its path in the whole, and shown its part
            "12:memory:/docker/4f2a\n11:cpuset:/docker/4f2a\n0::/system.slice/containerd.service\n",
            "611 610 0:33 /docker/4f2a /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset\n"
            "612 610 0:35 /docker/4f2a /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            ["/sys/fs/cgroup/memory/memory.oom_control"],
        ),
        (  # a job of Slurm's in version 1, beside the empty tree of version 2
            "4:memory:/slurm/uid_7/job_9/step_0\n3:cpu,cpuacct:/slurm\n0::/slurm.service\n",
            "35 31 0:32 / /sys/fs/cgroup/memory rw shared:4 - cgroup cgroup rw,memory\n"
            "41 31 0:38 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw\n",
            [
                "/sys/fs/cgroup/memory/slurm/uid_7/job_9/step_0/memory.oom_control",
                "/sys/fs/cgroup/unified/slurm.service/memory.events",
            ],
        ),
        (  # a name with a space
            "0::/a b\n",
            "34 25 0:29 / /mnt/c\\040groups rw - cgroup2 cgroup2 rw\n",
            ["/mnt/c groups/a b/memory.events"],
        ),
        ("", "22 1 0:21 / /proc rw - proc proc rw\n", []),
    ],
)
def test_where_a_memory_cgroup_counts(cgroups: str, mounts: str, files: list[str]) -> None:
    assert counter_files(cgroups, mounts) == files


def test_files_are_read_again_by_another_process_of_the_node(tmp_path: Path) -> None:
    proc, tree = tmp_path / "proc", tmp_path / "cgroups"
    (proc / "self").mkdir(parents=True)
    (proc / "vmstat").write_text(VMSTAT)
    (proc / "self" / "cgroup").write_text("4:memory:/job\n0::/service\n")
    (proc / "self" / "mountinfo").write_text(
        f"41 31 0:38 / {tree}/unified rw - cgroup2 cgroup2 rw\n"
        f"35 31 0:32 / {tree}/memory rw - cgroup cgroup rw,memory\n"
    )
    counter = tree / "memory" / "job" / "memory.oom_control"
    counter.parent.mkdir(parents=True)
    counter.write_text(CONTROL)

    before = read_oom_kills(proc=proc)
    assert before == OomKills(3, 1, str(counter))
    counter.write_text(CONTROL.replace("oom_kill 1", "oom_kill 2"))
    (proc / "self" / "cgroup").unlink()
    after = read_oom_kills(before.cgroup_file, proc=proc)
    assert after == OomKills(3, 2, str(counter))
    counter.unlink()
    assert read_oom_kills(before.cgroup_file, proc=proc) == OomKills(3)
    (proc / "vmstat").unlink()
    assert not read_oom_kills("", proc=proc).known


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not count")
def test_this_kernel_counts() -> None:
    here = read_oom_kills()
    assert here.machine is not None, "Linux 4.13 or newer"
    again = read_oom_kills(here.cgroup_file)
    assert again.cgroup_file == here.cgroup_file and again.machine is not None


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (OomKills(3), OomKills(4), (3, 4, False)),
        (OomKills(3), OomKills(3), None),
        (OomKills(3, 0, "a"), OomKills(5, 1, "a"), (0, 1, True)),
        (OomKills(3, 0, "a"), OomKills(4, 0, "a"), None),  # another's
        (OomKills(3, 0, "a"), OomKills(4, 9, "b"), (3, 4, False)),
        (OomKills(3, 0, "a"), OomKills(4), (3, 4, False)),
        (OomKills(None, 0, "a"), OomKills(), None),
        (OomKills(7), OomKills(0), None),  # started anew
    ],
)
def test_what_two_readings_tell(
    before: OomKills, after: OomKills, told: tuple[int, int, bool] | None
) -> None:
    found = rise(before, after)
    assert (found and (found.before, found.after, found.of_cgroup)) == told
