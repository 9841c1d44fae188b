"""What turns frames into codes and back, whichever kind it is: the seam of the data pipeline.

A dataset holds the digest of the tokenizer that made its codes: ids of two tokenizers must never be
mixed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ringworld_model.vision.frames import Frames
from ringworld_model.vision.patch_codebook import CODEBOOK_FILE, PatchCodebook
from ringworld_model.vision.vqgan_config import CONFIG_FILE
from ringworld_model.vision.vqgan_tokenizer import CODEBOOK_FOLDER, Precision, VQGANTokenizer

_VQGAN_FOLDERS = (".", CODEBOOK_FOLDER, "vqvae")
"""Where a VQGAN lies in a folder: here, in one of ours, in a pipeline of diffusers."""


class FrameTokenizer(Protocol):
    """A visual vocabulary: square frames to codes and back."""

    @property
    def codebook_size(self) -> int:
        """Codes; eof and eov come after them."""
        ...

    @property
    def frame_size(self) -> int:
        """Pixels of a side of a frame."""
        ...

    @property
    def codes_per_frame(self) -> int:
        """Codes of one frame."""
        ...

    def encode(self, frames: Frames) -> NDArray[np.int32]:
        """Codes of frames, in batches of bounded memory.

        Args:
            frames: uint8 [F, N, N, 3], resized and cropped already (``resize_and_crop``).

        Returns:
            int32 [F, codes_per_frame], row by row of the frame.

        Raises:
            ValueError: frames of another size.
        """
        ...

    def decode(self, codes: ArrayLike) -> NDArray[np.uint8]:
        """Frames that the codes stand for, in batches of bounded memory.

        Args:
            codes: ints [F, codes_per_frame], each below ``codebook_size``.

        Returns:
            uint8 [F, N, N, 3].

        Raises:
            ValueError: another number of codes, or one out of range.
        """
        ...

    def digest(self) -> str:
        """SHA-256 (hex); equal digests mean equal codes."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a dataset's meta.json says: kind, size, codes_per_frame, frame_size, digest, ..."""
        ...

    def save(self, folder: Path) -> None:
        """Write it into a folder, where ``load_frame_tokenizer`` finds it again."""
        ...


def load_frame_tokenizer(
    path: Path | str, device: str = "cpu", precision: Precision = "fp32"
) -> FrameTokenizer:
    """Load whatever frame tokenizer lies at a path.

    Args:
        path: a patch codebook's .npz; a prepared folder or a result of ``data train-codebook``;
            or the folder of a VQModel in the layout of diffusers (aMUSEd, or its ``vqvae``).
        device: where a VQGAN computes; a patch codebook stays on the CPU.
        precision: of a VQGAN's convolutions; ``bf16`` is faster on a GPU, and gives other codes
            here and there, so that it counts as another tokenizer (its digest differs).

    Raises:
        ValueError: there is none, or one that this program cannot represent; names the file.
    """
    path = Path(path)
    if path.is_file():
        return PatchCodebook.load(path)
    if (path / CODEBOOK_FILE).is_file():
        return PatchCodebook.load(path / CODEBOOK_FILE)
    for name in _VQGAN_FOLDERS:
        if (path / name / CONFIG_FILE).is_file():
            return VQGANTokenizer.load(path / name, device, precision)
    raise ValueError(
        f"{path} holds no frame tokenizer; name a {CODEBOOK_FILE}, a folder with one, "
        "or a VQModel folder (config.json and its safetensors)"
    )
