"""What one step costs: time by phase, memory, and model FLOPs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch

from ringworld_model.config import ModelConfig

DENSE_BF16_PEAK_FLOPS = {
    # Vendors' dense bf16 figures per second, by the name that CUDA reports.
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


class StepTimer:
    """Seconds of each phase of a step.

    On CUDA the kernels of a phase run on after its Python code has ended, so each phase ends with
    a synchronisation; the loss read-back at the step's end would wait for them anyway.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with no phase timed."""
        self._cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the enclosed code to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._cuda:
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def take(self) -> dict[str, float]:
        """Return the seconds by phase and start anew."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Resident host memory of this process and the peak of its device memory, in bytes."""
    device_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "memory_host_bytes": psutil.Process().memory_info().rss,
        "memory_device_bytes": device_bytes,
    }


def visible_pairs(document_lengths: Sequence[int]) -> int:
    """Query-key pairs that a causal mask inside each document leaves visible."""
    return sum(length * (length + 1) // 2 for length in document_lengths)


def training_flops(
    config: ModelConfig, document_lengths: Sequence[Sequence[int]], num_targets: Sequence[int]
) -> float:
    """FLOPs of forward and backward over packed rows; what is recomputed or padding counts nothing.

    ``6 * (P * tokens + hidden * sum_m vocabulary_m * targets_m) + 12 * layers * heads * head_dim *
    pairs``: P counts the layers' matrices (tables are look-ups), each target passes through the
    head of its modality, and pairs are those that a causal mask inside each document leaves
    visible.

    Args:
        config: the model's shape.
        document_lengths: tokens of each document of each row.
        num_targets: targets that carry loss, of text and of vision.
    """
    num_tokens = sum(map(sum, document_lengths))
    num_pairs = sum(map(visible_pairs, document_lengths))
    projections = 2 * config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * projections
    layer = attention + 3 * config.hidden_size * config.ffn_size
    heads = config.text_vocab_size * num_targets[0] + config.vision_vocab_size * num_targets[1]
    dense = 6.0 * (config.num_layers * layer * num_tokens + config.hidden_size * heads)
    return dense + 12.0 * config.num_layers * config.num_heads * config.head_dim * num_pairs


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU, else None: an MFU against a guessed peak says nothing."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in DENSE_BF16_PEAK_FLOPS.items() if key in name), None)
