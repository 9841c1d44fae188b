"""One thread a test process, and, with ``pytest -n``, one Ray runtime on the machine at a time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

# Before torch is imported, here or in what tests start: ranks and pytest's own workers share the
# cores, and more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    """Hand out files, but all that start Ray as if they were one: they mostly wait.

    The first of them is the first file of all, so one worker runs them from the start.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "ray" if file in with_ray else file

    with_ray = {
        path.relative_to(config.rootpath).as_posix()
        for path in (config.rootpath / "tests").rglob("test_*.py")
        if "pytest.mark.ray" in path.read_text(encoding="utf-8")
    }
    return OneRay(config, log)
