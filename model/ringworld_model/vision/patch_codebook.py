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
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ringworld_model.vision.codes import checked_codes, fit_centroids, nearest_codes
from ringworld_model.vision.frames import Frames, as_frames, patchify, unpatchify

CODEBOOK_FILE = "codebook.npz"
"""A patch codebook's file in the folder that it is saved into."""


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
        codes, _ = nearest_codes(patches, torch.from_numpy(self.centroids))
        return codes.to(torch.int32).reshape(len(source), self.codes_per_frame).numpy()

    def decode(self, codes: ArrayLike) -> NDArray[np.uint8]:
        """Frames that the codes stand for.

        Args:
            codes: ints [F, n].

        Returns:
            uint8 [F, N, N, 3].

        Raises:
            ValueError: another number of codes a frame, or one out of range.
        """
        ids = checked_codes(codes, self.codebook_size, self.codes_per_frame)
        pixels = np.rint(self.centroids * 255).clip(0, 255).astype(np.uint8)
        patches = torch.from_numpy(pixels[ids])
        return unpatchify(patches, self.patch_size).numpy()

    def digest(self) -> str:
        """SHA-256 (hex) of the centroids and the geometry; equal digests mean equal codes."""
        sha = hashlib.sha256(f"patch {self.frame_size} {self.patch_size}".encode())
        sha.update(np.ascontiguousarray(self.centroids, "<f4").tobytes())
        return sha.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a dataset's meta.json says of the codebook."""
        return {
            "kind": "patch",
            "size": self.codebook_size,
            "codes_per_frame": self.codes_per_frame,
            "frame_size": self.frame_size,
            "patch_size": self.patch_size,
            "digest": self.digest(),
        }

    def save(self, folder: Path | str) -> None:
        """Write ``codebook.npz`` into a folder, or exactly the file where a path ends in .npz."""
        path = Path(folder)
        if path.suffix != ".npz":
            path.mkdir(parents=True, exist_ok=True)
            path /= CODEBOOK_FILE
        with path.open("wb") as file:
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
        except (KeyError, ValueError, EOFError, TypeError, BadZipFile) as error:
            # What NumPy says of a file of another kind speaks of pickles, which are never read.
            raise ValueError(
                f"{path} is no patch codebook, or damaged; name a codebook.npz that a build wrote, "
                f"or build the data again"
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
        centroids = fit_centroids(samples, codebook_size, iterations)
        return cls(centroids.numpy(), int(source.shape[1]), patch_size)
