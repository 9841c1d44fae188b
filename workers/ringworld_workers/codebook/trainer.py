"""One step of a codebook's training, and all state that the next one depends on.

Legend: B crops of C pixels, L latent channels, n codes of a side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringworld_jobs.codebook import CodebookJob
from ringworld_model.vision.codes import nearest_codes
from ringworld_model.vision.vqgan import VQGAN, ResidualBlock, from_pixels
from ringworld_model.vision.vqgan_config import VQGANConfig
from ringworld_workers.codebook.moving_codebook import MovingCodebook
from ringworld_workers.data.files import DataError

WARMUP_STEPS = 20
LAST_RATE = 0.02
"""Of the peak, at the end of the cosine."""

GRADIENT_NORM = 1.0
START_VECTORS = 65_536
"""Latents that the codebook starts from, at most."""

START_VECTORS_PER_CODE = 64


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What one step came to.

    Attributes:
        loss: the whole of it.
        error: mean squared error of the crops, pixels in -1..1.
        commitment: mean squared distance of latents to their codes; 0 before there are codes.
        codes_used: codes that this step's crops chose; 0 before there are codes.
        revived: codes that were out of use and start anew.
        learning_rate: of this step.
    """

    loss: float
    error: float
    commitment: float
    codes_used: int
    revived: int
    learning_rate: float


def vqgan_config(job: CodebookJob) -> VQGANConfig:
    """The network that a job asks for."""
    shape = job.shape
    return VQGANConfig(
        block_out_channels=shape.block_out_channels,
        layers_per_block=shape.layers_per_block,
        latent_channels=shape.latent_channels,
        codebook_size=shape.codebook_size,
        norm_num_groups=shape.norm_groups,
        frame_size=shape.frame_size,
    )


class Trainer:
    """The network, its optimizer and its codebook.

    Attributes:
        model: the network.
        step: steps done.
        quantised: whether the codebook has been started.
    """

    def __init__(self, job: CodebookJob, frames: npt.NDArray[np.uint8], device: str) -> None:
        """Make a network with the job's seed.

        Args:
            job: the job.
            frames: training frames, uint8 [F, N, N, 3].
            device: ``cpu`` or ``cuda``.
        """
        self._job, self._frames, self._device = job, frames, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            self.model = VQGAN(vqgan_config(job))
        # A residual block that starts as its short cut: gradients reach both ends from step one.
        for block in self.model.modules():
            if isinstance(block, ResidualBlock):
                for parameter in block.conv2.parameters():
                    nn.init.zeros_(parameter)
        self.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        table = self.model.quantize.embedding.weight.requires_grad_(False)
        self._codebook = MovingCodebook(table)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, betas=(0.9, 0.99), weight_decay=1e-4)
        self._generator = torch.Generator().manual_seed(job.seed)
        self.step = 0
        self.quantised = False

    def run_step(self, progress: float) -> StepFigures:
        """Do one step.

        Args:
            progress: share of the training that lies behind, 0..1; decides the learning rate, and
                when the codebook starts.

        Raises:
            DataError: the loss is no finite number any more.
        """
        training = self._job.training
        if not self.quantised and progress >= training.continuous_share:
            self._codebook.start(self._latents_to_start_from())
            self.quantised = True
        rate = training.learning_rate * _share_of_peak(self.step, progress)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        crops = self._crops(training.batch_crops)
        latents = self.model.latents(crops)
        commitment = latents.new_zeros(())
        used = revived = 0
        quantised = latents
        if self.quantised:
            vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)
            codes, _ = nearest_codes(vectors.detach(), self._codebook.table)
            side = latents.shape[-1]
            chosen = self.model.lookup(codes.reshape(len(latents), -1), side)
            commitment = F.mse_loss(latents, chosen)
            # Straight through: the decoder sees codes, the encoder gets the decoder's gradient.
            quantised = latents + (chosen - latents).detach()
            used = len(codes.unique())
        made = self.model.reconstruct(quantised)
        error = F.mse_loss(made, crops)
        loss = (
            error
            + training.gradient * _edge_difference(made, crops)
            + training.commitment * commitment
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, GRADIENT_NORM)
        self._optimizer.step()
        if self.quantised:
            revived = self._codebook.follow(vectors.detach(), codes, self._generator)
        self.step += 1
        figures = StepFigures(
            float(loss.detach()),
            float(error.detach()),
            float(commitment.detach()),
            used,
            revived,
            rate,
        )
        if not math.isfinite(figures.loss):
            raise DataError(
                f"the loss is {figures.loss} at step {self.step}; lower training.learning_rate "
                f"({training.learning_rate:g})"
            )
        return figures

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "counts": self._codebook.counts,
            "sums": self._codebook.sums,
            "generator": self._generator.get_state(),
            "step": self.step,
            "quantised": self.quantised,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` returned."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._codebook.counts.copy_(state["counts"])
        self._codebook.sums.copy_(state["sums"])
        self._generator.set_state(state["generator"].cpu())
        self.step, self.quantised = int(state["step"]), bool(state["quantised"])

    def _crops(self, number: int) -> Tensor:
        """Random crops in -1..1, [B, 3, C, C], half of them mirrored, cut where codes begin."""
        size, step = self._job.crop_size, self._job.shape.downsampling
        places = (self._job.shape.frame_size - size) // step + 1
        rows = torch.randint(len(self._frames), (number,), generator=self._generator).tolist()
        corners = torch.randint(places, (number, 2), generator=self._generator).tolist()
        mirrored = torch.randint(2, (number,), generator=self._generator).tolist()
        crops = np.empty((number, size, size, 3), dtype=np.uint8)
        for index, (row, (y, x)) in enumerate(zip(rows, corners, strict=True)):
            crop = self._frames[row, y * step : y * step + size, x * step : x * step + size]
            crops[index] = crop[:, ::-1] if mirrored[index] else crop
        pixels = from_pixels(torch.from_numpy(crops), self._device)
        return pixels.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _latents_to_start_from(self) -> Tensor:
        """Latents of training crops, [M, L] in random order, at least as many as codes."""
        per_crop = (self._job.crop_size // self._job.shape.downsampling) ** 2
        codes = self._job.shape.codebook_size
        wanted = max(codes, min(START_VECTORS, START_VECTORS_PER_CODE * codes))
        number = self._job.training.batch_crops
        parts = []
        for _ in range(-(-wanted // (number * per_crop))):
            latents = self.model.latents(self._crops(number))
            parts.append(latents.permute(0, 2, 3, 1).flatten(0, 2))
        vectors = torch.cat(parts)
        order = torch.randperm(len(vectors), generator=self._generator)[:wanted]
        return vectors[order.to(vectors.device)]


def _share_of_peak(step: int, progress: float) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def _edge_difference(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of the differences of neighbouring pixels: blur costs, noise too."""
    error = made - wanted
    rows = (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
    columns = (error[:, :, :, 1:] - error[:, :, :, :-1]).abs().mean()
    return rows + columns
