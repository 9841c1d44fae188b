"""What a rank says of what it computes on."""

from __future__ import annotations

import torch

from ringworld_jobs.planner.cpu import Calibration
from ringworld_workers.machine import machine_record


def test_a_cpu_rank_measures_what_the_planner_measures() -> None:
    """The same product on one thread, by torch and by numpy: each the best of several, since the
    cores may have other work."""
    torch.set_num_threads(1)
    by_torch = max(machine_record(torch.device("cpu"))["matmul_flops"] for _ in range(3))
    by_numpy = max(Calibration.start(workers=1, threads=1).flops() for _ in range(3))
    assert machine_record(torch.device("cpu"))["device_name"] == "CPU"
    assert 0.5 < by_torch / by_numpy < 2
