"""A CPU as a device: its rate is measured, in a moment and without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from ringworld_jobs.planner.hardware import GB, Device

MATMUL_SIZE = 256
SECONDS = 0.08
WAIT_SECONDS = 20.0

# Of the rate of numpy's fp32 product of 256 x 256 on one thread: what the decoder's layers and
# heads reach, elementwise work included, and torch's flash kernel. Fitted to the quickstart's
# records on two AVX-512 cores, see docs/planner.md.
LAYER_EFFICIENCY, ATTENTION_EFFICIENCY = 0.42, 0.60
# Of gloo between two processes of one machine; from the same records.
EXCHANGE_BANDWIDTH = 0.5 * GB
# Of a worker that has imported torch, Ray and DeepSpeed, before it holds a model: the same.
PROCESS_BYTES = 600 * 2**20
# What the C library keeps of the memory that comes and goes in a step; the same.
RESERVE_SHARE = 0.25
# Of the model tiny on 32 tokens: the Python and the kernel calls of a layer.
LAYER_SECONDS = 5e-3

# Prints the median rate in FLOPs a second. OPENBLAS_NUM_THREADS and its like say on how many
# threads.
_PROBE = f"""
import time
import numpy
n = {MATMUL_SIZE}
a = numpy.random.default_rng(0).random((n, n), dtype=numpy.float32)
b = a.T.copy()
a @ b
rates = []
end = time.perf_counter() + {SECONDS}
while time.perf_counter() < end:
    began = time.perf_counter()
    a @ b
    rates.append(2.0 * n**3 / (time.perf_counter() - began))
print(sorted(rates)[len(rates) // 2])
"""
_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


class CalibrationError(RuntimeError):
    """The rate of this machine could not be measured."""


@dataclass(slots=True)
class Calibration:
    """Measures in processes of its own, as many at once as workers will compute at once."""

    _processes: list[subprocess.Popen[str]]

    @classmethod
    def start(cls, workers: int, threads: int) -> Calibration:
        """Begin; ``flops`` waits for the end.

        Args:
            workers: processes that will compute at the same time; more than there are cores
                measure nothing else.
            threads: that each computes with.
        """
        environment = os.environ | dict.fromkeys(_THREADS, str(threads))
        count = max(1, min(workers, os.cpu_count() or 1))
        return cls(
            [
                subprocess.Popen(
                    [sys.executable, "-c", _PROBE],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                for _ in range(count)
            ]
        )

    def flops(self) -> float:
        """Rate of a worker's matrix products, per second: that of the slowest process.

        Raises:
            CalibrationError: a process failed or took far too long.
        """
        rates = []
        try:
            for process in self._processes:
                said, _ = process.communicate(timeout=WAIT_SECONDS)
                rates.append(float(said))
        except (subprocess.TimeoutExpired, ValueError):
            raise CalibrationError(
                "measuring this machine's CPU failed; name GPUs with --gpus, or see whether "
                f"`{sys.executable} -c 'import numpy'` works"
            ) from None
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
        return min(rates)


def cpu_device(flops: float, workers: int, memory_bytes: float | None = None) -> Device:
    """A worker on CPU cores.

    Args:
        flops: fp32 matrix products of 256 x 256, per second: numpy's or torch's.
        workers: that share the machine.
        memory_bytes: of the machine; this one's if None.
    """
    if memory_bytes is None:
        memory_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(
        name="CPU",
        memory_bytes=memory_bytes / workers,
        bf16_flops=flops,  # what bf16 gains differs from core to core, and is not measured
        fp32_flops=flops,
        memory_bandwidth=5 * GB,
        matmul_efficiency=LAYER_EFFICIENCY,
        forward_efficiency=ATTENTION_EFFICIENCY,
        backward_efficiency=ATTENTION_EFFICIENCY,
        link_bandwidth=EXCHANGE_BANDWIDTH,
        network_bandwidth=0.1 * GB,
        bus_bandwidth=5 * GB,
        host_bandwidth=5 * GB,
        host_bytes=memory_bytes / workers,
        devices_per_node=workers,
        process_bytes=PROCESS_BYTES,
        context_bytes=0.0,
        layer_seconds=LAYER_SECONDS,
        reserve_share=RESERVE_SHARE,
        overlaps=False,  # the threads that send share the cores with those that compute
        unmeasured="bf16",
    )
