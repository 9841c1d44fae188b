"""Hardware by name, and the rate of a CPU."""

from __future__ import annotations

import pytest

from ringworld_jobs.planner.cpu import Calibration, cpu_device
from ringworld_jobs.planner.hardware import GIB, HardwareError, gpu_named, parse_gpus


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("64xH100-80GB", "H100-80GB", 64),
        ("8 x h100", "H100-80GB", 8),
        ("A100", "A100-80GB", 1),
        ("16xA100-40GB", "A100-40GB", 16),
        ("4*b200", "B200-180GB", 4),
    ],
)
def test_gpus_are_read(text: str, name: str, count: int) -> None:
    found = parse_gpus(text)
    assert (found.device.name, found.count) == (name, count)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("64xH10", "did you mean 64xH100-80GB?"),
        ("8xA100-80", "did you mean 8xA100-80GB?"),
        ("4xL40", "did you mean 4xL40S-48GB?"),
        ("8xTPU", "known, only A100-40GB"),
        ("H100x64", "did you mean 64xH100-80GB?"),
        ("0xH100", "at least 1 GPU"),
        ("", "write a number and a GPU"),
    ],
)
def test_others_are_refused_with_what_was_meant(text: str, said: str) -> None:
    with pytest.raises(HardwareError) as refused:
        parse_gpus(text)
    assert said in str(refused.value)
    assert ("did you mean" in str(refused.value)) == ("did you mean" in said)


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", None, "A100-80GB"),
        ("A100-40G", None, "A100-40GB"),
        ("NVIDIA H200", 139.8, "H200-141GB"),
        ("NVIDIA B200", None, "B200-180GB"),
        ("NVIDIA L40S", 44.4, "L40S-48GB"),
        ("NVIDIA GeForce RTX 4090", 24.0, None),
    ],
)
def test_names_of_the_driver_and_of_ray_are_known(
    name: str, gib: float | None, expected: str | None
) -> None:
    found = gpu_named(name, None if gib is None else gib * GIB)
    assert (found.name if found else None) == expected


def test_a_cpu_is_measured_in_a_moment() -> None:
    rate = Calibration.start(workers=2, threads=1).flops()
    assert 1e9 < rate < 1e12
    device = cpu_device(rate, workers=4, memory_bytes=8 * GIB)
    assert device.is_cpu
    assert device.host_bytes == 2 * GIB
    assert device.peak("fp32") == rate
