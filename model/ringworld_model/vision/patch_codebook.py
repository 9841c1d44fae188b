"""A visual vocabulary for small machines: k-means over RGB patches.

One code a patch, fitted in a second on one CPU core, where LWM uses a pretrained VQGAN. One
codebook serves all videos of a dataset: ids of two codebooks must never be mixed, which the digest
guards.

Legend: F frames, N = frame_size, P = patch_size, K codes, n = (N / P)^2 codes a frame.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ringworld_model.vision.frames import Frames, as_frames, patchify, unpatchify

BATCH_PATCHES = 8_192
"""Patches compared with the whole codebook at one time: bounds memory to this times K floats."""


@dataclass(frozen=True, eq=False)
class PatchCodebook:
    """Centroids, and the geometry of the frames that they describe.

    Attributes:
        centroids: float32 [K, P * P * 3], pixel values as fractions 0..1.
        frame_size: N, pixels of a side of a frame.
        patch_size: P, pixels of a side of a patch.
    """

    centroids: NDArray[np.float32]
    frame_size: int
    patch_size: int

    def __post_init__(self) -> None:
        """Refuse geometry that does not add up.

        Raises:
            ValueError: names the value and the rule.
        """
        if self.frame_size % self.patch_size:
            raise ValueError(
                f"frame_size={self.frame_size} is not divisible by patch_size={self.patch_size}"
            )
        width = self.patch_size**2 * 3
        if self.centroids.ndim != 2 or self.centroids.shape[1] != width:
            raise ValueError(
                f"centroids have shape {self.centroids.shape}; patches of {self.patch_size} pixels "
                f"need [codes, {width}]"
            )

    @property
    def codebook_size(self) -> int:
        """K, the number of codes."""
        return len(self.centroids)

    @property
    def codes_per_frame(self) -> int:
        """n, the codes of one frame."""
        return (self.frame_size // self.patch_size) ** 2

    def encode(self, frames: Frames) -> NDArray[np.int32]:
        """Nearest code of each patch.

        Args:
            frames: uint8 [F, N, N, 3], resized and cropped already (``resize_and_crop``).

        Returns:
            int32 [F, n].

        Raises:
            ValueError: frames of another size.
        """
        source = as_frames(frames)
        if tuple(source.shape[1:3]) != (self.frame_size, self.frame_size):
            raise ValueError(
                f"frames are {source.shape[1]}x{source.shape[2]} pixels, the codebook's are "
                f"{self.frame_size}x{self.frame_size}; resize_and_crop them first"
            )
        patches = patchify(source, self.patch_size).flatten(0, 1)
        codes, _ = _nearest(patches, torch.from_numpy(self.centroids))
        return codes.to(torch.int32).reshape(len(source), self.codes_per_frame).numpy()

    def decode(self, codes: ArrayLike) -> NDArray[np.uint8]:
        """Frames that the codes stand for.

        Args:
            codes: ints [F, n].

        Returns:
            uint8 [F, N, N, 3].
        """
        pixels = np.rint(self.centroids * 255).clip(0, 255).astype(np.uint8)
        patches = torch.from_numpy(pixels[np.asarray(codes)])
        return unpatchify(patches, self.patch_size).numpy()

    def digest(self) -> str:
        """SHA-256 (hex) of the centroids and the geometry; equal digests mean equal codes."""
        sha = hashlib.sha256(f"patch {self.frame_size} {self.patch_size}".encode())
        sha.update(np.ascontiguousarray(self.centroids, "<f4").tobytes())
        return sha.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write an .npz file to exactly this path."""
        with Path(path).open("wb") as file:
            np.savez(
                file,
                centroids=self.centroids,
                frame_size=np.int64(self.frame_size),
                patch_size=np.int64(self.patch_size),
            )

    @classmethod
    def load(cls, path: Path | str) -> PatchCodebook:
        """Read what ``PatchCodebook.save`` wrote; never unpickles.

        Raises:
            ValueError: the file is no codebook; names it.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(
                    centroids=arrays["centroids"].astype(np.float32),
                    frame_size=int(arrays["frame_size"]),
                    patch_size=int(arrays["patch_size"]),
                )
        except (KeyError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path} is no patch codebook: {error}; build the data again"
            ) from error

    @classmethod
    def fit(
        cls,
        frames: Frames,
        codebook_size: int,
        patch_size: int,
        iterations: int = 12,
        seed: int = 0,
        max_samples: int = 40_000,
    ) -> PatchCodebook:
        """Fit a codebook by k-means on a random sample of patches.

        A code that no patch chose is moved to one of the patches that are described worst, so that
        none stays unused. The same arguments give the same codebook.

        Args:
            frames: uint8 [F, N, N, 3], resized and cropped already.
            codebook_size: K.
            patch_size: P, divides N.
            iterations: rounds of assignment and update.
            seed: of the sample and of the first centroids.
            max_samples: patches used.

        Raises:
            ValueError: frames are not square, or hold fewer patches than codes.
        """
        source = as_frames(frames)
        if source.shape[1] != source.shape[2]:
            raise ValueError(
                f"frames are {source.shape[1]}x{source.shape[2]} pixels; "
                "resize_and_crop them to squares"
            )
        patches = patchify(source, patch_size).flatten(0, 1)
        if len(patches) < codebook_size:
            raise ValueError(
                f"{len(patches)} patches cannot fill codebook_size={codebook_size}; "
                "give more frames or lower codebook_size"
            )
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(patches), generator=generator)[
            : max(max_samples, codebook_size)
        ]
        samples = patches[chosen].float() / 255
        # The sample is in random order, so its head is a random choice.
        centroids = samples[:codebook_size].clone()
        for _ in range(iterations):
            codes, distances = _nearest(samples, centroids)
            counts = torch.bincount(codes, minlength=codebook_size)
            sums = torch.zeros_like(centroids).index_add_(0, codes, samples)
            centroids = sums / counts.clamp(min=1)[:, None]
            dead = (counts == 0).nonzero().squeeze(1)
            if len(dead):
                centroids[dead] = samples[distances.topk(len(dead)).indices]
        return cls(centroids.numpy(), int(source.shape[1]), patch_size)


def _nearest(patches: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each patch and the squared distance to it, in batches.

    Args:
        patches: uint8 or float32 (0..1) [M, P * P * 3].
        centroids: float32 [K, P * P * 3].

    Returns:
        int64 [M] and float32 [M].
    """
    halved_norms = centroids.square().sum(1) / 2
    codes = torch.empty(len(patches), dtype=torch.int64)
    distances = torch.empty(len(patches))
    for start in range(0, len(patches), BATCH_PATCHES):
        batch = patches[start : start + BATCH_PATCHES]
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch
        # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2): the bracket alone decides which c is nearest.
        score, code = torch.addmm(-halved_norms, batch, centroids.T).max(1)
        codes[start : start + len(batch)] = code
        distances[start : start + len(batch)] = batch.square().sum(1) - 2 * score
    return codes, distances
